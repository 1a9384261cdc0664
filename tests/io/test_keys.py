# SPDX-License-Identifier: Apache-2.0
"""Memory keys and file keys are a bijection, found from structure alone."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from peft import (
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.io.keys import adapter_entries, clean, resolve, state_keys

from .models import Net, fill, ids, net

# Names that would confuse anything that looks for parts of names.
NAMES = ["default", "b", "e", "weight", "lora_A", "modules_to_save", "base_model", "model", "lin0", "other", "0"]
LORA_TARGETS = ["emb", "lin0", "attn", "a", "lora_thing", "conv", "0"]


def configs(targets: list[str], save: list[str] | None, dora: bool) -> list:
    linear = [t for t in targets if t in ("lin0", "a", "lora_thing")] or ["lin0"]
    return [
        LoraConfig(r=2, target_modules=targets, modules_to_save=save, use_dora=dora, init_lora_weights=False),
        VeraConfig(r=3, target_modules=linear, modules_to_save=save),
        OFTConfig(r=2, oft_block_size=0, target_modules=linear, modules_to_save=save),
        IA3Config(target_modules=linear, feedforward_modules=[], modules_to_save=save),
    ]


def check_bijection(model: nn.Module, name: str) -> dict[str, str]:
    """Names differ, and each memory name is the tensor of the state dict; returns memory -> file."""
    entries = adapter_entries(model, name, model.peft_config[name])
    state = model.state_dict()
    files, memory = [e.file for e in entries], [e.memory for e in entries]
    assert len(set(files)) == len(files) == len(set(memory)) > 0
    for entry in entries:
        assert state[entry.memory].data_ptr() == entry.tensor.data_ptr()
        assert resolve(model, entry.memory) == (entry.owner, entry.attr)
    return dict(zip(memory, files, strict=True))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    names=st.lists(st.sampled_from(NAMES), min_size=2, max_size=3, unique=True),
    targets=st.lists(st.sampled_from(LORA_TARGETS), min_size=1, unique=True),
    save=st.sampled_from([None, ["norm"], ["head.2", "norm"]]),
    dora=st.booleans(),
    method=st.integers(0, 3),
    prefixed=st.booleans(),
)
def test_bijection_and_round_trip(names, targets, save, dora, method, prefixed):
    """Whatever is adapted and however adapters are called: values saved from one name arrive under another one."""
    dora = dora and not {"attn", "emb"} & set(targets)
    if prefixed or method == 1:  # VeRA needs its tuner
        model: nn.Module = get_peft_model(net(), configs(targets, save, dora)[method], adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, configs(targets, save, dora)[method])
    else:
        model = net()
        for name in names:
            model = inject_adapter_in_model(configs(targets, save, dora)[method], model, adapter_name=name)
    keys = {name: check_bijection(model, name) for name in names}
    assert len({tuple(sorted(k.values())) for k in keys.values()}) == 1  # the file does not know the name
    assert len({m for k in keys.values() for m in k}) == sum(len(k) for k in keys.values())

    first, second = names[:2]
    fill(model, first, seed=3)
    fill(model, second, seed=4)
    state = {k: v.clone() for k, v in get_peft_model_state_dict(model, adapter_name=first).items()}
    assert set(state) >= set(keys[first].values())
    own = {e.tensor.data_ptr() for e in adapter_entries(model, second)}  # VeRA's layers show the tuner's tensors again
    others = {k: v.clone() for k, v in model.state_dict().items() if v.data_ptr() not in own}
    result = set_peft_model_state_dict(model, state, adapter_name=second)
    assert result.unexpected_keys == []
    assert not set(keys[second]) & set(result.missing_keys)
    after = get_peft_model_state_dict(model, adapter_name=second)
    assert all(torch.equal(after[k], v) for k, v in state.items())
    now = model.state_dict()
    assert all(torch.equal(now[k], v) for k, v in others.items())


def test_published_keys():
    config = LoraConfig(
        r=2, target_modules=["emb", "lin0", "attn"], modules_to_save=["head"], use_dora=False, lora_bias=False
    )
    model = get_peft_model(net(), config, adapter_name="x")
    shapes = {k: tuple(v.shape) for k, v in get_peft_model_state_dict(model, adapter_name="x").items()}
    base = "base_model.model."
    assert shapes == {
        base + "emb.lora_embedding_A": (2, 10),
        base + "emb.lora_embedding_B": (8, 2),
        base + "lin0.lora_A.weight": (2, 8),
        base + "lin0.lora_B.weight": (8, 2),
        base + "attn.lora_A.weight": (2, 8),
        base + "attn.lora_B.weight": (24, 2),
        base + "attn.base_layer.out_proj.lora_A.weight": (2, 8),
        base + "attn.base_layer.out_proj.lora_B.weight": (8, 2),
        base + "head.0.weight": (6, 8),
        base + "head.0.bias": (6,),
        base + "head.2.weight": (4, 6),
        base + "head.2.bias": (4,),
    }


def test_magnitude_has_a_bare_key_and_the_old_one_loads():
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["lin0"], use_dora=True))
    state = get_peft_model_state_dict(model)
    bare = "base_model.model.lin0.lora_magnitude_vector"
    assert state[bare].shape == (8,)
    old = {(k + ".weight" if k == bare else k): torch.full_like(v, 2.0) for k, v in state.items()}
    assert set_peft_model_state_dict(model, old).unexpected_keys == []
    assert bool((get_peft_model_state_dict(model)[bare] == 2).all())


@pytest.mark.parametrize(
    ("bias", "extra"),
    [
        ("lora_only", ["lin0.base_layer.bias"]),
        (
            "all",
            ["lin0.base_layer.bias", "block.lora_thing.bias", "conv.bias", "norm.bias", "head.0.bias", "head.2.bias"],
        ),
    ],
)
def test_biases(bias, extra):
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["lin0"], bias=bias))
    state = get_peft_model_state_dict(model)
    found = {k.removeprefix("base_model.model.") for k in state if "lora_A" not in k and "lora_B" not in k}
    assert found == set(extra) | ({"attn.out_proj.bias"} if bias == "all" else set())
    new = {k: v + 1 for k, v in state.items()}
    set_peft_model_state_dict(model, new)
    assert torch.equal(
        get_peft_model_state_dict(model)["base_model.model.lin0.base_layer.bias"],
        new["base_model.model.lin0.base_layer.bias"],
    )


def test_shared_containers_are_stored_once():
    model = get_peft_model(net(), VeraConfig(r=3, target_modules=["lin0", "a"]), adapter_name="v")
    keys = get_peft_model_state_dict(model, adapter_name="v")
    assert sorted(k for k in keys if "vera_A" in k or "vera_B" in k) == ["base_model.vera_A", "base_model.vera_B"]
    assert len(keys) == 6


def test_wrappers_of_training_frameworks_leave_no_trace():
    """FSDP puts a module between a module and its parent; regional compilation does too."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module, name: str):
            super().__init__()
            setattr(self, name, module)

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(next(iter(self._modules.values())), name)

    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["lin0", "a", "attn"], modules_to_save=["head"]))
    plain = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    base = model.base_model.model
    base.lin0 = Wrapper(base.lin0, "_fsdp_wrapped_module")
    base.block = Wrapper(base.block, "_orig_mod")
    outer = Wrapper(model, "_fsdp_wrapped_module")
    found = get_peft_model_state_dict(outer)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[k], v) for k, v in plain.items())
    gathered = {k: v + 1 for k, v in outer.state_dict().items()}  # with the infixes, as FSDP gives it
    assert any("_fsdp_wrapped_module" in k for k in gathered)
    picked = get_peft_model_state_dict(outer, state_dict=gathered)
    assert all(torch.equal(picked[k], v + 1) for k, v in plain.items())
    result = set_peft_model_state_dict(outer, picked)
    assert result.unexpected_keys == []
    assert all(torch.equal(v, plain[k] + 1) for k, v in get_peft_model_state_dict(outer).items())


