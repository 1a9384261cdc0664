# SPDX-License-Identifier: Apache-2.0
"""DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models (NeurIPS 2025); PaRa (arXiv 2406.05641) with
`para=True`.

W' = W - Q rightᵀ W + Q (s R): the weight's part in a trained subspace is taken out and replaced.
"relu": (Q, right) = (P, relu(P)); "qr": both the orthonormal basis of P. PaRa has no R.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..config import PeftConfig, biases, excludes, fan_in_fan_out, layer_names, layer_range, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer, dropout, dropout_p
from ..core.scaling import FixedScale
from ..core.slots import Aux, Trainable
from ..core.tuner import TunerModel
from ..ops import low_rank
from ..ops.low_rank import Factors
from ..registry import register_method


@dataclass
class DeftConfig(PeftConfig):
    """Options of DEFT."""

    r: int = option(8, "Rank, at most the output width of a layer.")
    target_modules: list[str] | set[str] | str | None = targets()
    exclude_modules: list[str] | set[str] | str | None = excludes()
    decomposition_method: Literal["relu", "qr"] = option("relu", "How the projector is made of P.")
    init_scale: float = option(1.0, "Scales the random R of init_weights=False.")
    alpha: int | None = option(None, "R is scaled by alpha / r; None for 1.")
    para: bool = option(False, "PaRa: only take the subspace out.")
    fan_in_fan_out: bool = fan_in_fan_out()
    deft_dropout: float = option(0.0, "Dropout on the input of R.")
    init_weights: bool = option(True, "Start at the base model; False draws R.")
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    bias: str = biases("deft_only")
    modules_to_save: list[str] | None = saves()
    _choices = ("decomposition_method",)
    _positive = ("r",)


class DeftLayer(FixedScale, AdapterLayer):
    """Replaces the weight's part in a trained subspace."""

    deft_P: Trainable[nn.ParameterDict]  # [out, r]
    deft_R: Trainable[nn.ParameterDict]  # [r, in]; absent for PaRa
    deft_dropout: Aux[nn.ModuleDict]
    deft_r: Aux[dict]
    deft_decomposition: Aux[dict]
    deft_init_scale: Aux[dict]
    deft_para: Aux[dict]
    deft_scaling: Aux[dict]
    kinds = (kinds.Linear, kinds.Conv1D)
    weight_need = "read"
    standalone_delta = False
    casts_input = False

    def create(self, name: str, cfg: Any) -> None:
        r = self.deft_r[name] = min(cfg.r, self.out_features)
        self.deft_decomposition[name], self.deft_para[name] = cfg.decomposition_method, cfg.para
        self.deft_init_scale[name], self.deft_scaling[name] = cfg.init_scale, cfg.alpha / r if cfg.alpha else 1.0
        self.deft_dropout[name] = dropout(cfg.deft_dropout)
        self.deft_P[name] = nn.Parameter(nn.init.normal_(torch.empty(self.out_features, r), std=0.02))
        if cfg.para:
            return
        R = torch.empty(r, self.in_features)
        if not cfg.init_weights:
            nn.init.normal_(R, std=0.02 * cfg.init_scale)
        elif not (R.is_meta or self.base_weight().is_meta):
            with torch.no_grad():
                W, (_, right) = self.base_weight().float(), self._projector(name)
                R = right.float().to(W.device).T @ W / self.deft_scaling[name]
        self.deft_R[name] = nn.Parameter(R)

    def _projector(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(Q, right), both [out, r]."""
        P = self.deft_P[name]
        if self.deft_decomposition[name] == "relu":
            return P, P.relu()
        Q = torch.linalg.qr(P.float())[0].to(P.dtype)
        return Q, Q

    def factors(self, name: str) -> Factors:
        """Q (s R - rightᵀ W): the part taken out is low-rank in x too, so the base output is not needed."""
        Q, right = self._projector(name)
        A = -(right.T @ self.base_weight().to(right.dtype))
        return Factors(A if self.deft_para[name] else A + self.deft_R[name] * self.deft_scaling[name], Q)

    def delta(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not self._drops(name):
            return low_rank.delta(x, self.factors(name))
        Q, right = self._projector(name)  # the dropout is on the input of R alone
        t = F.linear(self.deft_dropout[name](x), self.deft_R[name].to(x.dtype)) * self.deft_scaling[name]
        return F.linear(t - F.linear(x, (right.T @ self.base_weight().to(right.dtype)).to(x.dtype)), Q.to(x.dtype))

    def _drops(self, name: str) -> bool:
        return self.training and dropout_p(self.deft_dropout[name]) > 0 and not self.deft_para[name]

    def _choose_path(self, names: tuple[str, ...]) -> str:
        return "activation" if any(self._drops(n) for n in names) else "factored"

    def train(self, mode: bool = True):
        self._seen = None  # the path depends on the mode
        return super().train(mode)


@register_method("deft", config=DeftConfig)
class DeftModel(TunerModel):
    layer_cls = DeftLayer
    unsupported_error = TypeError
    example = {"r": 4}
