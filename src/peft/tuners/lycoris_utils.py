# SPDX-License-Identifier: Apache-2.0
"""What LoHa and LoKr share: options, scaling, rank and module dropout, layer kinds."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..config import PeftConfig, option, positive
from ..core import kinds
from ..core.layer import AdapterLayer
from ..core.scaling import Rescaling
from ..core.slots import Aux
from ..core.tuner import TunerModel


@dataclass
class LycorisConfig(PeftConfig):
    """Base of the LyCORIS configurations."""

    rank_pattern: dict | None = option(factory=dict, help="Ranks that differ: {name or regex: rank}.")
    alpha_pattern: dict | None = option(factory=dict, help="Alphas that differ: {name or regex: alpha}.")
    _regex_with_layers = "warn"


class LycorisLayer(Rescaling, AdapterLayer):
    """A dense delta made of small factors, by `create_factors(name, cfg, shape, tucker)` of the method. Where
    `thin_product_pays(name)`, its `apply_factored(name, x)` is cheaper than a dense product.
    """

    r: Aux[dict]
    alpha: Aux[dict]
    scaling: Aux[dict]
    rank_dropout: Aux[dict]
    rank_dropout_scale: Aux[dict]
    module_dropout: Aux[dict]
    kinds = (kinds.Linear, kinds.Conv1D, kinds.Conv2d, kinds.Conv1d)
    prefer_weight_path = True

    def create(self, name: str, cfg: Any) -> None:
        self.r[name], self.alpha[name], self.scaling[name] = positive("r", cfg.r), cfg.alpha, cfg.alpha / cfg.r
        self.rank_dropout[name], self.module_dropout[name] = cfg.rank_dropout, cfg.module_dropout
        self.rank_dropout_scale[name] = getattr(cfg, "rank_dropout_scale", True)
        shape = self.kind.shape(self.get_base_layer())
        tucker = cfg.use_effective_conv2d and self.kind.is_conv and math.prod(shape[2:]) != 1
        self.create_factors(name, cfg, shape, tucker)

    @staticmethod
    def tucker_kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
        """Kernel of the core tensor; the published one of Conv1d has a trailing 1."""
        return (*shape[2:], 1) if len(shape) == 3 else shape[2:]

    def delta(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        training = self.training
        p = self.module_dropout[name] if training else 0.0
        if p > 0 and float(torch.rand(1)) <= p:
            return torch.zeros((), dtype=y.dtype, device=y.device)
        if self.thin_product_pays(name):
            out = self.apply_factored(name, x)
        else:
            out = self.kind.call(self.get_base_layer(), x, self.delta_weight(name))
        if training and self.rank_dropout[name] > 0:
            keep = (torch.rand(self.out_features, device=out.device) > self.rank_dropout[name]).to(out.dtype)
            keep = keep / keep.mean().clamp(min=1e-6) if self.rank_dropout_scale[name] else keep
            out = out * self.kind.per_feature(keep, out)
        return out

    def weight_path_allowed(self, names: tuple[str, ...]) -> bool:
        dropping = self.training and any(self.rank_dropout[n] > 0 or self.module_dropout[n] > 0 for n in names)
        return not dropping and not any(self.thin_product_pays(n) for n in names)

    def _initial_scaling(self, name: str) -> float:
        return self.alpha[name] / self.r[name]


def cp_weight(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """core [r, r, *kernel], a [r, out], b [r, in] -> [out, in, *kernel]."""
    return torch.einsum("ij...,ip,jq->pq...", core, a, b)


class LycorisTuner(TunerModel):
    unsupported_error = TypeError
    patterned = {"r": "rank_pattern", "alpha": "alpha_pattern"}
