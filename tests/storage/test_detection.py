"""Layers that only their own kernel can use are found by package and class, and refuse by name what they cannot do."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.storage.formats import inc, stand_in, te, te_mlp
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
