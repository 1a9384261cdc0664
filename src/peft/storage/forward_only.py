# SPDX-License-Identifier: Apache-2.0
"""Storages whose weight only their own kernel can use: adapters work on activations, merging is refused by name."""

import sys
from typing import Any

import torch
from torch import nn

# label -> (package that must be imported, class names of its linear layers). GPTQ last: AWQ layers share its base
# class.
DETECTORS: dict[str, tuple[str, tuple[str, ...]]] = {
    "aqlm": ("aqlm", ("QuantizedLinear",)),
    "eetq": ("eetq", ("EetqLinear",)),
    "awq": ("gptqmodel", ("AwqGEMMQuantLinear", "AWQuantLinear", "AwqTorchQuantLinear", "WQLinear_GEMM")),
    "gptq": ("gptqmodel", ("BaseQuantLinear",)),
    "inc": ("neural_compressor", ("PatchedLinear",)),
    "te": ("transformer_engine", ("Linear", "LayerNormLinear")),
}


class ForwardOnlyStorage:
    readable = False
    writable = False

    def __init__(self, label: str):
        self.label: str | None = label

    def _refuse(self, what: str) -> TypeError:
        return TypeError(
            f"Cannot {what} a {self.label} weight: only its own kernel can use it. Load the base model unquantised "
            "to merge."
        )

    def read(self, module: nn.Module, name: str = "weight") -> torch.Tensor:
        raise self._refuse("read")

    def write(self, module: nn.Module, value: torch.Tensor, name: str = "weight") -> nn.Module:
        raise self._refuse("write")

    def add_(self, module: nn.Module, delta: torch.Tensor, name: str = "weight") -> nn.Module:
        raise self._refuse("merge into")

    def snapshot(self, module: nn.Module, name: str = "weight") -> Any:
        raise self._refuse("merge into")

    def restore(self, module: nn.Module, saved: Any, name: str = "weight") -> nn.Module:
        raise self._refuse("write")

    def thaw(self, saved: Any, module: nn.Module) -> torch.Tensor:
        raise self._refuse("read")

    def guard(self, y: torch.Tensor) -> torch.Tensor:
        return y


_STORAGES = {label: ForwardOnlyStorage(label) for label in DETECTORS}


def detect(module: nn.Module) -> ForwardOnlyStorage | None:
    if isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__module__.startswith("torch."):
        return None
    for label, (package, names) in DETECTORS.items():
        if package in sys.modules and any(
            c.__name__ in names and c.__module__.split(".")[0] == package for c in type(module).__mro__
        ):
            return _STORAGES[label]
    return None
