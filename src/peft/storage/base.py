# SPDX-License-Identifier: Apache-2.0
"""How a base weight is held in memory: `WeightStorage`, what quantised formats share, and `resolve()`.

Only this folder writes base tensors. Tensors are in storage orientation here; `core/kinds.py` turns them into
canonical [out, in, *kernel].
A storage is asked only for packages that the user has imported already.
"""

import importlib
import sys
import warnings
from typing import Any

import torch
from torch import nn

from . import dtensor

# Package in sys.modules -> storage module that knows its layers. Looked at in this order.
_PACKAGES: dict[str, str] = {
    "bitsandbytes": "bnb",
    "hqq": "hqq",
    "torchao": "torchao",
    "optimum.quanto": "quanto",
    "gptqmodel": "packed",
    "aqlm": "packed",
}


class WeightStorage:
    """Access to one weight of a base module: here an ordinary floating-point parameter, formats override it.

    `name` is the attribute ("weight", "in_proj_weight", ...).
    """

    label: str | None = None
    readable = True
    writable = True

    def read(self, module: nn.Module, name: str = "weight") -> torch.Tensor:
        """The weight as a float tensor in storage orientation (no copy when dense)."""
        weight = getattr(module, name)
        if weight.numel() == 0 and hasattr(weight, "ds_id"):
            with dtensor.gathered([weight]):
                return weight.detach().clone()
        return dtensor.whole(weight) if hasattr(weight, "placements") else weight

    @torch.no_grad()
    def write(self, module: nn.Module, value: torch.Tensor, name: str = "weight") -> nn.Module:
        """Store `value`; returns the base module to use from now on (mostly the same object)."""
        weight = getattr(module, name)
        if weight.dtype != value.dtype and weight.dtype.itemsize == 1:  # casting to float8 does not stop at its limits
            limits = torch.finfo(weight.dtype)
            value = value.clamp(limits.min, limits.max)
        with dtensor.gathered([weight]):
            dtensor.put(weight, value)
        return module

    @torch.no_grad()
    def add_(self, module: nn.Module, delta: torch.Tensor, name: str = "weight") -> nn.Module:
        """Add `delta` to the weight, in place when dense."""
        weight = getattr(module, name).data
        if weight.dtype.itemsize == 1:
            return self.write(module, self.read(module, name).to(delta.dtype) + delta, name)
        dtensor.local(weight).add_(dtensor.like(delta, weight))
        return module

    def snapshot(self, module: nn.Module, name: str = "weight") -> Any:
        """A copy (on the CPU) from which `restore` brings the weight back bit by bit."""
        return getattr(module, name).detach().to("cpu", copy=True)

    def restore(self, module: nn.Module, saved: Any, name: str = "weight") -> nn.Module:
        return self.write(module, saved, name)

    def thaw(self, saved: Any, module: nn.Module) -> torch.Tensor:
        """The float weight that a snapshot holds, on the device of `module`."""
        return dtensor.whole(saved.to(next(module.parameters()).device))

    def guard(self, y: torch.Tensor) -> torch.Tensor:
        """The base output, cloned where a kernel returns a view that is unsafe to add to."""
        return y


class QuantisedStorage(WeightStorage):
    """What formats share: writing quantises again (and so rounds), the copy that unmerging needs is the old quantised
    weight itself.
    """

    def dequantise(self, module: Any, weight: Any) -> torch.Tensor:
        """The float weight that `weight`, an attribute of the module now or before, stands for."""
        raise NotImplementedError(f"{type(self).__name__} does not implement dequantise")

    def quantise(self, module: Any, value: torch.Tensor, name: str) -> nn.Module:
        """Store a float weight; returns the base module to use from now on."""
        raise self.refusal("write")

    def refusal(self, what: str) -> TypeError:
        return TypeError(
            f"Cannot {what} a {self.label} weight: only its own kernel can use it. Load the base model unquantised "
            "to merge."
        )

    def read(self, module: nn.Module, name: str = "weight") -> torch.Tensor:
        with torch.no_grad():
            return self.dequantise(module, self.snapshot(module, name))

    @torch.no_grad()
    def write(self, module: nn.Module, value: torch.Tensor, name: str = "weight") -> nn.Module:
        if self.writable:
            warnings.warn(
                f"Merging into a {self.label} weight rounds it again: outputs may differ slightly.", stacklevel=6
            )
        return self.quantise(module, value.detach(), name)

    def snapshot(self, module: nn.Module, name: str = "weight") -> Any:
        return getattr(module, name)

    def restore(self, module: nn.Module, saved: Any, name: str = "weight") -> nn.Module:
        setattr(module, name, saved)
        return module

    def thaw(self, saved: Any, module: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return self.dequantise(module, saved)


DENSE = WeightStorage()
_DENSE_TYPES = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.LayerNorm, nn.MultiheadAttention}


def resolve(module: nn.Module) -> WeightStorage:
    """The storage of a base module's weight."""
    weight = module._parameters.get("weight")
    if type(module) in _DENSE_TYPES and (
        weight is None or type(weight) is nn.Parameter and type(weight.data) is torch.Tensor
    ):
        return DENSE
    homes = [home for package, home in _PACKAGES.items() if package in sys.modules]
    for home in (*homes, "forward_only"):  # last: layers whose weights can only be used by their own kernel
        found = importlib.import_module(f"{__package__}.{home}").detect(module)
        if found is not None:
            return found
    return DENSE


def classes_from(package: str, instance: Any) -> set[str]:
    """Names of the classes of an object that come from a package."""
    return {c.__name__ for c in type(instance).__mro__ if f"{c.__module__}.".startswith(f"{package}.")}


def open_model(model: nn.Module) -> None:
    """Decompress a compressed-tensors model, as its own first forward would do by a hook of the whole model: layers
    have no weight before, ordinary dense ones afterwards.
    """
    for hook in tuple(model._forward_pre_hooks.values()):
        if getattr(hook, "__name__", "") == "ct_decompress_hook":
            hook(model, ())


def is_quantised(module: nn.Module) -> bool:
    """Whether the module is a linear layer of a quantisation package (whatever its class is called)."""
    return resolve(module).label is not None
