# SPDX-License-Identifier: Apache-2.0
"""HQQ linear layers: half-quadratic quantisation. Writing makes a new layer with the same settings."""

import copy
from typing import Any

import torch
from torch import nn

from .base import QuantisedStorage, classes_from


class HqqStorage(QuantisedStorage):
    label = "hqq"

    def dequantise(self, module: Any, weight: Any) -> torch.Tensor:
        return weight.dequantize()

    def quantise(self, module: Any, value: torch.Tensor, name: str) -> nn.Module:
        kept = {k: getattr(module, k) for k in ("compute_dtype", "device") if hasattr(module, k)}
        settings = {**copy.deepcopy(module.quant_config), "offload_meta": getattr(module, "offload_meta", False)}
        fresh = type(module)(None, settings, **kept)  # takes offload_meta out of the settings
        fresh.quantize(value.to(module.compute_dtype), **fresh.quant_config)
        fresh.bias = module.bias
        fresh.in_features, fresh.out_features = module.in_features, module.out_features
        return fresh

    def snapshot(self, module: Any, name: str = "weight") -> Any:
        return module

    def restore(self, module: Any, saved: Any, name: str = "weight") -> nn.Module:
        return saved


HQQ = HqqStorage()


def detect(module: nn.Module) -> HqqStorage | None:
    return HQQ if "HQQLinear" in classes_from("hqq", module) else None
