# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes: 8-bit (vector-wise int8) and 4-bit (NF4, FP4) linear layers."""

import copy
from typing import Any

import torch
from torch import nn

from .base import QuantisedStorage, classes_from


class Int8Storage(QuantisedStorage):
    label = "bnb 8bit"

    def _scale(self, module: Any, weight: Any) -> torch.Tensor:
        """Row scales: on the weight until the first forward, then in the layer's state."""
        scale = getattr(weight, "SCB", None)
        return module.state.SCB if scale is None else scale

    def dequantise(self, module: Any, weight: Any) -> torch.Tensor:
        data, scale = weight
        return data.float() * (scale.float().view(-1, 1) / 127)

    def snapshot(self, module: Any, name: str = "weight") -> Any:
        return module.weight, self._scale(module, module.weight).clone()

    def restore(self, module: Any, saved: Any, name: str = "weight") -> nn.Module:
        module.weight, scale = saved
        module.state.reset_grads()
        module.weight.CB, module.weight.SCB = module.weight.data, scale
        return module

    def quantise(self, module: Any, value: torch.Tensor, name: str) -> nn.Module:
        import bitsandbytes as bnb

        old = module.weight
        fresh = bnb.nn.Int8Params(value.to("cpu"), requires_grad=False, has_fp16_weights=old.has_fp16_weights)  # type: ignore
        module.weight = fresh.to(old.device)  # type: ignore
        module.state.reset_grads()
        return module


class Int4Storage(QuantisedStorage):
    label = "bnb 4bit"

    def dequantise(self, module: Any, weight: Any) -> torch.Tensor:
        import bitsandbytes as bnb

        data, state = _plain_layout(weight)
        return bnb.functional.dequantize_4bit(data, state)  # type: ignore

    def quantise(self, module: Any, value: torch.Tensor, name: str) -> nn.Module:
        import bitsandbytes as bnb

        old = module.weight
        options = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        kept = {k: getattr(old, k) for k in options if hasattr(old, k)}
        fresh = bnb.nn.Params4bit(value.to("cpu"), requires_grad=False, **kept)  # type: ignore
        module.weight = fresh.to(old.device)  # type: ignore
        return module

    def guard(self, y: torch.Tensor) -> torch.Tensor:
        return y.clone()  # some kernels return a view that must not be changed in place


INT8, INT4 = Int8Storage(), Int4Storage()


def _plain_layout(weight: Any) -> tuple[torch.Tensor, Any]:
    """Data and quantisation state of a 4-bit weight in the layout that can be dequantised and differentiated."""
    state = weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return weight.data, state
    rows, columns = state.shape
    packed = weight.data.reshape(-1, 32)  # 32 rows at a time, one column in the low and one in the high halves
    codes = torch.cat([packed & 15, packed >> 4], -1).reshape(rows // 32, columns // 2, 32, 2)
    codes = codes.transpose(1, 2).reshape(-1)
    plain = copy.copy(state)
    plain.absmax = state.absmax.T.reshape(-1).float()
    plain.nested, plain.dtype, plain.packing_format_for_cpu = False, state.original_dtype, False
    data = ((codes[::2] << 4) | codes[1::2]).view(getattr(state, "original_storage_type", torch.uint8))
    return data.reshape(-1, 1), plain


def keep_differentiable(module: Any) -> None:
    """On some CPUs the first evaluation of a 4-bit layer packs its weight for a kernel without gradients, and training
    afterwards silently gets none through the layer: unpack it, and have it stay so.
    """
    if not getattr(module, "support_avx512bf16_for_cpu", False):
        return
    module.support_avx512bf16_for_cpu = False
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        module.weight.data, module.weight.quant_state = _plain_layout(module.weight)
        module.quant_state = module.weight.quant_state


def detect(module: nn.Module) -> QuantisedStorage | None:
    """By the class of the layer, not by a flag of the model, which may be missing."""
    names = classes_from("bitsandbytes", module)
    if "Linear8bitLt" in names and not getattr(module.weight, "has_fp16_weights", False):
        return INT8
    return INT4 if "Linear4bit" in names else None
