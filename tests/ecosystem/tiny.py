"""Tiny models, data and comparisons for the tests of other libraries. Nothing is downloaded."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import nn

VOCAB, WIDTH = 64, 32
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _make(cls: type, config: Any, scale: float = 8.0) -> Any:
    """With the usual small weights every effect would be small too, hence `scale`."""
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name and "wte" not in name:
                parameter.mul_(scale)
    return model.eval()


def llama(cls: type = tf.LlamaForCausalLM, **changes: Any) -> Any:
    return _make(cls, tf.LlamaConfig(**{**_SIZES, **changes}))


def gpt2(cls: type = tf.GPT2LMHeadModel) -> Any:
    config = tf.GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    )
    return _make(cls, config)


def bert(cls: type = tf.BertForSequenceClassification, **changes: Any) -> Any:
    sizes = {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}
    return _make(cls, tf.BertConfig(**{**sizes, "num_labels": 3, "hidden_dropout_prob": 0.0, **changes}))


def t5() -> Any:
    config = tf.T5Config(
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_ff=48,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return _make(tf.T5ForConditionalGeneration, config, scale=1.0)


def mixtral(**changes: Any) -> Any:
    return _make(
        tf.MixtralForCausalLM,
        tf.MixtralConfig(**{**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, **changes}),
    )


def qwen3_moe(**changes: Any) -> Any:
    sizes = {**_SIZES, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return _make(tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig(**{**sizes, **changes}))


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    tokens = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    config = tf.Qwen2VLConfig(text_config={**_SIZES, "rope_parameters": rope}, vision_config=vision, **tokens)
    return _make(tf.Qwen2VLForConditionalGeneration, config)


def llava() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", **sizes, "image_size": 8, "patch_size": 4}
    config = tf.LlavaConfig(text_config={"model_type": "llama", **_SIZES}, vision_config=vision, image_token_index=60)
    return _make(tf.LlavaForConditionalGeneration, config)


def saved(model: nn.Module, folder: Path) -> str:
    """The model's folder, as if it came from the hub."""
    model.save_pretrained(folder)
    model.name_or_path = str(folder)
    return str(folder)


# ---- data


def ids(rows: int = 2, length: int = 10, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


class Texts(torch.utils.data.Dataset):
    """Sequences that count upwards: learnable in a few steps."""

    def __init__(self, rows: int = 16, length: int = 12):
        starts = torch.arange(rows)[:, None] * 3
        self.tokens = (starts + torch.arange(length)) % (VOCAB - 3) + 3

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {
            "input_ids": self.tokens[i],
            "attention_mask": torch.ones_like(self.tokens[i]),
            "labels": self.tokens[i],
        }


class Classes(Texts):
    """Sequences with one of three labels."""

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {**super().__getitem__(i), "labels": torch.tensor(i % 3)}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCAB)}
    words["<pad>"], words["<s>"], words["</s>"] = words.pop("w0"), words.pop("w1"), words.pop("w2")
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


# ---- comparisons


@torch.no_grad()
def logits(model: nn.Module, tokens: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
    tokens, first = ids() if tokens is None else tokens, next(model.parameters())
    return model(input_ids=tokens if first.is_meta else tokens.to(first.device), **kwargs).logits.clone()


@torch.no_grad()
def spread(model: nn.Module, std: float = 0.2, seed: int = 5, only: str = "") -> nn.Module:
    """Random adapter weights (those that require grad), so that adapters change outputs."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and only in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def tensors(model: nn.Module, with_: str = "") -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.named_parameters() if with_ in k}


def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base weights of an adapted model under the names that they have in the unadapted one."""
    from peft import get_base_model_state_dict

    return {k: v.detach().clone() for k, v in get_base_model_state_dict(model).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """The same names with bit by bit the same values."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def apart(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) > 1e-2


def files(folder: Path | str) -> set[str]:
    return {str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()}


def clone(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def losses(trainer: Any, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def falls(values: Iterable[float], by: float = 0.97) -> bool:
    values = list(values)
    return values[-1] < by * values[0]
