# SPDX-License-Identifier: Apache-2.0
"""BEFT: Bias-Efficient Fine-Tuning of Language Models in Low-Data Regimes (arXiv 2509.15974).

y = W x + b + v with a trained vector v a layer.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer
from ..core.slots import Trainable
from ..core.tuner import TunerModel
from ..registry import register_method


@dataclass
class BeftConfig(PeftConfig):
    """Options of BEFT."""

    target_modules: list[str] | set[str] | str | None = targets()
    modules_to_save: list[str] | None = saves()
    init_weights: bool = option(True, "Start at zero; False keeps a normal draw.")


class BeftLayer(AdapterLayer):
    """Adds a vector to the output."""

    beft_bias: Trainable[nn.ParameterDict]  # [1, out]
    kinds = (kinds.Linear, kinds.Conv1D, kinds.Conv1d, kinds.Conv2d, kinds.Conv3d)
    casts_input = False

    def create(self, name: str, cfg: Any) -> None:
        drawn = torch.randn(1, self.out_features)  # drawn in any case: the published library consumes it too
        self.beft_bias[name] = nn.Parameter(torch.zeros(1, self.out_features) if cfg.init_weights else drawn)
        if self.base_bias() is None:
            warnings.warn("The base layer has no bias: the adapter can be used, but not merged.", stacklevel=2)

    def delta(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.kind.per_feature(self.beft_bias[name].flatten(), y)

    def delta_bias(self, name: str) -> torch.Tensor:
        return self.beft_bias[name].flatten()

    def _check_bias(self, base: nn.Module, delta_bias: torch.Tensor | None) -> None:
        if self.kind.bias(base) is None:
            raise ValueError("The base layer does not have a bias, so the adapter cannot be merged into it.")


@register_method("beft", config=BeftConfig, mixed=True)
class BeftModel(TunerModel):
    layer_cls = BeftLayer
    unsupported_error = TypeError
