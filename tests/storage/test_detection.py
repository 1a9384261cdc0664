"""Layers that only their own kernel can use are found by package and class, and refuse by name what they cannot do."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.storage.formats import FORMATS, base, inc, inputs, installed, stand_in, te, te_mlp, torchao
from torch import nn

import peft
from peft.core import kinds
from peft.storage.base import resolve
from peft.storage.forward_only import DETECTORS
from peft.tuners import tuners_utils
from peft.utils.quantization_utils import resolve_quantization_backend

ALONE = ("eetq", "inc", "te")  # layers of the others may have a layout that `storage/packed.py` reads
NAMES = [(label, DETECTORS[label][0], name) for label in ALONE for name in DETECTORS[label][1]]


@pytest.mark.parametrize(("label", "package", "name"), NAMES)
def test_every_class_of_the_table(label: str, package: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, ModuleType(package))
    layer = stand_in(package, name)
    layer.in_features, layer.out_features = 3, 5
    storage = resolve(layer)
    assert (storage.label, storage.readable, storage.writable) == (label, False, False)
    assert kinds.kind_of(layer) is kinds.Linear and kinds.Linear.shape(layer) == (5, 3)
    backend = resolve_quantization_backend(layer)
    assert backend is not None and backend.backend_name == label and not backend.supports_merge
    for what in (storage.read, lambda m: storage.write(m, torch.ones(5, 3))):
        with pytest.raises(TypeError, match=f"{label} weight: only its own kernel"):
            what(layer)
    derived = type("Derived", (type(layer),), {"__module__": "elsewhere"})()
    assert resolve(derived).label == label
    assert resolve(stand_in("elsewhere", name)).label is None
    monkeypatch.delitem(sys.modules, package)
    assert resolve(layer).label is None


def two() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(8, 24), nn.Linear(24, 8)


@pytest.mark.parametrize("make", [lambda: inc(two()[0]), lambda: te(two()[0]), lambda: te_mlp(*two())])
def test_lora_sees_the_input_of_the_whole_module(make: Any) -> None:
    """Also where the module normalises it or is an MLP."""
    layer, x = make(), torch.randn(4, 8)
    plain, shape = layer(x), (8, 8 if "MLP" in type(layer).__name__ else 24)
    assert tuners_utils._get_in_out_features(layer) == shape
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(layer), config)
    adapted: Any = model.base_model.model[0]
    A, B = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    assert A.dtype == B.dtype == torch.float32 and (A.shape[1], B.shape[0]) == shape
    torch.testing.assert_close(model(x), plain + 2 * x @ A.T @ B.T)
    model(x).sum().backward()
    assert A.grad is not None and A.grad.abs().sum() > 0
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    label = resolve(layer).label
    assert adapted.quantization_backend == label
    with pytest.raises(TypeError, match=f"Cannot merge into a {label} weight"):
        model.merge_and_unload()
    assert torch.equal(model.unload()(x), plain)


def lora(layer: nn.Module) -> peft.PeftModel:
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    return peft.get_peft_model(nn.Sequential(layer), config)


def needed(package: str) -> None:
    if not installed(package):
        pytest.skip(f"{package} is missing")


WRITABLE = [name for name, fmt in FORMATS.items() if fmt.readable and fmt.writable]


@pytest.mark.parametrize("name", WRITABLE)
@pytest.mark.filterwarnings("ignore:.*rounds it again")
def test_the_pristine_weight_stays_readable_while_merged(name: str) -> None:
    needed(FORMATS[name].package)
    model = lora(base(name).lin0)
    layer: Any = model.base_model.model[0]
    pristine = layer.base_weight()
    model.merge_adapter()
    assert torch.equal(layer.base_weight(), pristine) and not torch.equal(layer._current_weight(), pristine)


@pytest.mark.filterwarnings("ignore:.*rounds it again")
def test_quanto_layers_that_are_not_frozen() -> None:
    """Their weight is an ordinary one, quantised in each forward."""
    needed("optimum.quanto")
    from optimum.quanto import QLinear, qint8

    dense = nn.Linear(32, 16)
    layer = QLinear.from_module(dense, weights=qint8)
    model, x = lora(layer), torch.randn(3, 32)
    adapted: Any = model.base_model.model[0]
    want = dense.weight + adapted.delta_weight("default")
    model.merge_adapter()
    assert not layer.frozen
    torch.testing.assert_close(layer.weight, want.detach())
    model.unmerge_adapter()
    assert torch.equal(layer.weight, dense.weight) and torch.equal(model.unload()(x), layer(x))


def test_torchao_formats_that_cannot_be_made_again() -> None:
    needed("torchao")
    layer = torchao("Int8DynamicActivationInt8WeightConfig")(nn.Linear(32, 32))
    model, x = lora(layer), torch.randn(3, 32)
    want = model(x)
    with pytest.raises(TypeError, match="Cannot quantise a Int8Tensor again: its torchao configuration is not known"):
        model.merge_adapter()
    assert torch.equal(model(x), want)


def test_aqlm_codes_that_were_turned_for_a_kernel() -> None:
    needed("aqlm")
    layer = FORMATS["aqlm"].make(nn.Linear(16, 32))
    weight = resolve(layer).read(layer)
    layer.codes.data = layer.codes.data.transpose(0, 1).contiguous()  # type: ignore[operator]
    assert torch.equal(resolve(layer).read(layer), weight)


@pytest.mark.filterwarnings("ignore:.*rounds it again")
def test_storages_that_make_a_new_layer_inside_of_two_adapters() -> None:
    needed("hqq")
    net, x = base("hqq"), inputs()
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["lin0"], init_lora_weights=False), mixed=True)
    model.add_adapter("b", peft.LoHaConfig(target_modules=["lin0"], init_weights=False))
    model.set_adapter(["default", "b"])
    want, layer, before = model(x), net.lin0, net.lin0.get_base_layer()
    model.merge_adapter()
    assert layer.get_base_layer() is layer.base_layer.base_layer is not before
    assert float((model(x) - want).norm() / want.norm()) < 0.2
    model.unmerge_adapter()
    assert layer.get_base_layer() is before and torch.equal(model(x), want)
