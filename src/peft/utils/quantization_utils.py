# SPDX-License-Identifier: Apache-2.0
"""Published view of `peft.storage`: backend objects that read and write the base weight of a wrapped layer."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from ..storage.base import WeightStorage, resolve
from ..storage.forward_only import DETECTORS
from ..storage.torchao import TorchaoStorage

LayerType = Literal["linear", "embedding", "conv2d"]


class QuantizationBackend:
    """Base of the backends. `supports_merge`: the weight can be read and written."""

    layer_type: LayerType
    supports_merge: bool = False
    backend_name: str = ""

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """The weight of the base layer as floats, in the orientation in which the layer stores it."""
        raise NotImplementedError(f"{type(self).__name__} does not implement get_base_weight")

    def set_base_weight(self, peft_layer: Any, weight_data: torch.Tensor) -> None:
        """Store a weight in the base layer of `peft_layer`; it may get a new base layer."""
        raise NotImplementedError(f"{type(self).__name__} does not implement set_base_weight")

    def maybe_clone_base_result(self, x: torch.Tensor) -> torch.Tensor:
        """The base output, cloned where a kernel returns a view that is unsafe to add to."""
        return x


class _StorageBackend(QuantizationBackend):
    """A backend that passes everything on to the storage of the layer."""

    layer_type: LayerType = "linear"
    supports_merge: bool = True

    def _storage(self, base_layer: nn.Module) -> WeightStorage:
        return resolve(base_layer)

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        return self._storage(base_layer).read(base_layer)

    def set_base_weight(self, peft_layer: Any, weight_data: torch.Tensor) -> None:
        base_layer = peft_layer.get_base_layer()
        written = self._storage(base_layer).write(base_layer, weight_data)
        if written is not base_layer:
            peft_layer.base_layer = written


class Bnb8bitBackend(_StorageBackend):
    backend_name = "bnb 8bit"


class Bnb4bitBackend(_StorageBackend):
    backend_name = "bnb 4bit"

    def maybe_clone_base_result(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


class HqqBackend(_StorageBackend):
    backend_name = "hqq"


class TorchaoBackend(_StorageBackend):
    backend_name = "torchao"

    def __init__(self, get_apply_tensor_subclass: Callable[[], Any]):
        self.get_apply_tensor_subclass = get_apply_tensor_subclass

    def _storage(self, base_layer: nn.Module) -> WeightStorage:
        return TorchaoStorage(self.get_apply_tensor_subclass())

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        weight = base_layer.weight
        if type(weight) is nn.Parameter and type(weight.data) is torch.Tensor:
            return weight
        if not hasattr(weight, "dequantize"):
            raise NotImplementedError(
                f"Weights of type {type(weight).__name__} cannot be dequantised yet, so that merging is not possible."
            )
        return super().get_base_weight(base_layer)


class ForwardOnlyQuantizationBackend(QuantizationBackend):
    """A format that only its own kernel can use (aqlm, eetq, gptq, awq, inc, te)."""

    layer_type: LayerType = "linear"

    def __init__(self, backend_name: str = "") -> None:
        self.backend_name = backend_name

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        raise TypeError(self._unsupported("Dequantization"))

    def set_base_weight(self, peft_layer: Any, weight_data: torch.Tensor) -> None:
        raise TypeError(self._unsupported("Requantization"))

    def _unsupported(self, what: str) -> str:
        return f"{what} is not supported for {self.backend_name} layers. Merging/unmerging is not available."


def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> QuantizationBackend | None:
    """The backend of a base layer, None when it is not quantised. torchao needs `get_apply_tensor_subclass`."""
    storage = resolve(base_layer)
    label = getattr(storage, "label", None)
    if label is None:
        return None
    if label == TorchaoBackend.backend_name:
        getter = kwargs.get("get_apply_tensor_subclass")
        if getter is None:
            raise ValueError(
                "A torchao layer needs `get_apply_tensor_subclass`, the function that quantises it after merging; pass"
                " what `get_quantization_kwargs(model)` returns."
            )
        return TorchaoBackend(getter)
    known = {cls.backend_name: cls for cls in (Bnb8bitBackend, Bnb4bitBackend, HqqBackend)}
    if label in known:
        return known[label]()
    return ForwardOnlyQuantizationBackend(label) if label in DETECTORS else None


def get_quantization_kwargs(model: Any) -> dict[str, Any]:
    """What writing to quantised layers of this model needs: torchao's `get_apply_tensor_subclass`, if there is one."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    getter = getattr(config, "get_apply_tensor_subclass", None)
    return {} if getter is None else {"get_apply_tensor_subclass": getter}


def quantization_extra_repr(module: nn.Module) -> str:
    """`quantization_backend='...'` for the repr of a layer on a quantised base, else nothing."""
    backend = getattr(module, "quantization_backend", None)
    name = getattr(backend, "backend_name", backend)
    return "" if name is None else f"quantization_backend={name!r}"
