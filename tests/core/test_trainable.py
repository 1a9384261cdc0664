"""Gradients of base and adapters, bias modes, dtype casting, switching and deleting in plain models, offloading."""

import dataclasses

import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.core import trainable
from peft.core.offload import copy_module, onload_layer
from peft.tuners.lora import Linear, LoraLayer, LoraModel


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(4, 4)
        self.lin1 = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lin1(torch.relu(self.lin0(x))))


def on(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("none", set()),
        ("lora_only", {"lin0.base_layer.bias"}),
        ("all", {"lin0.base_layer.bias", "lin1.bias"}),
    ],
)
def test_bias_modes(bias, expected):
    config = LoraConfig(target_modules=["lin0"], bias=bias, modules_to_save=["head"])
    model = get_peft_model(Net(), config)
    saved = {"head.modules_to_save.default.weight", "head.modules_to_save.default.bias"}
    assert {n.removeprefix("base_model.model.") for n in on(model)} == expected | saved


def test_biases_of_one_adapter():
    model = get_peft_model(Net(), LoraConfig(target_modules=["lin0"], bias="all"))
    model.add_adapter("plain", LoraConfig(target_modules=["lin0"]))
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        model.add_adapter("more", LoraConfig(target_modules=["lin0"], bias="lora_only"))
    assert list(model.peft_config) == ["default", "plain"]
    model.set_adapter("plain")
    assert {n.removeprefix("base_model.model.") for n in on(model)} == {
        "lin0.base_layer.bias",
        "lin1.bias",
        "head.bias",
    }
    assert not any("bias" in key for key in get_peft_model_state_dict(model, adapter_name="plain"))


def test_unknown_bias_mode_changes_nothing():
    base = Net()
    with pytest.raises(NotImplementedError, match="Requested bias"):
        get_peft_model(base, LoraConfig(target_modules=["lin0"], bias="some"))
    assert all(p.requires_grad for p in base.parameters()) and type(base.lin0) is nn.Linear


def test_adding_an_adapter_keeps_what_was_set_by_hand():
    model = get_peft_model(Net(), LoraConfig(target_modules=["lin0"]), "a")
    inner = model.base_model.model
    inner.head.weight.requires_grad_(True)
    inner.lin0.lora_A["a"].weight.requires_grad_(False)
    model.add_adapter("b", LoraConfig(target_modules=["lin0", "lin1"]))
    assert inner.head.weight.requires_grad and not inner.lin0.lora_A["a"].weight.requires_grad
    assert inner.lin0.lora_B["a"].weight.requires_grad
    assert not inner.lin0.lora_A["b"].weight.requires_grad and not inner.lin1.lora_A["b"].weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_to_float32(dtype):
    config = LoraConfig(target_modules=["lin0"], modules_to_save=["head"])
    model = inject_adapter_in_model(config, Net().to(dtype))
    assert model.lin0.lora_A["default"].weight.dtype == dtype
    trainable.cast_adapter_dtype(model, "default", autocast_adapter_dtype=False)
    assert model.lin0.lora_A["default"].weight.dtype == dtype
    trainable.cast_adapter_dtype(model, "default")
    assert model.lin0.lora_A["default"].weight.dtype == torch.float32
    assert model.lin0.weight.dtype == model.head.modules_to_save["default"].weight.dtype == dtype
    assert model.lin0.lora_A["default"].weight.requires_grad


def plain() -> nn.Module:
    model = inject_adapter_in_model(LoraConfig(target_modules=["lin0"], modules_to_save=["head"]), Net(), "a")
    return inject_adapter_in_model(LoraConfig(target_modules=["lin0", "lin1"]), model, "b")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_set_adapter_on_a_plain_model():
    model = plain()
    trainable.set_adapter(model, "a")
    assert model.lin0.active_adapters == ["a"] and model.head.active_adapter == "a"
    assert model.lin0._local is None and model.head._local is None
    assert model.lin0.lora_A["a"].weight.requires_grad and not model.lin0.lora_A["b"].weight.requires_grad
    trainable.set_adapter(model, ["a", "b"], inference_mode=True)
    assert model.lin0.active_adapters == ["a", "b"] and not any(p.requires_grad for p in model.parameters())
    trainable.set_requires_grad(model, "a")
    assert model.lin0.lora_A["a"].weight.requires_grad and model.head.modules_to_save["a"].weight.requires_grad
    assert not model.lin1.lora_A["b"].weight.requires_grad


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_delete_adapter_from_a_plain_model():
    model = plain()
    trainable.set_adapter(model, "b")
    with pytest.warns(UserWarning, match="now deleted"):
        left = trainable.delete_adapter(model, "b", prefix="lora_")
    assert left == ["a"]
    assert model.lin0.active_adapters == ["a"] and model.lin1.active_adapters == ["a"]
    assert model.head.active_adapter == "a" and not any(".b." in n for n, _ in model.named_parameters())
    assert trainable.delete_adapter(model, "a", prefix="lora_") == []
    model(torch.ones(1, 4))
    assert trainable.delete_adapter(Net(), "a") is None


