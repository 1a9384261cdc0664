"""Prompt tuning: initialisations and checks of the configuration."""

import pytest
import torch
from tests.models.prompt_models import base, close, config, tokenizer

import peft
from peft import PromptEmbedding, PromptTuningConfig, PromptTuningInit
from peft.core.prompt import word_vectors


def encoder(**kwargs):
    return peft.get_peft_model(base("llama"), config("prompt", "CAUSAL_LM", **kwargs)).prompt_encoder["default"]


def test_random_is_the_draw_of_an_embedding():
    base("llama")  # made once, with draws of its own
    torch.manual_seed(4)
    got = encoder().embedding.weight
    torch.manual_seed(4)
    assert isinstance(encoder(), PromptEmbedding)
    torch.manual_seed(4)
    assert torch.equal(got, torch.nn.Embedding(3, 16).weight)
    assert got.dtype == torch.float32 and got.requires_grad


def test_sample_vocab_copies_word_vectors():
    torch.manual_seed(4)
    got = encoder(prompt_tuning_init="SAMPLE_VOCAB").embedding.weight
    torch.manual_seed(4)
    torch.nn.Embedding(3, 16)
    ids = torch.randint(0, 50, (3,))
    assert torch.equal(got, base("llama").get_input_embeddings().weight[ids])


def test_word_vectors_keep_the_scale_of_the_embedding_under_zero3():
    class Scaled(torch.nn.Embedding):  # as in Gemma
        def forward(self, ids):
            return super().forward(ids) * 4.0

    words = Scaled(5, 3)
    want = words.weight[[1, 2]] * 4.0
    words.weight.ds_id = 0  # DeepSpeed's mark on partitioned parameters
    close(word_vectors(words, torch.tensor([1, 2])), want)


@pytest.mark.parametrize(("text", "ids"), [("a b c d", [5, 6, 7]), ("b a", [6, 5, 6])])
def test_text_is_cut_or_repeated(text, ids, tmp_path):
    kwargs = {"trust_remote_code": True, "use_fast": True}
    options = {"prompt_tuning_init": PromptTuningInit.TEXT, "prompt_tuning_init_text": text, "tokenizer_kwargs": kwargs}
    got = encoder(**options, tokenizer_name_or_path=tokenizer(tmp_path)).embedding.weight
    close(got, base("llama").get_input_embeddings().weight[ids])
    assert kwargs == {"trust_remote_code": True, "use_fast": True}


def test_empty_text(tmp_path):
    with pytest.raises(ValueError, match="has no tokens"):
        encoder(prompt_tuning_init="TEXT", prompt_tuning_init_text="", tokenizer_name_or_path=tokenizer(tmp_path))


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x"}, "tokenizer_name_or_path"),
        ({"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "x"}, "prompt_tuning_init_text"),
        ({"tokenizer_kwargs": {"a": 1}}, "tokenizer_kwargs"),
        ({"prompt_tuning_init": "RANDON"}, "use one of TEXT, SAMPLE_VOCAB, RANDOM. Did you mean 'RANDOM'"),
    ],
)
def test_options_that_do_not_fit(kwargs, text):
    with pytest.raises(ValueError, match=text):
        PromptTuningConfig(**kwargs)


def test_encoder_decoders_store_rows_for_both_parts():
    model = peft.get_peft_model(base("t5"), config("prompt", "SEQ_2_SEQ_LM"))
    assert model.prompt_encoder["default"].embedding.weight.shape == (6, 16)
    assert model.prompt_tokens["default"].tolist() == list(range(6))
    assert model.get_prompt_embedding_to_save("default").shape == (6, 16)


def test_prompt_length_is_required():
    for tokens in (None, 0, -1):
        with pytest.raises(ValueError, match=f"`num_virtual_tokens` should be .* {tokens}$"):
            peft.get_peft_model(base("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens))


def test_published_names_of_reading_and_writing():
    model = peft.get_peft_model(base("llama"), config("prompt", "CAUSAL_LM"))
    model.add_adapter("b", config("prompt", "CAUSAL_LM"))
    encoder, cfg = model.prompt_encoder["b"], model.peft_config["b"]
    state = encoder._get_adapter_state_dict(model, cfg, "b", {}, ["default"])
    assert list(state) == ["prompt_embeddings"] and torch.equal(state["prompt_embeddings"], encoder.embedding.weight)
    assert encoder._remap_adapter_state_dict_for_load(model, cfg, "b", state) == state
    model.prompt_encoder["default"]._load_adapter_state_dict(state)
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, encoder.embedding.weight)
    keys = {
        "a.b.weight": "a.weight",
        "a.b": "a",
        "b": "b",
        "a.c": "a.c",
        "b.w": "b.w",
        "a.bb.w": "a.bb.w",
        "x.b.c.w": "x.b.c.w",
    }
    assert {key: encoder._remove_adapter_name_from_key(key, "b") for key in keys} == keys
