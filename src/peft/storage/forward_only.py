# SPDX-License-Identifier: Apache-2.0
"""Storages whose weight only their own kernel can use: adapters work on activations, merging is refused by name."""

import sys
from typing import Any

from torch import nn

from .base import QuantisedStorage, classes_from

# label -> (package that must be imported, class names of its linear layers). GPTQ last: AWQ layers share its base
# class. `packed` comes first and takes the layers of these packages that keep a documented layout.
DETECTORS: dict[str, tuple[str, tuple[str, ...]]] = {
    "aqlm": ("aqlm", ("QuantizedLinear",)),
    "eetq": ("eetq", ("EetqLinear",)),
    "awq": ("gptqmodel", ("AwqGEMMQuantLinear", "AWQuantLinear", "AwqTorchQuantLinear", "WQLinear_GEMM")),
    "gptq": ("gptqmodel", ("BaseQuantLinear",)),
    "inc": ("neural_compressor", ("PatchedLinear",)),
    "te": ("transformer_engine", ("Linear", "LayerNormLinear", "LayerNormMLP")),
}


class ForwardOnlyStorage(QuantisedStorage):
    readable = False
    writable = False

    def __init__(self, label: str):
        self.label = label

    def snapshot(self, module: nn.Module, name: str = "weight") -> Any:
        raise self.refusal("read")  # some have no attribute of that name


_STORAGES = {label: ForwardOnlyStorage(label) for label in DETECTORS}


def label_of(module: nn.Module) -> str | None:
    """The format of a layer of one of these packages."""
    if isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__module__.startswith("torch."):
        return None
    for label, (package, names) in DETECTORS.items():
        if package in sys.modules and classes_from(package, module).intersection(names):
            return label
    return None


def detect(module: nn.Module) -> ForwardOnlyStorage | None:
    return _STORAGES.get(label_of(module) or "")
