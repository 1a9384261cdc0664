# SPDX-License-Identifier: Apache-2.0
"""Loading: what fits is loaded, what does not is named and changes nothing."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.io.embeddings import _vocab_size
from peft.io.load import _with_nan, load_adapter_state
from peft.utils.warning import PeftWarning

from .models import fill, ids, net, snapshot, unchanged

P = "base_model.model."


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["lin0", "a"], **options})


@pytest.fixture
def model():
    return get_peft_model(net(), lora(modules_to_save=["norm"]))


def state_of(model: nn.Module, value: float = 1.0) -> dict[str, torch.Tensor]:
    return {k: torch.full_like(v, value) for k, v in get_peft_model_state_dict(model).items()}


# ---- the published result
def test_missing_keys_are_all_that_were_not_loaded(model):
    state = state_of(model)
    del state[P + "lin0.lora_A.weight"]
    result = set_peft_model_state_dict(model, state)
    loaded = {"lin0.lora_B.default.weight", "block.a.lora_A.default.weight", "block.a.lora_B.default.weight"}
    loaded |= {"norm.modules_to_save.default.weight", "norm.modules_to_save.default.bias"}
    assert set(result.missing_keys) == set(model.state_dict()) - {P + k for k in loaded}
    assert result.unexpected_keys == []
    assert type(result).__name__ == "_IncompatibleKeys"


def test_report_lists_only_the_adapter(model):
    state = state_of(model)
    del state[P + "lin0.lora_A.weight"], state[P + "norm.bias"]
    model.add_adapter("d", lora())
    report = load_adapter_state(model, state)
    assert report.missing == [P + "lin0.lora_A.default.weight", P + "norm.modules_to_save.default.bias"]
    assert sorted(report.loaded) == sorted(state)


def test_load_adapter_reports_missing_keys_of_that_adapter_alone(tmp_path, model):
    """An adapter called "b" is no part of "base_model" (the published filter looks for substrings)."""
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    del state[P + "lin0.lora_A.weight"]
    save_file(state, tmp_path / "adapter_model.safetensors")
    for name in ("b", "e"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = model.load_adapter(tmp_path, name)
        assert result.missing_keys == [f"{P}lin0.lora_A.{name}.weight"]
        assert result.unexpected_keys == []
    with pytest.warns(UserWarning, match=r"missing adapter keys.*lin0\.lora_A\.default\.weight"):
        PeftModel.from_pretrained(net(), tmp_path)


# ---- wrong input leaves the model unchanged
def test_wrong_shape(model):
    before = snapshot(model)
    state = state_of(model)
    state[P + "lin0.lora_A.weight"] = torch.ones(5, 8)
    with pytest.raises(RuntimeError) as error:
        set_peft_model_state_dict(model, state)
    text = str(error.value)
    assert f"size mismatch for {P}lin0.lora_A.default.weight" in text
    assert "shape torch.Size([5, 8]) from checkpoint" in text
    assert "current model is torch.Size([2, 8])" in text
    assert unchanged(model, before)


def test_wrong_shape_of_a_base_tensor(model):
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"emb\.weight.*\[11, 8\].*\[10, 8\]"):
        set_peft_model_state_dict(model, {**state_of(model), P + "emb.weight": torch.ones(11, 8)})
    assert unchanged(model, before)


def test_ignore_mismatched_sizes(model):
    state = state_of(model, 3.0)
    state[P + "lin0.lora_A.weight"] = torch.ones(5, 8)
    old = get_peft_model_state_dict(model)[P + "lin0.lora_A.weight"].clone()
    with pytest.warns(UserWarning, match=r"lin0\.lora_A\.default\.weight: found shape torch\.Size\(\[5, 8\]\)"):
        result = set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True)
    now = get_peft_model_state_dict(model)
    assert torch.equal(now[P + "lin0.lora_A.weight"], old)
    assert bool((now[P + "lin0.lora_B.weight"] == 3).all())
    assert P + "lin0.lora_A.default.weight" in result.missing_keys


def test_foreign_keys_are_named_with_the_nearest(model, tmp_path):
    state = {**state_of(model), P + "lin0.lora_a.weight": torch.ones(2, 8), "lin1.lora_A.weight": torch.ones(2)}
    report = load_adapter_state(model, state)
    assert report.unexpected == [P + "lin0.lora_a.weight", "lin1.lora_A.weight"]
    assert report.hints[P + "lin0.lora_a.weight"] == P + "lin0.lora_A.weight"
    model.save_pretrained(tmp_path)
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match=r"lin0\.lora_a\.weight.*nearest valid key is '.*lin0\.lora_A\.weight'"):
        PeftModel.from_pretrained(net(), tmp_path)


def test_keys_of_another_adapter_are_not_loaded_into_it(model):
    model.add_adapter("second", lora())
    before = snapshot(model)
    result = set_peft_model_state_dict(model, {P + "lin0.lora_A.second.weight": torch.ones(2, 8)})
    assert result.unexpected_keys == [P + "lin0.lora_A.second.weight"]
    assert unchanged(model, before)


def test_file_of_another_method(tmp_path):
    get_peft_model(net(), IA3Config(target_modules=["lin0"], feedforward_modules=[])).save_pretrained(tmp_path)
    model = get_peft_model(net(), lora())
    before = snapshot(model)
    report = load_adapter_state(model, load_file(tmp_path / "adapter_model.safetensors"))
    assert report.unexpected == [P + "lin0.ia3_l"]
    assert len(report.missing) == 4
    assert unchanged(model, before)
    lora().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"missing adapter keys.*lin0\.ia3_l"):
        PeftModel.from_pretrained(net(), tmp_path)


def test_nan(model):
    state = state_of(model)
    state[P + "lin0.lora_B.weight"][3, 1] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"hold NaN in 1 of 6 tensors: \['base_model\.model\.lin0\.lora_B\.weight'\]"):
        load_adapter_state(model, state, refuse_nan=True, source="here")
    assert unchanged(model, before)
    with pytest.warns(PeftWarning, match=r"hold NaN: .*lin0\.lora_B"):
        set_peft_model_state_dict(model, state)
    state[P + "lin0.lora_B.weight"][3, 1] = float("inf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_peft_model_state_dict(model, state)


def test_nan_next_to_tensors_without_elements():
    """AdaLoRA writes factors of rank 0."""
    state = {"first": torch.empty(0, 4), "second": torch.full((2,), torch.nan), "third": torch.empty(0)}
    assert _with_nan(state) == ["second"]
    assert _with_nan({f"t{i}": torch.zeros(9_000) for i in range(9)} | state) == ["second"]


def test_not_tensors(model):
    with pytest.raises(TypeError, match=r"must be tensors, but \[\"'x' is a list\"\]"):
        set_peft_model_state_dict(model, {"x": [1.0]})


def test_unknown_adapter(model):
    with pytest.raises(KeyError, match="nope"):
        set_peft_model_state_dict(model, {}, adapter_name="nope")


def test_given_dict_is_not_changed(model):
    state = state_of(model)
    keys = list(state)
    set_peft_model_state_dict(model, state)
    assert list(state) == keys


def test_failed_from_pretrained_leaves_the_base(tmp_path):
    get_peft_model(net(), lora()).save_pretrained(tmp_path)
    lora(r=5).save_pretrained(tmp_path)
    base = net()
    before = snapshot(base)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(base, tmp_path)
    assert unchanged(base, before)


# ---- what may come along
def test_base_keys_and_memory_keys_load(model):
    result = set_peft_model_state_dict(
        model, {P + "emb.weight": torch.full((10, 8), 7.0), P + "lin0.lora_A.default.weight": torch.full((2, 8), 5.0)}
    )
    assert result.unexpected_keys == []
    assert bool((model.base_model.model.emb.weight == 7).all())
    assert bool((get_peft_model_state_dict(model)[P + "lin0.lora_A.weight"] == 5).all())


@pytest.mark.parametrize("prefix", ["", P])
def test_plain_model_takes_both_forms(prefix):
    model = inject_adapter_in_model(lora(), net())
    state = {prefix + k: v + 2 for k, v in get_peft_model_state_dict(model).items()}
    assert set_peft_model_state_dict(model, state).unexpected_keys == []
    assert all(torch.equal(v, state[prefix + k]) for k, v in get_peft_model_state_dict(model).items())


def test_unprefixed_keys_of_a_peft_model_are_unexpected(model):
    before = snapshot(model)
    state = {k.removeprefix(P): v for k, v in state_of(model).items() if "norm" not in k}
    assert sorted(set_peft_model_state_dict(model, state).unexpected_keys) == sorted(state)
    assert unchanged(model, before)


def test_adapter_without_its_own_tokens(tmp_path):
    """One adapter has trainable modules, the other has not: each can be saved and loaded."""
    model = get_peft_model(net(), lora(trainable_token_indices={"emb": [1, 3]}), adapter_name="tokens")
    model.add_adapter("plain", lora())
    fill(model, "tokens"), fill(model, "plain", 5)
    assert P + "emb.token_adapter.trainable_tokens_delta" in get_peft_model_state_dict(model, adapter_name="tokens")
    assert len(get_peft_model_state_dict(model, adapter_name="plain")) == 4
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path / "tokens", adapter_name="x")
    again.load_adapter(tmp_path / "plain", "y")
    for old, new in (("tokens", "x"), ("plain", "y")):
        model.set_adapter(old), again.set_adapter(new)
        with torch.no_grad():
            assert torch.equal(model.eval()(ids()), again(ids()))


# ---- memory
def test_low_cpu_mem_usage(tmp_path):
    model = get_peft_model(net(), lora(modules_to_save=["norm"]))
    fill(model, "default")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(ids()), model.eval()(ids()))
    trainable = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=True, is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_low_cpu_mem_usage_takes_the_tensors_as_they_are():
    model = get_peft_model(net(), lora(), low_cpu_mem_usage=True)
    assert model.base_model.model.lin0.lora_A["default"].weight.is_meta
    state = {k: torch.ones(v.shape) for k, v in get_peft_model_state_dict(model).items()}
    with pytest.warns(UserWarning, match=r"meta device were not loaded.*low_cpu_mem_usage=True"):
        set_peft_model_state_dict(model, state)
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    weight = model.base_model.model.lin0.lora_A["default"].weight
    assert weight.data_ptr() == state[P + "lin0.lora_A.weight"].data_ptr()
    assert weight.requires_grad


@pytest.mark.parametrize("autocast", [True, False])
def test_low_cpu_mem_usage_keeps_the_precision_of_ordinary_loading(tmp_path, autocast):
    model = get_peft_model(net().bfloat16(), lora())
    fill(model, "default")
    model.save_pretrained(tmp_path)
    base = [net().bfloat16() for _ in range(2)]
    a, b = (
        PeftModel.from_pretrained(m, tmp_path, low_cpu_mem_usage=low, autocast_adapter_dtype=autocast)
        for m, low in zip(base, (False, True), strict=True)
    )
    state_a, state_b = get_peft_model_state_dict(a), get_peft_model_state_dict(b)
    assert {v.dtype for v in state_b.values()} == {torch.float32 if autocast else torch.bfloat16}
    assert all(torch.equal(state_a[k], v) for k, v in state_b.items())
    if autocast:
        assert all(torch.equal(v, get_peft_model_state_dict(model)[k]) for k, v in state_b.items())


def test_missing_keys_with_low_cpu_mem_usage_stay_on_meta():
    model = get_peft_model(net(), lora(), low_cpu_mem_usage=True)
    report = load_adapter_state(model, {P + "lin0.lora_A.weight": torch.ones(2, 8)}, low_cpu_mem_usage=True)
    assert len(report.missing) == 3
    assert model.base_model.model.lin0.lora_B["default"].weight.is_meta


def test_offloaded_base(tmp_path):
    """Adapters of layers whose weights wait on disk live where the layer computes."""
    accelerate = pytest.importorskip("accelerate")
    model = get_peft_model(net(), lora(modules_to_save=["norm"]))
    fill(model, "default")
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(ids())
    for low in (False, True):
        places = dict.fromkeys(("emb", "lin0", "attn", "conv", "norm", "head"), "cpu") | {
            "block": "disk",
            "lin0": "disk",
        }
        base = accelerate.dispatch_model(net(), places, main_device="cpu", offload_dir=tmp_path / f"off{low}")
        assert base.lin0.weight.is_meta
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low)
        with torch.no_grad():
            assert torch.equal(loaded(ids()), expected)
        state = get_peft_model_state_dict(loaded)
        assert all(torch.equal(state[k], v) for k, v in get_peft_model_state_dict(model).items())


# ---- hooks of methods, prompts
def test_vera_projections(tmp_path):
    model = get_peft_model(net(), VeraConfig(r=3, target_modules=["lin0", "a"]))
    fill(model, "default")
    state = get_peft_model_state_dict(model)
    other = get_peft_model(net(), VeraConfig(r=3, target_modules=["lin0", "a"], projection_prng_key=9))
    set_peft_model_state_dict(other, state)
    with torch.no_grad():
        assert torch.equal(other.eval()(ids()), model.eval()(ids()))
    before = snapshot(other)
    with pytest.raises(ValueError, match="vera_A and vera_B"):
        set_peft_model_state_dict(other, {k: v for k, v in state.items() if "lambda" in k})
    assert unchanged(other, before)


@pytest.fixture(scope="module")
def bert():
    from transformers import BertConfig, BertForSequenceClassification

    def make():
        torch.manual_seed(0)
        return BertForSequenceClassification(
            BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=30)
        )

    return make


@pytest.mark.parametrize("method", [PromptTuningConfig, PrefixTuningConfig])
def test_prompts_with_a_head(bert, tmp_path, method):
    model = get_peft_model(bert(), method(task_type="SEQ_CLS", num_virtual_tokens=2))
    state = get_peft_model_state_dict(model)
    assert list(state) == ["prompt_embeddings", "base_model.classifier.weight", "base_model.classifier.bias"]
    new = {k: torch.full_like(v, 2.0) for k, v in state.items()}
    result = set_peft_model_state_dict(model, new)
    assert result.unexpected_keys == []
    assert all(torch.equal(v, new[k]) for k, v in get_peft_model_state_dict(model).items())
    before = snapshot(model)
    with pytest.raises(KeyError, match="prompt_embeddings"):
        set_peft_model_state_dict(model, {"base_model.classifier.weight": new["base_model.classifier.weight"] + 1})
    with pytest.raises(RuntimeError, match="size mismatch"):
        set_peft_model_state_dict(model, {**new, "prompt_embeddings": torch.ones(7, 5)})
    assert unchanged(model, before)


# ---- embeddings
def llama(vocab: int = 30, tie: bool = False):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**options, intermediate_size=16, vocab_size=vocab, tie_word_embeddings=tie))


@pytest.mark.parametrize(
    ("targets", "save", "option", "extra"),
    [
        (["q_proj"], None, "auto", set()),
        (["q_proj"], None, True, {"model.embed_tokens.weight", "lm_head.weight"}),
        (["q_proj"], ["embed_tokens"], True, {"model.embed_tokens.weight", "lm_head.weight"}),  # not three times
        (["q_proj", "embed_tokens"], None, "auto", {"model.embed_tokens.base_layer.weight"}),
        (["q_proj", "embed_tokens"], None, False, set()),
        (r".*(q_proj|lm_head)", None, "auto", {"lm_head.base_layer.weight"}),
    ],
)
def test_embeddings(targets, save, option, extra):
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=targets, modules_to_save=save))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(model, save_embedding_layers=option)
    names = {k.removeprefix(P) for k in state}
    assert {n for n in names if ".lora_" not in n} == extra
    if save:
        copy = model.base_model.model.model.embed_tokens.modules_to_save["default"].weight
        assert state[P + "model.embed_tokens.weight"].data_ptr() == copy.data_ptr()
    assert set_peft_model_state_dict(model, state).unexpected_keys == []


def test_resized_vocabulary_is_found_out(tmp_path):
    llama(30).save_pretrained(tmp_path / "base")
    model = get_peft_model(llama(34), LoraConfig(r=2, target_modules=["q_proj"]))
    config = model.peft_config["default"]
    config.base_model_name_or_path = str(tmp_path / "base")
    with pytest.warns(UserWarning, match="has been resized during finetuning"):
        state = get_peft_model_state_dict(model)
    assert state[P + "lm_head.weight"].shape == (34, 16)
    config.base_model_name_or_path = str(tmp_path)
    with pytest.warns(UserWarning, match="Could not find a config file"):
        assert P + "lm_head.weight" not in get_peft_model_state_dict(model)
    base = llama(34)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(loaded.get_base_model().lm_head.weight, model.get_base_model().lm_head.weight)


# ---- the base model
@pytest.mark.parametrize("wrapped", ["model", "plain", "tuner", "compiled"])
def test_base_model_state_dict(wrapped):
    config = lora(
        target_modules=["lin0", "attn", "conv"], modules_to_save=["norm"], trainable_token_indices={"emb": [1]}
    )
    model = inject_adapter_in_model(config, net()) if wrapped == "plain" else get_peft_model(net(), config)
    model = {"tuner": lambda m: m.base_model, "compiled": torch.compile}.get(wrapped, lambda m: m)(model)
    original = net().state_dict()
    state = get_base_model_state_dict(model)
    assert list(state) == list(original)
    assert all(torch.equal(state[k], v) for k, v in original.items())
    new = {k: v + 1 for k, v in original.items()}
    result = set_base_model_state_dict(model, new)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert all(torch.equal(v, new[k]) for k, v in get_base_model_state_dict(model).items())


def test_base_model_state_dict_mismatch():
    model = get_peft_model(net(), lora())
    before = snapshot(model)
    state = get_base_model_state_dict(model)
    wrong = {**{k: v + 1 for k, v in state.items() if k != "emb.weight"}, "more": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r"Missing.*emb\.weight.*Unexpected.*more"):
        set_base_model_state_dict(model, wrong)
    with pytest.raises(RuntimeError, match=r"size mismatch for emb\.weight"):
        set_base_model_state_dict(model, {**wrong, "emb.weight": torch.ones(3)}, strict=False)
    assert unchanged(model, before)
    result = set_base_model_state_dict(model, wrong, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["emb.weight"], ["more"])


def test_a_model_with_a_part_called_base_model():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_model, self.head = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2)

    keys = list(Net().state_dict())
    plain = inject_adapter_in_model(LoraConfig(target_modules=["0"]), Net())
    assert list(get_base_model_state_dict(plain)) == keys
    assert list(get_base_model_state_dict(get_peft_model(Net(), LoraConfig(target_modules=["0"])))) == keys


def test_base_weights_that_are_offloaded(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    places = dict.fromkeys(("emb", "attn", "conv", "head"), "cpu") | dict.fromkeys(("lin0", "block", "norm"), "disk")
    base = accelerate.dispatch_model(net(), places, main_device="cpu", offload_dir=tmp_path)
    model = get_peft_model(base, lora())
    original = net().state_dict()
    assert all(torch.equal(v, original[k]) for k, v in get_base_model_state_dict(model).items())
    new = {k: v + 1 for k, v in original.items()}
    set_base_model_state_dict(model, new)
    want = net()
    want.load_state_dict(new)
    assert base.lin0.base_layer.weight.is_meta
    torch.testing.assert_close(model(ids()), want(ids()), atol=0, rtol=1e-4)
    assert all(torch.equal(v, new[k]) for k, v in get_base_model_state_dict(model).items())


# ---- odd models and files
def test_layers_of_a_block_with_two_names_are_stored_once():
    base = net()
    base.again = base.block
    state = get_peft_model_state_dict(get_peft_model(base, lora(target_modules=["a"])))
    assert set(state) == {P + "block.a.lora_A.weight", P + "block.a.lora_B.weight"}


def test_files_that_keep_the_adapter_name_load_under_another(tmp_path):
    saved = get_peft_model(net(), LNTuningConfig(target_modules=["head"]))
    fill(saved, "default")
    saved.save_pretrained(tmp_path)
    assert P + "head.ln_tuning_layers.default.2.weight" in load_file(tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(net(), tmp_path, adapter_name="other").eval()
    assert torch.equal(loaded(ids()), saved.eval()(ids()))


def test_a_configuration_without_a_method(model):
    model.peft_config["bare"] = PeftConfig()
    for call in (get_peft_model_state_dict, lambda m, adapter_name: set_peft_model_state_dict(m, {}, adapter_name)):
        with pytest.raises(ValueError, match="Unknown PEFT type passed: None"):
            call(model, adapter_name="bare")


def test_shards_that_were_not_gathered(model):
    model.base_model.model.lin0.lora_A["default"].weight = nn.Parameter(torch.empty(0))
    with pytest.warns(
        PeftWarning, match=r"1 LoRA weights have no two-dimensional shape, e.g. '.*lin0\.lora_A\.weight'"
    ):
        get_peft_model_state_dict(model)


def test_a_file_with_nan_and_an_ambiguous_name(tmp_path):
    model = get_peft_model(net(), lora())
    state = state_of(model, float("nan"))
    del state[P + "lin0.lora_A.weight"]
    model.save_pretrained(tmp_path)
    save_file(state, tmp_path / "adapter_model.safetensors")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.load_adapter(tmp_path, "lora")
    texts = [str(w.message) for w in caught]
    assert any(f"weights in {tmp_path} hold NaN: ['{P}" in text for text in texts)
    assert any(text.startswith("Adapter name 'lora' should not") and "missing adapter keys" in text for text in texts)


def test_failed_load_keeps_the_other_adapter(tmp_path):
    get_peft_model(net(), lora()).save_pretrained(tmp_path)
    lora(r=5).save_pretrained(tmp_path)
    base = inject_adapter_in_model(lora(), net(), adapter_name="first")
    before = snapshot(base)
    with pytest.warns(UserWarning, match="Already found"), pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(base, tmp_path, adapter_name="second")
    assert unchanged(base, before) and list(base.peft_config) == ["first"]


@pytest.mark.parametrize("values", [{"model_type": "llama"}, {"model_type": "nobody knows"}, {"auto_map": {}}])
def test_vocabulary_of_a_configuration_that_does_not_say(values, tmp_path):
    """The default of its class; undeterminable where there is none."""
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert _vocab_size(str(tmp_path), None) == {"llama": 32000}.get(values.get("model_type"))


def test_vocabulary_of_a_model_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"vocab_size": 30}')
    asked = []

    def download(*args, **kwargs):
        asked.append((*args, kwargs))
        if args[0] != "org/thing":
            raise ValueError("no such repository")
        return str(tmp_path / "config.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert (_vocab_size("org/thing", "v1"), _vocab_size("org/other", None)) == (30, None)
    assert asked[0] == ("org/thing", "config.json", {"revision": "v1"})


@pytest.mark.parametrize("wrap", [torch.compile, lambda model: model])
def test_damaged_prompt_file(tmp_path, wrap):
    base = llama()
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert list(get_peft_model_state_dict(wrap(model))) == ["prompt_embeddings"]
    with pytest.raises(RuntimeError, match=r"(?s)prompt 'default': .*another `num_virtual.*\[9, 9\].*\[3, 16\]"):
        set_peft_model_state_dict(wrap(model), {"prompt_embeddings": torch.zeros(9, 9)})
    set_peft_model_state_dict(wrap(model), {"prompt_embeddings": torch.ones(3, 16)})
    assert torch.equal(model.get_prompt_embedding_to_save("default"), torch.ones(3, 16))
    model.save_pretrained(tmp_path)
    save_file({"prompt_embeddings": torch.zeros(9, 9)}, tmp_path / "adapter_model.safetensors")
    fresh = llama()
    with pytest.raises(RuntimeError, match=rf"prompt 'default' in {tmp_path}: "):
        PeftModel.from_pretrained(fresh, tmp_path)
    assert all(p.requires_grad for p in fresh.parameters()) and not hasattr(fresh, "peft_config")
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        model.load_adapter(tmp_path, "more", is_trainable=True)
    assert list(model.peft_config) == ["default"]
