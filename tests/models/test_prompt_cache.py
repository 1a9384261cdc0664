"""Caches that hold a prefix: of every class of transformers, for models whose layers differ."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import transformers
from tests.models.prompt_models import IDS, adapted, config

import peft
from peft.prompt_cache import _layer_shape, cache_length, write_prefix
from peft.utils.constants import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING as FORMATS


@pytest.mark.parametrize(("name", "task"), [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_a_static_cache_with_the_prefix(name, task):
    model = adapted(name, "prefix", task)
    cache, grown = model.get_prompt(2, max_cache_len=16), model.get_prompt(2)
    static, grown = getattr(cache, "self_attention_cache", cache), getattr(grown, "self_attention_cache", grown)
    assert isinstance(static, transformers.StaticCache) and static.get_seq_length() == 3
    assert static.layers[0].keys.shape[2] == 16
    assert torch.equal(static.layers[1].keys[:, :, :3], grown.layers[1].keys)


def test_caches_of_other_formats(monkeypatch):
    """Tuples count, and a model type may have a format of its own."""
    assert (cache_length(()), cache_length(((torch.ones(1, 2, 5, 4),) * 2,))) == (0, 5)
    monkeypatch.setitem(FORMATS, "llama", lambda layers: tuple((kv[0], kv[1]) for kv in layers))
    model = adapted("llama", "prefix", "CAUSAL_LM")
    pairs = model.get_prompt(2)
    monkeypatch.undo()
    for (key, value), layer in zip(pairs, model.get_prompt(2).layers, strict=True):
        assert torch.equal(key, layer.keys) and torch.equal(value, layer.values)


def gemma4(**options):
    sizes = {"vocab_size": 50, "vocab_size_per_layer_input": 50, "hidden_size": 16, "hidden_size_per_layer_input": 4}
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8}
    torch.manual_seed(0)
    every = {"intermediate_size": 32, "pad_token_id": 0, **sizes, **layers, **heads, **options}
    return transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**every)).eval()


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="older transformers")
@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({"global_head_dim": 16}, [(2, 3, 8), (2, 3, 16)] * 2),
        ({"num_global_key_value_heads": 1, "attention_k_eq_v": True}, [(2, 3, 8), (1, 3, 8)] * 2),
        ({"num_kv_shared_layers": 2}, [(2, 3, 8), (2, 3, 8)]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_layers_of_several_widths(options, shapes):
    model = peft.get_peft_model(gemma4(**options), config("prefix", "CAUSAL_LM")).eval()
    said = r"into the layers \[0, 1\]; the layers \[2, 3\] cannot"
    with pytest.warns(UserWarning, match=said) if len(shapes) < 4 else nullcontext():
        cache = model.get_prompt(1)
    held = [layer.keys for layer in cache.layers if getattr(layer, "keys", None) is not None]
    assert [tuple(keys.shape[1:]) for keys in held] == shapes
    ids = IDS[1:]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model.prompt_encoder["default"].embedding.weight.add_(1)
        assert not torch.allclose(model(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ({"per_layer_config": {"0": {"head_dim": 4}, 1: {"num_key_value_heads": 1}}}, [(2, 4), (1, 8), (2, 8), None]),
        (
            {"layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 6},
            [(2, 8), (2, 6), (2, 8), None],
        ),
        (
            {"layer_types": ["full_attention"] * 4, "global_head_dim": 6, "num_global_key_value_heads": 1},
            [(1, 6), (1, 6), (1, 6), None],
        ),
        ({"head_dim": 9}, [None] * 4),
    ],
)  # fmt: skip
def test_widths_as_older_configurations_say_them(text, shapes):
    text = {"num_hidden_layers": 4, "num_kv_shared_layers": 1, "head_dim": 8, "num_key_value_heads": 2, **text}
    assert [_layer_shape(SimpleNamespace(**text), i, 2, 8) for i in range(4)] == shapes


def test_a_prefix_that_no_layer_can_take():
    rows, text = torch.ones(1, 3, 2 * 2 * 8), {"model_type": "gemma2", "num_hidden_layers": 2, "head_dim": 16}
    sizes = SimpleNamespace(num_attention_heads=2, num_layers=2, token_dim=8, num_transformer_submodules=1)
    base = SimpleNamespace(config=SimpleNamespace(**text))
    with pytest.raises(ValueError, match="No layer of SimpleNamespace can take the prefix"):
        write_prefix(transformers.DynamicCache(), rows, sizes, base, 1)


def test_the_prefix_goes_to_the_device_of_its_layer():
    model = adapted("llama", "prefix", "CAUSAL_LM")
    for spread, want in (({}, "cpu"), ({"model.layers.0": "meta", "model.layers.1": "cpu"}, "meta")):  # cpu: offloaded
        model.base_model.hf_device_map = spread
        assert [layer.keys.device.type for layer in model.get_prompt(1).layers] == [want] * 2