def test_compiled_model():
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["lin0"], modules_to_save=["norm"]))
    compiled = torch.compile(model)
    plain = get_peft_model_state_dict(model)
    assert list(get_peft_model_state_dict(compiled)) == ["_orig_mod." + k for k in plain]
    assert list(get_peft_model_state_dict(compiled, unwrap_compiled=True)) == list(plain)
    for prefix in ("", "_orig_mod."):
        assert set_peft_model_state_dict(compiled, {prefix + k: v for k, v in plain.items()}).unexpected_keys == []


def test_given_state_dict_may_hold_only_a_part():
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["lin0"], modules_to_save=["norm"]))
    trained = {n: p.detach() * 2 for n, p in model.named_parameters() if p.requires_grad and "lora_A" in n}
    found = get_peft_model_state_dict(model, state_dict=trained)
    assert list(found) == ["base_model.model.lin0.lora_A.weight"]


def test_tuner_alone_and_unknown_name():
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["lin0"]))
    assert list(get_peft_model_state_dict(model.base_model)) == ["model.lin0.lora_A.weight", "model.lin0.lora_B.weight"]
    with pytest.raises(KeyError, match="nope"):
        get_peft_model_state_dict(model, adapter_name="nope")


def test_walk_is_cheap_and_knows_all_names():
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=LORA_TARGETS, modules_to_save=["norm"]))
    assert list(state_keys(model)) == list(model.state_dict())
    assert clean("_orig_mod.a._fsdp_wrapped_module.b._orig_mod.c") == "_orig_mod.a.b.c"
    for name in ("one", "two", "three"):
        model.add_adapter(name, LoraConfig(r=2, target_modules=["lin0"]))
    # the entries of an adapter do not depend on how many others there are
    assert len(adapter_entries(model, "two")) == 2


def test_base_modules_with_adapter_like_names_are_not_taken():
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["lin0"]))
    assert not any("lora_thing" in k for k in get_peft_model_state_dict(model))


def test_save_and_load_under_another_name(tmp_path):
    model = get_peft_model(
        net(), LoraConfig(r=2, target_modules=LORA_TARGETS, modules_to_save=["norm"]), adapter_name="b"
    )
    fill(model, "b")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path / "b", adapter_name="lora_B")
    with torch.no_grad():
        assert torch.equal(loaded(ids()), model.eval()(ids()))
    assert isinstance(loaded.get_base_model(), Net)
