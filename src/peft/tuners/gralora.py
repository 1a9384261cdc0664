# SPDX-License-Identifier: Apache-2.0
"""GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning (arXiv 2505.20355).

The weight is cut into k x k blocks; block (output j, input n) gets the low-rank update
α / r · (A_n[:, chunk j] B_j[chunk n, :])ᵀ.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..config import PeftConfig, biases, fan_in_fan_out, layer_names, layer_range, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer, dropout, kaiming
from ..core.slots import Aux, Trainable
from ..core.tuner import TunerModel
from ..registry import register_method


@dataclass
class GraloraConfig(PeftConfig):
    """Options of GraLoRA."""

    r: int = option(32, "Total rank; must be divisible by gralora_k.")
    hybrid_r: int = option(0, "Rank of an additional plain LoRA.")
    target_modules: list[str] | set[str] | str | None = targets()
    alpha: int = option(64, "The update is scaled by alpha / (r + hybrid_r).")
    gralora_dropout: float = option(0.0, "Dropout on the input.")
    gralora_k: int = option(2, "Blocks on each side; must divide the widths of the layers.")
    fan_in_fan_out: bool = fan_in_fan_out()
    bias: str = biases("gralora_only")
    modules_to_save: list[str] | None = saves()
    init_weights: bool = option(True, "Start at zero (B = 0).")
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    _regex_with_layers = "warn"
    _pattern_alone = True
    _positive = ("r", "gralora_k")
    _not_negative = ("hybrid_r",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r % self.gralora_k:
            raise ValueError(f"r should be divisible by gralora_k, but got r={self.r} and gralora_k={self.gralora_k}")


class GraloraLayer(AdapterLayer):
    """Block-wise low-rank delta."""

    gralora_A: Trainable[nn.ParameterDict]  # [k, in/k, r]
    gralora_B: Trainable[nn.ParameterDict]  # [k, r, out/k]
    gralora_A_general: Trainable[nn.ModuleDict]  # Linear in -> hybrid_r
    gralora_B_general: Trainable[nn.ModuleDict]  # Linear hybrid_r -> out
    gralora_dropout: Aux[nn.ModuleDict]
    r: Aux[dict]
    hybrid_r: Aux[dict]
    alpha: Aux[dict]
    gralora_k: Aux[dict]
    scaling: Aux[dict]
    kinds = (kinds.Linear, kinds.Conv1D)

    def create(self, name: str, cfg: Any) -> None:
        k, r = cfg.gralora_k, cfg.r
        self.r[name], self.hybrid_r[name], self.alpha[name], self.gralora_k[name] = r, cfg.hybrid_r, cfg.alpha, k
        self.scaling[name], self.gralora_dropout[name] = cfg.alpha / (r + cfg.hybrid_r), dropout(cfg.gralora_dropout)
        n_in, n_out = self.in_features // k, self.out_features // k
        A, B = [], []
        for _ in range(k):
            A.append(kaiming(r, n_in).T)
            B.append(torch.zeros(r, n_out) if cfg.init_weights else kaiming(n_out, r).T)
        self.gralora_A[name], self.gralora_B[name] = nn.Parameter(torch.stack(A)), nn.Parameter(torch.stack(B))
        if not cfg.hybrid_r:
            self.gralora_A_general[name] = self.gralora_B_general[name] = nn.Identity()
            return
        down, up = kinds.linear(self.in_features, cfg.hybrid_r), kinds.linear(cfg.hybrid_r, self.out_features)
        down.reset_parameters()  # drawn twice, as published
        if cfg.init_weights:
            nn.init.zeros_(up.weight)
        else:
            up.reset_parameters()
        self.gralora_A_general[name], self.gralora_B_general[name] = down, up

    def delta(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        A, B, k, scale = self.gralora_A[name], self.gralora_B[name], self.gralora_k[name], self.scaling[name]
        drop = self.gralora_dropout[name]
        h = torch.bmm(drop(x).reshape(-1, k, A.shape[1]).transpose(0, 1), A) * scale  # [k_in, N, r]: cheap to scale
        h = h.unflatten(-1, (k, -1)).permute(2, 1, 0, 3).flatten(2)  # [k_out, N, k_in · r/k]
        out = torch.bmm(h, B).transpose(0, 1).reshape(*x.shape[:-1], self.out_features)
        if self.hybrid_r[name]:
            z = F.linear(drop(x), self.gralora_A_general[name].weight) * scale  # type: ignore
            out = out + F.linear(z, self.gralora_B_general[name].weight)  # type: ignore
        return out

    def delta_weight(self, name: str) -> torch.Tensor:
        A, B, k = self.gralora_A[name], self.gralora_B[name], self.gralora_k[name]
        blocks = torch.einsum("nijs,jnso->joni", A.unflatten(-1, (k, -1)), B.unflatten(1, (k, -1)))
        delta = blocks.reshape(self.out_features, self.in_features)
        if self.hybrid_r[name]:
            delta = delta + self.gralora_B_general[name].weight @ self.gralora_A_general[name].weight  # type: ignore
        return delta * self.scaling[name]


@register_method("gralora", config=GraloraConfig)
class GraloraModel(TunerModel):
    layer_cls = GraloraLayer
    unsupported_error = TypeError
    example = {"r": 4, "alpha": 8}

    def check_target(self, cfg: Any, key: str, module: nn.Module) -> None:
        k, widths = cfg.gralora_k, self.target_shape(module)[:2]
        if any(n % k for n in widths):
            raise ValueError(f"Target module {key}: the widths {widths} must be divisible by gralora_k={k}.")
