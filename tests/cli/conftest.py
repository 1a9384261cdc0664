"""A tiny model with a tokenizer on disk, and adapters made by hand."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

WORDS = "return the value of a file list name or path to set get open close if none is given with for each item"
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<end>", "<unk>", *sorted(set(WORDS.split())), "<|user|>", "<|assistant|>"]
    vocab = {token: i for i, token in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\|?\w+\|?>|\w+"), "removed", invert=True)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    wrapped.chat_template = TEMPLATE
    return wrapped


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory) -> Path:
    """A two-layer Llama in three shards, with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attention_bias=True, tie_word_embeddings=False,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="25KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


@pytest.fixture
def write_adapter(tmp_path):
    """Function that writes an adapter folder from a config and tensors."""

    def write(config: dict, tensors: dict[str, torch.Tensor], name: str = "adapter") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        full = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(full | config))
        tensors = {f"base_model.model.{key}": value.contiguous() for key, value in tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder

    return write
