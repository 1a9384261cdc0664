# SPDX-License-Identifier: Apache-2.0
"""Tensor operations in the form that transformers' weight loader runs. Imported only when transformers is in use."""

from typing import Any

import torch
from transformers.core_model_loading import Concatenate, ConversionOps

from .experts import fold_b


def _single(input_dict: dict[str, Any]) -> torch.Tensor:
    value = next(iter(input_dict.values()))
    return value[0] if isinstance(value, list) else value


class PermuteDims(ConversionOps):
    """tensor.permute(dims)"""

    def __init__(self, dims: tuple[int, ...]):
        self.dims = dims

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        return {target_patterns[0]: _single(input_dict).permute(*self.dims)}

    @property
    def reverse_op(self) -> ConversionOps:
        return PermuteDims(tuple(self.dims.index(i) for i in range(len(self.dims))))


class FlattenDims(ConversionOps):
    """Merge neighbouring dimensions (one dimension: flatten from there to the end)."""

    def __init__(self, dims: int | tuple[int, ...]):
        self.dims = dims

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        tensor = _single(input_dict)
        flat = tensor.flatten(self.dims) if isinstance(self.dims, int) else tensor.flatten(self.dims[0], self.dims[-1])
        return {target_patterns[0]: flat.contiguous()}


class PeftConcatenate(Concatenate):
    """lora_B of fused projections: block diagonal for each expert, experts folded into the columns. [out * n, rank * n
    * experts]
    """

    @torch.no_grad()
    def convert(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        stacks = [input_dict.pop(p) for p in source_patterns if p in input_dict]
        stacks = [torch.stack(s) if isinstance(s, list) else s for s in stacks]
        return {self.get_target_pattern(target_patterns): fold_b(stacks)}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("A fused lora_B is not taken apart again.")