def offloaded(layer: nn.Module) -> nn.Module:
    hooks = pytest.importorskip("accelerate.hooks")
    weights = {k: v.clone() for k, v in layer.state_dict().items()}
    hook = hooks.AlignDevicesHook("cpu", offload=True, weights_map=weights)
    hooks.add_hook_to_module(layer, hook)
    assert layer.weight.device.type == "meta"
    return layer


def test_onloaded_changes_are_kept():
    layer = offloaded(nn.Linear(3, 3))
    before = layer(torch.eye(3)).detach()
    with onload_layer(layer):
        layer.weight.data.add_(1)
    assert layer.weight.device.type == "meta"
    torch.testing.assert_close(layer(torch.eye(3)), before + 1)


def test_copies_of_offloaded_modules_are_real_and_apart():
    layer = offloaded(nn.Linear(3, 3))
    copied = copy_module(layer)
    assert copied.weight.device.type == "cpu"
    torch.testing.assert_close(copied(torch.eye(3)), layer(torch.eye(3)))
    copied.weight.data.zero_()
    assert (copied(torch.eye(3)) - copied.bias).abs().max() == 0
    assert layer(torch.eye(3)).abs().max() > 0


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_one_layer_alone():
    """Switching, merging and deleting on a layer; the others do not notice."""
    model = plain()
    lin0 = model.lin0
    lin0.set_adapter("a")
    lin0.delete_adapter("nope")
    with pytest.warns(UserWarning, match="Adapter a was active which is now deleted. Setting active adapter to b"):
        lin0.delete_adapter("a")
    assert lin0.active_adapters == lin0.adapter_names == ["b"] and lin0.lora_A["b"].weight.requires_grad
    lin0.delete_adapter("b")
    assert lin0.active_adapters == lin0.adapter_names == []
    assert model.lin1.adapter_names == ["b"]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_the_published_attributes_of_a_layer_can_be_set():
    lin0 = plain().lin0
    lin0.lora_B["b"].weight.data.fill_(1.0)
    x, base = torch.ones(1, 4), lin0.base_layer(torch.ones(1, 4))
    lin0._active_adapter = "b"
    assert lin0._active_adapter == ["b"] and (lin0(x) - base).abs().max() > 1e-3
    lin0._disable_adapters = True
    assert lin0._disable_adapters and torch.equal(lin0(x), base) and lin0._active_adapter == ["b"]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_switching_a_merged_layer_takes_the_adapter_out():
    lin0 = plain().lin0
    before = lin0.weight.clone()
    lin0.lora_B["a"].weight.data.fill_(1.0)
    lin0.merge(adapter_names=["a"])
    assert not torch.equal(lin0.weight, before)
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        lin0.set_adapter("b")
    assert torch.equal(lin0.weight, before) and lin0.active_adapters == ["b"]


def test_layers_that_a_method_does_not_know():
    said = "lora cannot adapt a LayerNorm, only Linear, Conv1D,"
    tuner = LoraModel(Net(), LoraConfig(target_modules=["lin0"]), "a")
    for call in (
        lambda: Linear(nn.LayerNorm(4), "a", LoraConfig()),
        lambda: LoraLayer.wrap(nn.LayerNorm(4), tuner.switch),
        lambda: tuner.target_shape(nn.LayerNorm(4)),
    ):
        with pytest.raises(TypeError, match=said):
            call()
    with pytest.raises(ValueError, match=r"Adapter b does not exist; there are \['a'\]"):
        tuner.delete_adapter("b")


def test_model_configurations_of_any_form():
    transformers = pytest.importorskip("transformers")

    @dataclasses.dataclass
    class Configuration:
        model_type: str = "gpt2"

    for config in (Configuration(), {"model_type": "gpt2"}, transformers.GPT2Config()):
        model = nn.ModuleDict({"c_attn": nn.Linear(4, 4)})
        model.config = config
        assert LoraModel(model, LoraConfig(), "a").targeted_module_names == ["c_attn"]
    made = LoraModel.__new__(LoraModel)  # as while a copy is made
    nn.Module.__init__(made)
    with pytest.raises(AttributeError, match="model"):
        _ = made.anything
