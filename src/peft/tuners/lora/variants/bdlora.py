# SPDX-License-Identifier: Apache-2.0
"""BD-LoRA: block-diagonal factors for tensor parallel serving (arXiv 2510.23346). One of A, B is block-diagonal,
stored compactly.

y = W x + s·B A x with A = diag(A_1 .. A_n) (weight [r, in/n]) or B = diag(B_1 .. B_n) (weight [out, r/n]).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ....core import kinds
from ....ops.low_rank import Factors
from .base import LoraVariant


class BlockDiagonal(nn.Module):
    """x -> diag(W_1 .. W_n) x (+ bias). The weight holds the blocks one below the other, [out, in/n]."""

    def __init__(self, n_in: int, n_out: int, nblocks: int, bias: nn.Parameter | None = None):
        super().__init__()
        self.nblocks, self.in_features, self.out_features = nblocks, n_in, n_out
        self.weight = nn.Parameter(torch.empty(n_out, n_in // nblocks))
        self.bias = bias

    def dense(self) -> torch.Tensor:
        return torch.block_diag(*self.weight.chunk(self.nblocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dense(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, nblocks={self.nblocks}"


def blocked_factor(options: Any, key: str) -> str | None:
    """Which factor of module `key` is block-diagonal: "A", "B", or None (only without match_strict)."""
    hits = [
        factor
        for factor, names in (("A", options.target_modules_bd_a), ("B", options.target_modules_bd_b))
        if any(n in key for n in names or ())
    ]
    if len(hits) == 2:
        raise ValueError(f"{key!r} matches both target_modules_bd_a and target_modules_bd_b of BD-LoRA.")
    if not hits and options.match_strict:
        raise ValueError(
            f"{key!r} is in neither target_modules_bd_a nor target_modules_bd_b; add it, or set match_strict=False."
        )
    return hits[0] if hits else None


class BdLora(LoraVariant):
    name = "BD-LoRA"
    kinds = (kinds.Linear,)
    replaces_factors = True

    def __init__(self, cfg: Any):
        self.nblocks = cfg.use_bdlora.nblocks
        self.factor = getattr(cfg, "_bd_factor", None)

    @classmethod
    def check(cls, cfg: Any, key: str, kind: Any, layer_storage: Any, base: nn.Module) -> None:
        super().check(cfg, key, kind, layer_storage, base)
        factor, n = blocked_factor(cfg.use_bdlora, key), cfg.use_bdlora.nblocks
        n_out, n_in = kind.shape(base)
        sizes = {"A": (n_in, cfg.r), "B": (n_out, cfg.r)}.get(factor or "", ())
        if any(size % n for size in sizes):
            raise ValueError(f"BD-LoRA at {key!r}: {sizes} must be divisible by nblocks={n}.")

    def create(self, layer: Any, name: str, cfg: Any) -> None:
        if self.factor is None:
            return
        if self.factor == "A":
            made = layer.lora_A[name] = BlockDiagonal(layer.in_features, cfg.r, self.nblocks)
            nn.init.kaiming_uniform_(made.weight, a=0)
        else:
            made = BlockDiagonal(cfg.r, layer.out_features, self.nblocks, layer.lora_B[name].bias)
            layer.lora_B[name] = made
            nn.init.zeros_(made.weight)

    def factors(self, layer: Any, name: str) -> Factors:
        f = layer.plain_factors(name)
        if self.factor == "A":
            return f._replace(A=layer.lora_A[name].dense())
        return f._replace(B=layer.lora_B[name].dense()) if self.factor == "B" else f
