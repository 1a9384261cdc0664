# SPDX-License-Identifier: Apache-2.0
"""DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation (arXiv 2503.18225).

ΔW = (B diag(c) A) ⊙ ‖W_:,j‖,  c_i = (λ / r) / (‖A_i‖ ‖B^i‖), norms clamped at 1e-4.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig, biases, excludes, layer_names, layer_range, option, positive, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer, dropout, dropout_p, kaiming
from ..core.slots import Aux, PersistentBufferDict, Saved, Trainable
from ..core.tuner import TunerModel
from ..ops import directions
from ..ops.low_rank import Factors
from ..registry import register_method


@dataclass
class DeloraConfig(PeftConfig):
    """Options of DeLoRA."""

    r: int = option(8, "Rank.")
    delora_lambda: float = option(15, "Initial bound λ on the norm of the update.")
    module_dropout: float = option(0.0, "Dropout on the input.")
    target_modules: list[str] | set[str] | str | None = targets()
    exclude_modules: list[str] | set[str] | str | None = excludes()
    bias: str = biases("delora_only")
    init_weights: bool = option(True, "Start at zero (B = 0).")
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    rank_pattern: dict | None = option(factory=dict, help="Ranks that differ: {name or regex: rank}.")
    lambda_pattern: dict | None = option(factory=dict, help="λ that differ: {name or regex: λ}.")
    modules_to_save: list[str] | None = saves()
    _positive = ("r",)


class DeloraLayer(AdapterLayer):
    """A low-rank delta of normalised directions, scaled by a trained strength."""

    delora_A: Trainable[nn.ParameterDict]  # [r, in]
    delora_B: Trainable[nn.ParameterDict]  # [out, r]
    delora_lambda: Trainable[nn.ParameterDict]  # [1]
    delora_w_norm: Saved[PersistentBufferDict]  # [in], column norms of the base weight
    delora_dropout: Aux[nn.ModuleDict]
    r: Aux[dict]
    kinds = (kinds.Linear, kinds.Conv1D)
    weight_need = "read"

    def create(self, name: str, cfg: Any) -> None:
        r = self.r[name] = positive("r", cfg.r)
        self.delora_dropout[name] = dropout(cfg.module_dropout)
        A = kaiming(r, self.in_features)
        B = torch.zeros(self.out_features, r) if cfg.init_weights else kaiming(self.out_features, r)
        self.delora_A[name], self.delora_B[name] = nn.Parameter(A), nn.Parameter(B)
        self.delora_lambda[name] = nn.Parameter(torch.full((1,), float(cfg.delora_lambda)))
        with torch.no_grad():
            W = self.base_weight()
            meta = W.is_meta or A.is_meta
            self.delora_w_norm[name] = torch.ones(self.in_features, device="cpu") if meta else W.norm(dim=0)

    def factors(self, name: str) -> Factors:
        A, B, strength = self.delora_A[name], self.delora_B[name], self.delora_lambda[name]
        A, B = directions.scaled(A, B, strength, self.delora_w_norm[name])
        return Factors(A, B, 1.0, dropout_p(self.delora_dropout[name]))


@register_method("delora", config=DeloraConfig)
class DeloraModel(TunerModel):
    layer_cls = DeloraLayer
    unsupported_error = TypeError
    example = {"r": 4, "delora_lambda": 1.0}
    patterned = {"r": "rank_pattern", "delora_lambda": "lambda_pattern"}
