# SPDX-License-Identifier: Apache-2.0
"""PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers (arXiv 2410.01870).

ΔW = s · B Hᵀ, where H = f(Wᵀ Aᵀ) runs through `depth` small hidden layers each way: a low-rank delta made from the
weight.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..config import PeftConfig, excludes, layer_names, layer_range, nearest, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer
from ..core.slots import Aux, Trainable
from ..core.tuner import TunerModel
from ..import_utils import require
from ..ops.low_rank import Factors
from ..registry import register_method


@dataclass
class PeanutConfig(PeftConfig):
    """Options of PEANuT."""

    r: int = option(32, "Width of the tweaker.")
    depth: int = option(0, "Number of hidden layers in the encoder and in the decoder.")
    act_fn: str = option("relu", "Activation, by its name in transformers.")
    scaling: float = option(1.0, "Factor of the update.")
    target_modules: list[str] | set[str] | str | None = targets()
    exclude_modules: list[str] | set[str] | str | None = excludes()
    modules_to_save: list[str] | None = saves()
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    init_weights: bool = option(True, "Start at zero (B = 0).")
    _regex_with_layers = "warn"
    _positive = ("r",)
    _not_negative = ("depth",)

    def __post_init__(self) -> None:
        super().__post_init__()
        activation(self.act_fn)


def activation(name: str) -> nn.Module:
    """The activation called `name`; common ones without importing transformers."""
    common = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
    if name in common:
        return common[name]()
    require(f"act_fn={name!r}", "transformers")
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ValueError(f"Unknown act_fn {name!r}; it must be a key of transformers' ACT2FN.{nearest(name, ACT2FN)}")
    return ACT2FN[name]


class PeanutLayer(AdapterLayer):
    """A low-rank delta whose right factor is computed from the base weight."""

    peanut_A: Trainable[nn.ModuleDict]  # weight [r, out]
    peanut_B: Trainable[nn.ModuleDict]  # weight [out, r]
    peanut_encoders: Trainable[nn.ModuleDict]  # depth weights [r, r]
    peanut_decoders: Trainable[nn.ModuleDict]
    r: Aux[dict]
    depth: Aux[dict]
    res_num: Aux[dict]
    scaling: Aux[dict]
    act_fn: Aux[dict]
    kinds = (kinds.Linear, kinds.Conv1D)
    weight_need = "read"
    standalone_delta = False

    def create(self, name: str, cfg: Any) -> None:
        r, out = cfg.r, self.out_features
        self.r[name], self.depth[name], self.res_num[name], self.scaling[name] = r, cfg.depth, cfg.depth, cfg.scaling
        self.act_fn[name] = activation(cfg.act_fn)
        A = kinds.linear(out, r)
        encoders, decoders = ([kinds.linear(r, r) for _ in range(cfg.depth)] for _ in range(2))
        B = kinds.linear(r, out)
        for layer in (A, *encoders, *decoders, *(() if cfg.init_weights else (B,))):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
        if cfg.init_weights:
            nn.init.zeros_(B.weight)
        self.peanut_A[name], self.peanut_B[name] = A, B
        self.peanut_encoders[name], self.peanut_decoders[name] = nn.ModuleList(encoders), nn.ModuleList(decoders)

    def _hidden(self, name: str) -> torch.Tensor:
        """H [in, r]"""
        f, A = self.act_fn[name], self.peanut_A[name].weight
        H = f(F.linear(self.base_weight().to(A.dtype).T, A))  # type: ignore
        kept = []
        for layer in self.peanut_encoders[name]:  # type: ignore[union-attr]
            kept.append(H)
            H = f(layer(H))
        for layer in self.peanut_decoders[name]:  # type: ignore[union-attr]
            H = f(layer(H)) + kept.pop()
        return H

    def factors(self, name: str) -> Factors:
        return Factors(self._hidden(name).T, self.peanut_B[name].weight, self.scaling[name])  # type: ignore


@register_method("peanut", config=PeanutConfig)
class PeanutModel(TunerModel):
    layer_cls = PeanutLayer
    unsupported_error = NotImplementedError
    example = {"r": 4, "depth": 1}

    def export_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Published files leave the adapter name out before the layer numbers, too."""
        return {re.sub(rf"(peanut_(?:en|de)coders)\.{re.escape(name)}\.", r"\1.", k): v for k, v in state.items()}

    def import_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {re.sub(r"(peanut_(?:en|de)coders)\.(\d+)\.", rf"\1.{name}.\2.", k): v for k, v in state.items()}
