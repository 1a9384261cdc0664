# SPDX-License-Identifier: Apache-2.0
"""LoKr: low-rank Kronecker product, LyCORIS (arXiv 2309.14859); the idea also in KronA (arXiv 2212.10650).

ΔW = s · w1 ⊗ w2,  s = alpha / r, either factor dense or low-rank itself. Applied as x -> w1 (X w2ᵀ) without forming ΔW.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..config import excludes, layer_names, layer_range, option, saves, targets
from ..core import kinds
from ..core.layer import kaiming
from ..core.slots import Trainable
from ..ops import kronecker
from ..registry import register_method
from .lycoris_utils import LycorisConfig, LycorisLayer, LycorisTuner, cp_weight


@dataclass
class LoKrConfig(LycorisConfig):
    """Options of LoKr."""

    r: int = option(8, "Rank of the factored Kronecker blocks.")
    alpha: int = option(8, "The update is scaled by alpha / r.")
    rank_dropout: float = option(0.0, "Probability of dropping output rows of the update in training.")
    module_dropout: float = option(0.0, "Probability of skipping the adapter of a layer in training.")
    use_effective_conv2d: bool = option(False, "Tucker form of w2 for convolution kernels larger than 1.")
    decompose_both: bool = option(False, "Factor w1 too.")
    decompose_factor: int = option(-1, "Wanted size of the first Kronecker factor; -1 for the most square one.")
    rank_dropout_scale: bool = option(False, "Divide the rank dropout mask by its mean.")
    target_modules: list[str] | set[str] | str | None = targets()
    exclude_modules: list[str] | set[str] | str | None = excludes()
    init_weights: bool | Literal["lycoris"] | None = option(
        True, "Start at zero by w1, or by w2 ('lycoris'); False: all random."
    )
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    modules_to_save: list[str] | None = saves()
    _choices = ("init_weights",)


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """dimension = m · n with m near `factor` (or the most square split for -1)."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = math.isqrt(dimension) if factor == -1 else max(1, min(factor, math.isqrt(dimension)))
    m = next(d for d in range(limit, 0, -1) if dimension % d == 0)
    return m, dimension // m


class LoKrLayer(LycorisLayer):
    """Kronecker product of two small matrices."""

    lokr_w1: Trainable[nn.ParameterDict]  # [out_l, in_m]
    lokr_w1_a: Trainable[nn.ParameterDict]  # [out_l, r]
    lokr_w1_b: Trainable[nn.ParameterDict]  # [r, in_m]
    lokr_w2: Trainable[nn.ParameterDict]  # [out_k, in_n, *kernel]
    lokr_w2_a: Trainable[nn.ParameterDict]  # [out_k, r]; Tucker form [r, out_k]
    lokr_w2_b: Trainable[nn.ParameterDict]  # [r, in_n·kernel]; Tucker form [r, in_n]
    lokr_t2: Trainable[nn.ParameterDict]  # [r, r, *kernel], Tucker form only

    def create_factors(self, name: str, cfg: Any, shape: tuple[int, ...], tucker: bool) -> None:
        r, f, kernel = cfg.r, cfg.decompose_factor, shape[2:]
        (in_m, in_n), (out_l, out_k) = factorization(shape[1], f), factorization(shape[0], f)
        lycoris, zero_first = cfg.init_weights == "lycoris", cfg.init_weights is True
        if cfg.decompose_both and r < max(out_l, in_m) / 2:
            self.lokr_w1_a[name] = nn.Parameter(torch.zeros(out_l, r) if zero_first else kaiming(out_l, r))
            self.lokr_w1_b[name] = nn.Parameter(kaiming(r, in_m))
        else:
            self.lokr_w1[name] = nn.Parameter(torch.zeros(out_l, in_m) if zero_first else kaiming(out_l, in_m))
        if r >= max(out_k, in_n) / 2:
            size = (out_k, in_n, *kernel)
            self.lokr_w2[name] = nn.Parameter(torch.zeros(size) if lycoris else kaiming(*size))
            return
        a, b = ((r, out_k), (r, in_n)) if tucker else ((out_k, r), (r, in_n * math.prod(kernel)))
        self.lokr_w2_a[name] = nn.Parameter(kaiming(*a))
        self.lokr_w2_b[name] = nn.Parameter(torch.zeros(b) if lycoris else kaiming(*b))
        if tucker:
            self.lokr_t2[name] = nn.Parameter(kaiming(r, r, *self.tucker_kernel(shape)))

    def _first(self, name: str) -> torch.Tensor:
        """w1 [out_l, in_m], with the scaling."""
        w1 = self.lokr_w1[name] if name in self.lokr_w1 else self.lokr_w1_a[name] @ self.lokr_w1_b[name]
        return w1 * self.scaling[name]

    def _second(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """w2 [out_k, in_n, *kernel]."""
        if name in self.lokr_w2:
            return self.lokr_w2[name]
        a, b = self.lokr_w2_a[name], self.lokr_w2_b[name]
        if name in self.lokr_t2:
            w2 = cp_weight(self.lokr_t2[name], a, b)
            return w2.view(*w2.shape[:2], *shape[2:])
        return (a @ b).view(a.shape[0], -1, *shape[2:])

    def delta_weight(self, name: str) -> torch.Tensor:
        shape = self.kind.shape(self.get_base_layer())
        w1, w2 = self._first(name), self._second(name, shape)
        # the published layout of dense w2 in Conv1d is another one; trained files rely on it
        published = self.kind is kinds.Conv1d and name in self.lokr_w2
        return torch.einsum("ij,ack->aicjk" if published else "ij,ac...->iajc...", w1, w2).reshape(shape)

    def thin_product_pays(self, name: str) -> bool:
        return self.kind.is_linear

    def apply_factored(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """w2 on the inner axis, w1 on the outer one."""
        return kronecker.apply(x, self._first(name), self._second(name, (self.out_features, self.in_features)))


@register_method("lokr", config=LoKrConfig, mixed=True)
class LoKrModel(LycorisTuner):
    layer_cls = LoKrLayer
    example = {"r": 2, "alpha": 4}
