# SPDX-License-Identifier: Apache-2.0
"""GLoRA: One-for-All, Generalized LoRA for Parameter-Efficient Fine-tuning (arXiv 2306.07967).

W' = W + W ⊙ A + B,  b' = b + b ⊙ D + E + W C, where A..E are low-rank, vectors, scalars or absent.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..config import PeftConfig, biases, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer, kaiming
from ..core.slots import Aux, Trainable
from ..core.tuner import TunerModel
from ..registry import register_method


@dataclass
class GloraConfig(PeftConfig):
    """Options of GLoRA."""

    r: int = option(8, "Rank of the low-rank paths.")
    target_modules: list[str] | set[str] | str | None = targets()
    bias: str = biases("glora_only")
    modules_to_save: list[str] | None = saves()
    config_A_B: Literal["lora", "vector", "constant", "none"] = option("lora", "Form of A and B.")
    config_C: Literal["lora", "vector", "none"] = option("lora", "Form of C.")
    config_D_E: Literal["vector", "constant", "none"] = option("constant", "Form of D and E.")
    init_weights: bool = option(True, "Start at zero.")
    _choices = ("config_A_B", "config_C", "config_D_E")
    _not_negative = ("r",)


class GloraPath(nn.Module):
    """One of A..E for a matrix [rows, cols], or a vector when `cols` is 0."""

    def __init__(self, form: str, rows: int, cols: int, r: int, zero: bool):
        super().__init__()
        self.form = form
        if form == "lora":
            Xu = kaiming(r, cols)  # drawn first, as published
            self.Xd = nn.Parameter(torch.zeros(rows, r) if zero else kaiming(rows, r))
            self.Xu = nn.Parameter(Xu)
        elif form == "vector":
            size = (rows, 1) if cols else (rows,)
            bound = 1.0 if cols else 1 / math.sqrt(rows)
            self.X = nn.Parameter(torch.zeros(size) if zero else torch.empty(size).uniform_(-bound, bound))
        elif form == "constant":
            self.X = nn.Parameter(torch.zeros(1) if zero else torch.randn(1) * 0.02)
        else:  # published files hold these zeros
            self.register_buffer("zeros", torch.zeros((rows, cols) if cols else (rows,), device="cpu"))

    def value(self) -> torch.Tensor | float:
        if self.form == "lora":
            return self.Xd @ self.Xu
        return 0.0 if self.form == "none" else self.X


class GloraLayer(AdapterLayer):
    """Transforms weight and bias by up to five small paths."""

    glora_A: Trainable[nn.ModuleDict]  # [out, in]
    glora_B: Trainable[nn.ModuleDict]  # [out, in]
    glora_C: Trainable[nn.ModuleDict]  # [in, 1]
    glora_D: Trainable[nn.ModuleDict]  # [out]
    glora_E: Trainable[nn.ModuleDict]  # [out]
    r: Aux[dict]
    kinds = (kinds.Linear, kinds.Conv1D)
    weight_need = "read"
    prefer_weight_path = True
    standalone_delta = False

    def create(self, name: str, cfg: Any) -> None:
        out, n_in, zero = self.out_features, self.in_features, cfg.init_weights
        self.r[name] = cfg.r
        has_bias = self.base_bias() is not None
        c, d = (cfg.config_C, cfg.config_D_E) if has_bias else ("none", "none")
        self.glora_A[name] = GloraPath(cfg.config_A_B, out, n_in, cfg.r, zero)
        self.glora_B[name] = GloraPath(cfg.config_A_B, out, n_in, cfg.r, zero)
        self.glora_C[name] = GloraPath(c, n_in, 1, cfg.r, zero)
        self.glora_D[name] = GloraPath(d, out, 0, cfg.r, zero)
        self.glora_E[name] = GloraPath(d, out, 0, cfg.r, zero)

    def _value(self, path: nn.ModuleDict, name: str) -> Any:
        return path[name].value()  # type: ignore[operator]

    def _own(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """In the dtype of the adapter, also where no path makes it so."""
        return tensor.to(self.adapter_dtype(name) or tensor.dtype)

    def delta_weight(self, name: str) -> torch.Tensor:
        return self._own(name, self.base_weight() * self._value(self.glora_A, name) + self._value(self.glora_B, name))

    def delta_bias(self, name: str) -> torch.Tensor | None:
        bias = self.base_bias()
        if bias is None:
            return None
        c = self._value(self.glora_C, name)
        moved = 0.0 if isinstance(c, float) else (self.base_weight().to(c.dtype) @ c)[:, 0]
        return self._own(name, bias * self._value(self.glora_D, name) + self._value(self.glora_E, name) + moved)


@register_method("glora", config=GloraConfig)
class GloraModel(TunerModel):
    layer_cls = GloraLayer
    example = {"r": 2}
