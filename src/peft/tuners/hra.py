# SPDX-License-Identifier: Apache-2.0
"""HRA: Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation (arXiv
2405.17484).

W' = W H,  H = H_0 H_1 .. H_{r-1},  H_i = I - 2 u_i u_iᵀ with unit u_i; applied to the input, y = W (x Hᵀ) + b.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig, biases, excludes, layer_names, layer_range, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer, kaiming
from ..core.scaling import FixedScale
from ..core.slots import Aux, Trainable
from ..core.tuner import TunerModel
from ..ops import householder
from ..registry import register_method


@dataclass
class HRAConfig(PeftConfig):
    """Options of HRA."""

    r: int = option(8, "Number of reflections; even, so that they can cancel at the start.")
    apply_GS: bool = option(False, "Orthonormalise the vectors first (Gram-Schmidt).")
    target_modules: list[str] | set[str] | str | None = targets()
    exclude_modules: list[str] | set[str] | str | None = excludes()
    init_weights: bool = option(True, "Start at the identity (pairs of equal vectors); False is random.")
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    bias: str = biases("hra_only")
    modules_to_save: list[str] | None = saves()
    _positive = ("r",)


class HRALayer(FixedScale, AdapterLayer):
    """Reflects the input features."""

    hra_u: Trainable[nn.ParameterDict]  # [features, r]
    hra_r: Aux[dict]
    hra_apply_GS: Aux[dict]
    kinds = (kinds.Linear, kinds.Conv1D, kinds.Conv1d, kinds.Conv2d, kinds.Conv3d)
    conv_by_weight = True
    casts_input = False

    def create(self, name: str, cfg: Any) -> None:
        r = self.hra_r[name] = cfg.r
        self.hra_apply_GS[name] = cfg.apply_GS
        features = math.prod(self.kind.shape(self.get_base_layer())[1:])
        # Gram-Schmidt makes noise of the second vector of a pair; orthonormal reflections are never the identity.
        pairs = cfg.init_weights and r % 2 == 0 and not cfg.apply_GS
        if cfg.init_weights and not pairs:
            reason = "with apply_GS" if cfg.apply_GS else "when r is odd"
            warnings.warn(
                f"The symmetric initialization can NOT be performed {reason}: the layer does not start at the "
                "identity.",
                stacklevel=2,
            )
        u = kaiming(features, r // 2 if pairs else r)
        self.hra_u[name] = nn.Parameter(u.repeat_interleave(2, dim=1) if pairs else u)

    def map_input(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return householder.reflect(x, self.hra_u[name], self.hra_apply_GS[name])

    def map_weight(self, name: str, w: torch.Tensor) -> torch.Tensor:
        return householder.reflect_weight(w.flatten(1), self.hra_u[name], self.hra_apply_GS[name]).view(w.shape)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str, reverse: bool = False) -> torch.Tensor:
        """The dense H [features, features] (Hᵀ if `reverse`); HRA multiplies, this is no additive weight."""
        H = householder.dense(self.hra_u[adapter], self.hra_apply_GS[adapter])
        return H.T if reverse else H


@register_method("hra", config=HRAConfig)
class HRAModel(TunerModel):
    layer_cls = HRALayer
    unsupported_error = TypeError
    example = {"r": 4}
