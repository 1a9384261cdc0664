# SPDX-License-Identifier: Apache-2.0
"""optimum-quanto: quantised tensor subclasses inside its own linear layers, frozen (the usual state) or not."""

from typing import Any

import torch
from torch import nn

from .base import QuantisedStorage, classes_from


class QuantoStorage(QuantisedStorage):
    label = "quanto"

    def dequantise(self, module: Any, weight: Any) -> torch.Tensor:
        return weight.dequantize()  # ordinary tensors, of layers that are not frozen, have it too

    def quantise(self, module: Any, value: torch.Tensor, name: str) -> nn.Module:
        frozen = module.frozen
        module.weight = nn.Parameter(value.to(module.weight.dtype), requires_grad=False)
        if frozen:
            module.freeze()
            module.weight.requires_grad_(False)
        return module


QUANTO = QuantoStorage()


def detect(module: nn.Module) -> QuantoStorage | None:
    ours = isinstance(module, nn.Linear) and "QModuleMixin" in classes_from("optimum.quanto", module)
    return QUANTO if ours else None
