# SPDX-License-Identifier: Apache-2.0
"""LoHa: low-rank Hadamard product, FedPara (arXiv 2108.06098), in the form of LyCORIS (arXiv 2309.14859).

ΔW = s · (w1_a w1_b) ⊙ (w2_a w2_b),  s = alpha / r. For linear layers this is a plain low-rank product of rank r²:
A[i·r + j, :] = w1_b[i, :] w2_b[j, :], B[:, i·r + j] = w1_a[:, i] w2_a[:, j].
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import excludes, layer_names, layer_range, option, saves, targets
from ..core import kinds
from ..core.layer import kaiming
from ..core.slots import Trainable
from ..ops import low_rank
from ..ops.dispatch import recomputed
from ..registry import register_method
from .lycoris_utils import LycorisConfig, LycorisLayer, LycorisTuner, cp_weight

# In the Tucker form the published library takes the gradient of w1_a through t2 and w2_b, and that of w2_a through t1
# and w1_b (found by comparing its gradients with finite differences). Values are not affected; training runs are.
# True keeps published runs reproducible.
PUBLISHED_TUCKER_GRADIENT = True


@dataclass
class LoHaConfig(LycorisConfig):
    """Options of LoHa."""

    r: int = option(8, "Rank of each pair of factors; the product has rank up to r².")
    alpha: int = option(8, "The update is scaled by alpha / r.")
    rank_dropout: float = option(0.0, "Probability of dropping output rows of the update in training.")
    module_dropout: float = option(0.0, "Probability of skipping the adapter of a layer in training.")
    use_effective_conv2d: bool = option(False, "Tucker form for convolution kernels larger than 1.")
    target_modules: list[str] | set[str] | str | None = targets()
    exclude_modules: list[str] | set[str] | str | None = excludes()
    init_weights: bool = option(True, "Start at zero; False makes all factors random.")
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    modules_to_save: list[str] | None = saves()


def hadamard(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """(a b) ⊙ (c d) for a, c [out, r] and b, d [r, in]."""
    return (a @ b) * (c @ d)


class LoHaLayer(LycorisLayer):
    """Hadamard product of two low-rank matrices."""

    hada_w1_a: Trainable[nn.ParameterDict]  # [out, r]; Tucker form [r, out]
    hada_w1_b: Trainable[nn.ParameterDict]  # [r, in·kernel]; Tucker form [r, in]
    hada_w2_a: Trainable[nn.ParameterDict]
    hada_w2_b: Trainable[nn.ParameterDict]
    hada_t1: Trainable[nn.ParameterDict]  # [r, r, *kernel], Tucker form only
    hada_t2: Trainable[nn.ParameterDict]

    def create_factors(self, name: str, cfg: Any, shape: tuple[int, ...], tucker: bool) -> None:
        r, out = cfg.r, shape[0]
        rows, cols = ((r, out), (r, shape[1])) if tucker else ((out, r), (r, math.prod(shape[1:])))
        for slot, size in (("hada_w1_a", rows), ("hada_w1_b", cols), ("hada_w2_a", rows), ("hada_w2_b", cols)):
            zero = slot == "hada_w2_b" and cfg.init_weights
            getattr(self, slot)[name] = nn.Parameter(torch.zeros(size) if zero else kaiming(*size))
        if tucker:
            kernel = self.tucker_kernel(shape)
            self.hada_t1[name] = nn.Parameter(kaiming(r, r, *kernel))
            self.hada_t2[name] = nn.Parameter(kaiming(r, r, *kernel))

    def delta_weight(self, name: str) -> torch.Tensor:
        w1_a, w1_b, w2_a, w2_b = self.hada_w1_a[name], self.hada_w1_b[name], self.hada_w2_a[name], self.hada_w2_b[name]
        if name not in self.hada_t1:
            product = recomputed(hadamard, w1_a, w1_b, w2_a, w2_b)
        else:
            t1, t2 = self.hada_t1[name], self.hada_t2[name]
            if PUBLISHED_TUCKER_GRADIENT and torch.is_grad_enabled():
                product = published(t1, w1_a, w1_b, t2, w2_b) * published(t2, w2_a, w2_b, t1, w1_b)
            else:
                product = cp_weight(t1, w1_a, w1_b) * cp_weight(t2, w2_a, w2_b)
        return (product * self.scaling[name]).view(self.kind.shape(self.get_base_layer()))

    def thin_product_pays(self, name: str) -> bool:
        """The factored form has rank r². A training step costs 2 r² (in + out) products a token (`low_rank.merged`),
        against in·out for the gradient of a dense delta.
        """
        n_in, n_out = self.in_features, self.out_features
        return self.kind.is_linear and 2 * self.r[name] ** 2 * (n_in + n_out) < n_in * n_out

    def thin_factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r², in], scaled B [out, r²]"""
        w1_a, w1_b, w2_a, w2_b = self.hada_w1_a[name], self.hada_w1_b[name], self.hada_w2_a[name], self.hada_w2_b[name]
        A = (w1_b[:, None] * w2_b[None]).flatten(0, 1)
        return A, (w1_a[:, :, None] * (w2_a * self.scaling[name])[:, None]).flatten(1)

    def _adapt_activations(self, names: tuple[str, ...], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base, one = self.base_layer, names[0]
        dropping = self.training and (self.rank_dropout[one] > 0 or self.module_dropout[one] > 0)
        if len(names) > 1 or dropping or not self.thin_product_pays(one) or self.kind is not kinds.Linear:
            return super()._adapt_activations(names, x, *args, **kwargs)
        full = self._base_is_plain(base) and base.weight.dtype == x.dtype == self.adapter_dtype(one)
        if not full or x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(x.device.type):
            return super()._adapt_activations(names, x, *args, **kwargs)
        return low_rank.merged(x, base.weight, base.bias, *self.thin_factors(one))  # type: ignore[arg-type]

    def apply_factored(self, name: str, x: torch.Tensor) -> torch.Tensor:
        A, B = self.thin_factors(name)
        return nn.functional.linear(nn.functional.linear(x, A), B)


def published(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor, other_core: torch.Tensor, other_b: torch.Tensor):
    """`cp_weight(core, a, b)`, whose gradient for `a` is that of `cp_weight(other_core, a, other_b)`."""
    other = cp_weight(other_core.detach(), a, other_b.detach())
    return cp_weight(core, a.detach(), b) + (other - other.detach())


@register_method("loha", config=LoHaConfig, prefix="hada_", mixed=True)
class LoHaModel(LycorisTuner):
    layer_cls = LoHaLayer
    inexact_gradients = {"loha.PUBLISHED_TUCKER_GRADIENT": False}
    example = {"r": 2, "alpha": 4}
