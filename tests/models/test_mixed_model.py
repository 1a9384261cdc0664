# SPDX-License-Identifier: Apache-2.0
"""PeftMixedModel: any two layer methods in one model."""

import copy
import itertools

import pytest
import torch
from torch import nn

import peft
from peft import (
    HiraConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftMixedModel,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
)

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "lora": lambda *t: LoraConfig(target_modules=list(t), r=2, init_lora_weights=False),
    "ia3": lambda *t: IA3Config(target_modules=list(t), feedforward_modules=[], init_ia3_weights=False),
    "oft": lambda *t: OFTConfig(target_modules=list(t), oft_block_size=4, init_weights=False),
    "hira": lambda *t: HiraConfig(target_modules=list(t), r=2),  # needs the pristine base weight
    "vera": lambda *t: VeraConfig(target_modules=list(t), r=2, init_weights=False),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin0, self.lin1, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.lin1(torch.relu(self.lin0(x))))


def mixed(first="lora", second="oft", **kwargs):
    model = get_peft_model(Net(), CONFIGS[first]("lin0"), adapter_name="m0", mixed=True, **kwargs)
    model.add_adapter("m1", CONFIGS[second]("lin0", "lin1"))
    return model.eval()


def randomise(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".m0" in name or ".m1" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def trained(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def of(model, name):
    return {n for n, _ in model.named_parameters() if f".{name}." in n or n.endswith(f".{name}")}


@pytest.mark.parametrize(("first", "second"), itertools.permutations(CONFIGS, 2))
def test_pairs_of_methods(first, second):
    model = randomise(mixed(first, second))
    assert isinstance(model, PeftMixedModel) and model.active_adapters == ["m0"] == model.active_adapter
    assert trained(model) == of(model, "m0")
    outs = {}
    for names in (["m0"], ["m1"], ["m0", "m1"]):
        model.set_adapter(names)
        assert model.active_adapters == names
        assert trained(model) == set().union(*(of(model, n) for n in names))
        outs[len(outs)] = model(X)
    assert all(not torch.allclose(outs[a], outs[b], atol=1e-4) for a, b in ((0, 1), (0, 2), (1, 2)))
    with model.disable_adapter():
        assert torch.equal(model(X), Net()(X)) and not trained(model)
    assert torch.equal(model(X), outs[2])
    model.merge_adapter()
    assert torch.allclose(model(X), outs[2], atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(model(X), outs[2], atol=1e-5)
    base = model.merge_and_unload()
    assert type(base.lin0) is nn.Linear and torch.allclose(base(X), outs[2], atol=1e-5)


def test_each_alone_equals_its_own_model():
    model = randomise(mixed("lora", "vera"))
    for name, config, targets in (("m0", "lora", ["lin0"]), ("m1", "vera", ["lin0", "lin1"])):
        single = get_peft_model(Net(), CONFIGS[config](*targets), adapter_name=name).eval()
        values = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
        for n, p in single.named_parameters():
            if f".{name}" in n:
                p.data.copy_(values[n])
        model.set_adapter(name)
        assert torch.allclose(model(X), single(X), atol=1e-6)


def test_delete_and_errors():
    model = mixed()
    with pytest.raises(ValueError, match=r"\['x'\] not found, available adapters: \['m0', 'm1'\]"):
        model.set_adapter(["x", "m1"])
    with pytest.raises(ValueError, match="not found"):
        model.delete_adapter("x")
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("m1", CONFIGS["oft"]("lin1"))
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`.*LORA"):
        model.add_adapter("p", PrefixTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ValueError, match="not compatible"):
        get_peft_model(Net(), PrefixTuningConfig(num_virtual_tokens=2), mixed=True)
    for function, error in (
        (lambda: model.save_pretrained("nowhere"), NotImplementedError),
        (lambda: model.create_or_update_model_card("nowhere"), NotImplementedError),
        (lambda: model.add_weighted_adapter(["m0"], [1.0], "w"), NotImplementedError),
        (lambda: model.get_base_model, AttributeError),
    ):
        with pytest.raises(error):
            function()
    config = LoraConfig(target_modules=["nothing"])
    values = copy.deepcopy(vars(config))
    with pytest.raises(ValueError):
        model.add_adapter("n", config)
    assert vars(config) == values and list(model.peft_config) == ["m0", "m1"]
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("m0")
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Setting active adapter to m1"):
        model.delete_adapter(["m0"])
    assert model.active_adapters == ["m1"] and not of(model, "m0") and trained(model) == of(model, "m1")


def test_targets_do_not_depend_on_the_order():
    for order in (("lora", "ia3"), ("ia3", "lora")):
        model = get_peft_model(Net(), CONFIGS[order[0]]("lin1"), adapter_name="m0", mixed=True)
        config = CONFIGS[order[1]]()
        config.target_modules = r"lin\d"  # a regex for the whole name, as in the first adapter
        model.add_adapter("m1", config)
        assert sorted(set(model.targeted_module_names)) == ["lin0", "lin1"]


def test_shared_tensors_and_modules_to_save():
    model = get_peft_model(Net(), LoraConfig(target_modules=["lin0"], modules_to_save=["head"]), mixed=True)
    model.add_adapter("v", CONFIGS["vera"]("lin0", "lin1"))
    assert {"base_model.vera_A.v", "base_model.vera_B.v"} <= set(model.state_dict())
    assert model.modules_to_save == {"head"} and model.config == {"model_type": "custom"}
    model.delete_adapter("v")
    assert not any("vera_A" in n for n in model.state_dict())
    other = copy.deepcopy(model)
    assert torch.equal(other.eval()(X), model.eval()(X))


def test_mixed_batch_over_methods():
    model = randomise(mixed("lora", "ia3"))
    want = {"__base__": Net()(X)}
    for name in ("m0", "m1"):
        model.set_adapter(name)
        want[name] = model(X)
    names = ["m1", "__base__", "m0", "m1"]
    got = model(X, adapter_names=names)
    for i, name in enumerate(names):
        assert torch.allclose(got[i], want[name][i], atol=1e-6)


def test_loading(tmp_path):
    single = get_peft_model(Net(), CONFIGS["lora"]("lin0", "lin1")).eval()
    single.save_pretrained(tmp_path / "lora")
    oft = get_peft_model(Net(), CONFIGS["oft"]("lin0")).eval()
    oft.save_pretrained(tmp_path / "oft")
    model = PeftMixedModel.from_pretrained(Net(), tmp_path / "oft", adapter_name="o")
    assert isinstance(model, PeftMixedModel) and not trained(model) and not model.training
    assert torch.allclose(model(X), oft(X), atol=1e-6)
    result = model.load_adapter(tmp_path / "lora", "l")
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert model.active_adapters == ["o"] and not trained(model)
    model.set_adapter("l")
    assert torch.allclose(model(X), single(X), atol=1e-6)
    # The same with LoRA inside: its layers are one level down, which files do not know.
    model = PeftMixedModel.from_pretrained(Net(), tmp_path / "lora", adapter_name="l", is_trainable=True)
    assert trained(model) == of(model, "l")
    model.add_adapter("i", CONFIGS["ia3"]("lin0"))
    model.eval().load_adapter(tmp_path / "lora", "l")
    model.set_adapter("l")
    assert torch.allclose(model(X), single(X), atol=1e-6)


def test_published_mapping():
    assert "LORA" in peft.PEFT_TYPE_TO_MIXED_MODEL_MAPPING and "VERA" not in peft.PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    assert peft.tuners.MixedModel is peft.tuners.mixed.MixedModel


def test_generate_counts_and_unload():
    from tests.models.prompt_models import IDS, base

    targets = {"target_modules": ["q_proj"]}
    model = get_peft_model(base("llama"), LoraConfig(r=2, init_lora_weights=False, **targets), mixed=True)
    model.add_adapter("two", HiraConfig(r=2, init_weights=False, **targets))
    model.set_adapter(["default", "two"])
    own = sum(p.numel() for n, p in model.named_parameters() if ".default." in n or ".two." in n or n.endswith(".two"))
    assert model.get_nb_trainable_parameters() == (own, sum(p.numel() for p in model.parameters()))
    call = {"input_ids": IDS[1:], "max_new_tokens": 4, "do_sample": False}
    want = model.eval().base_model.model.generate(**call)
    assert torch.equal(model.generate(**call), want)
    plain = model.unload()
    assert type(plain).__name__ == "LlamaForCausalLM" and not any("lora" in n for n, _ in plain.named_modules())
    assert torch.equal(plain.generate(**call), base("llama").generate(**call))
