"""Cartridges: frozen rows, start from a cache or a text, composition of files."""

import pytest
import torch
from tests.models.prompt_models import IDS, adapted, base, close, config, tokenizer

import peft
from peft import (
    CartridgeConfig,
    compose_cartridge_adapters,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
    prompt_embeddings_from_past_key_values,
)

TEXT = IDS[1:, :4]


def test_frozen_rows():
    model = adapted("llama", "cartridge", "CAUSAL_LM", num_virtual_tokens=4, num_frozen_tokens=1).train()
    encoder = model.prompt_encoder["default"]
    assert (encoder.num_frozen_tokens, encoder.num_trainable_tokens) == (1, 3)
    assert not encoder.frozen_embedding.requires_grad
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert encoder.frozen_embedding.grad is None and encoder.trainable_embedding.grad.abs().sum() > 0
    assert encoder.weight.shape == encoder.embedding.weight.shape == (4, 32)
    none = adapted("llama", "cartridge", "CAUSAL_LM", num_frozen_tokens=0).prompt_encoder["default"]
    assert none.frozen_embedding is None
    kept = none.export()["prompt_embeddings"]
    none.trainable_embedding.data.zero_()
    assert kept.abs().sum() > 0
    inference = peft.get_peft_model(base("llama"), config("cartridge", "CAUSAL_LM", inference_mode=True))
    assert not any(p.requires_grad for p in inference.parameters())


def test_configuration():
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        CartridgeConfig(num_frozen_tokens=-1)
    with pytest.raises(ValueError, match="larger than"):
        CartridgeConfig(num_virtual_tokens=2, num_frozen_tokens=3)
    with pytest.raises(ValueError, match="shape"):
        adapted("llama", "cartridge", "CAUSAL_LM").prompt_encoder["default"].load_prompt_embeddings(torch.zeros(2, 32))


@pytest.mark.parametrize("method", ["cartridge", "prefix"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_cache_of_real_tokens_gives_the_logits_of_the_full_text(name, method):
    model = adapted(name, method, "CAUSAL_LM", num_virtual_tokens=4)
    want = base(name)(input_ids=IDS[1:]).logits[:, 4:]
    cache = base(name)(input_ids=TEXT, use_cache=True, past_key_values=_cache()).past_key_values
    rows = initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    close(model(input_ids=IDS[1:, 4:]).logits, want)
    assert rows.shape == (4, 32)
    close(model.get_prompt_embedding_to_save("default"), rows)


def _cache():
    from transformers import DynamicCache

    return DynamicCache()


def test_text(tmp_path):
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(tokenizer(tmp_path))
    model = adapted("llama", "cartridge", "CAUSAL_LM").train()
    rows = initialize_kv_prefix_from_text(model, words, text="a b c d")
    cache = base("llama")(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    close(rows, prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=3))
    assert model.training and model.base_model.training
    with pytest.raises(ValueError, match="longer text"):
        initialize_kv_prefix_from_text(model, words, text="a b")
    with pytest.raises(ValueError, match="longer text"):
        initialize_kv_prefix_from_text(model, words, text="a b c d", max_length=2)
    calls = []

    def cutting(text, **kwargs):  # tokenizers keep what they put at the end of a text
        calls.append(kwargs)
        return words(text, **kwargs)

    initialize_kv_prefix_from_text(model, cutting, text="a b c d", max_length=3)
    assert calls == [{"return_tensors": "pt", "truncation": True, "max_length": 3}]
    words.chat_template = "{{ 'd ' + messages[0]['content'] }}"
    rows = initialize_kv_prefix_from_text(model, words, text="a b c d")
    cache = base("llama")(input_ids=torch.tensor([[8, 5, 6]]), use_cache=True).past_key_values
    close(rows, prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=3))


def test_rows_of_a_cache():
    layers = [(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)) for _ in range(2)]
    rows = prompt_embeddings_from_past_key_values(layers, num_virtual_tokens=3)
    close(rows.view(3, 2, 2, 2, 4)[2, 1, 0, 1], layers[1][0][0, 1, 2])
    for bad, text in [
        ([], "empty"),
        ([(torch.zeros(2, 5, 4), torch.zeros(2, 5, 4))], "Layer 0"),
        ([(torch.zeros(2, 2, 5, 4),) * 2], "batch of 2"),
        ([(torch.zeros(1, 2, 2, 4),) * 2], "only 2 cached"),
        ([layers[0], (torch.zeros(1, 1, 5, 4),) * 2], "differ"),
    ]:
        with pytest.raises(ValueError, match=text):
            prompt_embeddings_from_past_key_values(bad, num_virtual_tokens=3)
    with pytest.raises(ValueError, match="`num_virtual_tokens` should be a positive integer value.* -1"):
        prompt_embeddings_from_past_key_values(layers, num_virtual_tokens=-1)
    with pytest.raises(TypeError, match="not supported"):
        prompt_embeddings_from_past_key_values(3, num_virtual_tokens=3)


def test_adapters_that_hold_no_cache():
    for method, kwargs in [("prompt", {}), ("prefix", {"prefix_projection": True})]:
        model = adapted("llama", method, "CAUSAL_LM", **kwargs)
        with pytest.raises(ValueError, match="default"):
            initialize_kv_prefix_from_past_key_values(model, past_key_values=[])
    with pytest.raises(ValueError, match="does not exist"):
        initialize_kv_prefix_from_past_key_values(model, adapter_name="x", past_key_values=[])


@pytest.mark.parametrize("safe", [True, False])
def test_composition(safe, tmp_path):
    paths, rows = [], []
    for seed, nv in [(1, 3), (2, 2)]:
        model = adapted("llama", "cartridge", "CAUSAL_LM", seed=seed, num_virtual_tokens=nv)
        model.save_pretrained(tmp_path / str(seed))
        paths.append(tmp_path / str(seed))
        rows.append(model.get_prompt_embedding_to_save("default"))
    compose_cartridge_adapters(paths, output_path=tmp_path / "both", safe_serialization=safe)
    both = peft.PeftModel.from_pretrained(base("llama"), tmp_path / "both")
    assert both.peft_config["default"].num_virtual_tokens == 5
    assert torch.equal(both.get_prompt_embedding_to_save("default"), torch.cat(rows))
    compose_cartridge_adapters(paths[::-1], output_path=tmp_path / "both", safe_serialization=not safe)
    both = peft.PeftModel.from_pretrained(base("llama"), tmp_path / "both")  # the file of the other format is gone
    assert torch.equal(both.get_prompt_embedding_to_save("default"), torch.cat(rows[::-1]))
    with pytest.raises(ValueError, match="at least two"):
        compose_cartridge_adapters(paths[:1], output_path=tmp_path / "x")
    adapted("llama", "prefix", "CAUSAL_LM").save_pretrained(tmp_path / "prefix")
    with pytest.raises(ValueError, match="not CARTRIDGE"):
        compose_cartridge_adapters([paths[0], tmp_path / "prefix"], output_path=tmp_path / "x")


def test_cartridges_of_different_models_are_not_composed(tmp_path):
    for name, width in (("a", 16), ("b", 32)):
        options = {"num_virtual_tokens": 3, "num_layers": 2, "token_dim": width, "num_attention_heads": 4}
        CartridgeConfig(**options).save_pretrained(tmp_path / name)
    paths = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(ValueError, match=r"b does not fit .*a: token_dim is 32, not 16"):
        compose_cartridge_adapters(paths, output_path=tmp_path / "c")
    assert not (tmp_path / "c").exists()
