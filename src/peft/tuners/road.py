# SPDX-License-Identifier: Apache-2.0
"""RoAd: 3-in-1, 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability (arXiv 2409.00119).

y' = R (W x + b): pairs of output features (j, j + g/2 within groups of g) are rotated and scaled,
y1' = c1 y1 - s1 y2,  y2' = c2 y2 + s2 y1,  c = α cos θ, s = α sin θ.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..config import PeftConfig, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer
from ..core.slots import Aux, Trainable
from ..core.tuner import TunerModel
from ..ops import gain
from ..registry import register_method

VECTORS = {"road_1": 1, "road_2": 2, "road_4": 4}  # parameters for each pair of outputs


@dataclass
class RoadConfig(PeftConfig):
    """Options of RoAd."""

    variant: Literal["road_1", "road_2", "road_4"] = option("road_1", "How many parameters a pair has: 1, 2 or 4.")
    group_size: int = option(
        64, "Outputs j and j + group_size / 2 of a group form a pair; must divide the output width."
    )
    init_weights: bool = option(True, "Start at the identity; False draws angles and scales.")
    target_modules: list[str] | set[str] | str | None = targets()
    modules_to_save: list[str] | None = saves()
    _choices = ("variant",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size <= 0 or self.group_size % 2:
            raise ValueError(f"The group_size must be a positive even number, got {self.group_size}.")


class RoadLayer(AdapterLayer):
    """Rotates pairs of output features."""

    road_theta: Trainable[nn.ParameterDict]  # [out / 2], [out] or [2 out] by variant
    road_alpha: Trainable[nn.ParameterDict]
    variant: Aux[dict]
    group_size: Aux[dict]
    kinds = (kinds.Linear, kinds.Conv1D, kinds.Conv1d, kinds.Conv2d, kinds.Conv3d)
    casts_input = False

    def create(self, name: str, cfg: Any) -> None:
        self.variant[name], self.group_size[name] = cfg.variant, cfg.group_size
        size = self.out_features * VECTORS[cfg.variant] // 2
        theta, alpha = torch.zeros(size), torch.ones(size)
        if not cfg.init_weights:
            theta, alpha = nn.init.normal_(theta, 0.0, 0.5), nn.init.normal_(alpha, 1.0, 0.5)
        self.road_theta[name], self.road_alpha[name] = nn.Parameter(theta), nn.Parameter(alpha)

    def _coefficients(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """c and s as [groups, 2 or 1, g/2]; s carries the sign of each half."""
        half, count = self.group_size[name] // 2, VECTORS[self.variant[name]]
        theta, alpha = self.road_theta[name], self.road_alpha[name]
        (theta_c, theta_s), (alpha_c, alpha_s) = (theta, theta), (alpha, alpha)
        if count == 4:  # c and s have parameters of their own
            theta_c, theta_s = theta.view(-1, 2, 2 * half).unbind(1)
            alpha_c, alpha_s = alpha.view(-1, 2, 2 * half).unbind(1)
        c, s = (v.view(-1, min(count, 2), half) for v in (alpha_c * theta_c.cos(), alpha_s * theta_s.sin()))
        return c, s * torch.tensor([[-1.0], [1.0]], dtype=s.dtype, device=s.device)

    def _adapt_activations(self, names: tuple[str, ...], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base, y, name = self.base_layer, None, names[0]
        simple = len(names) == 1 and self.kind is kinds.Linear and self.variant[name] == "road_1" and not kwargs
        if simple and self._base_is_plain(base):
            y = gain.turned(base, x, self.road_theta[name], self.road_alpha[name], self.group_size[name] // 2)
        return super()._adapt_activations(names, x, *args, **kwargs) if y is None else y

    def map_output(self, name: str, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        c, s = (v.to(y.dtype) for v in self._coefficients(name))
        dim = self.kind.feature_dim
        return gain.turn(y, c, s) if dim == -1 else gain.turn(y.movedim(dim, -1), c, s).movedim(-1, dim)

    def map_weight(self, name: str, w: torch.Tensor) -> torch.Tensor:
        return gain.turn(w.movedim(0, -1).contiguous(), *self._coefficients(name)).movedim(-1, 0)

    def map_bias(self, name: str, b: torch.Tensor) -> torch.Tensor:
        return gain.turn(b, *self._coefficients(name))


@register_method("road", config=RoadConfig, mixed=True)
class RoadModel(TunerModel):
    layer_cls = RoadLayer
    example = {"group_size": 4}

    def check_target(self, cfg: Any, key: str, module: nn.Module) -> None:
        out = self.target_shape(module)[0]
        if out % cfg.group_size:
            raise ValueError(
                f"Target module {key}: the output width {out} must be divisible by group_size={cfg.group_size}."
            )
