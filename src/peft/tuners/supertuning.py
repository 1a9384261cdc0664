# SPDX-License-Identifier: Apache-2.0
"""Super-Tuning (arXiv 2607.09287).

W' = W + ΔW with trained entries where |W| is largest (or smallest), and a LoRA besides if a rank is given ("Supra").
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer, dropout
from ..core.slots import Aux, BufferDict, Saved, Trainable
from ..core.tuner import TunerModel
from ..registry import register_method


@dataclass
class SupertuningConfig(PeftConfig):
    """Options of Super-Tuning."""

    target_modules: list[str] | set[str] | str | None = targets()
    modules_to_save: list[str] | None = saves()
    sparsity: float = option(0.99, "Share of entries that are left alone, in [0, 1).")
    select_top: bool = option(True, "Train the largest magnitudes; False the smallest.")
    r: int | None = option(None, "Rank of an additional LoRA; None for none.")
    lora_alpha: float | None = option(None, "The LoRA is scaled by lora_alpha / r; default 2 r.")
    lora_dropout: float = option(0.0, "Dropout on the input of the LoRA.")
    init_weights: bool = option(True, "Start at zero.")
    save_precomputed_indices: bool = option(
        True, "Store the positions; otherwise they are found again from the base weight."
    )
    _positive = ("r",)
    _shares = ("sparsity",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sparsity", "lora_dropout"):
            if getattr(self, name) == 1:
                raise ValueError(f"`{name}` must be below 1, which leaves nothing to train.")
        if self.r is None and self.lora_alpha is not None:
            raise ValueError("`lora_alpha` only has an effect with `r`.")
        if self.r is not None and self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        if not self.save_precomputed_indices:
            warnings.warn(
                "With save_precomputed_indices=False the positions are recomputed from the base weights "
                "on loading, which must then be exactly the same.",
                stacklevel=4,
            )


def trained(numel: int, cfg: Any) -> int:
    """How many of the entries of a weight are trained."""
    return int(numel * (1 - cfg.sparsity))


class SupertuningLayer(AdapterLayer):
    """Adds a sparse matrix, and a low-rank one if asked for."""

    supertuning_values: Trainable[nn.ParameterDict]  # [n]
    supertuning_lora_A: Trainable[nn.ModuleDict]  # weight [r, in]
    supertuning_lora_B: Trainable[nn.ModuleDict]  # weight [out, r]
    supertuning_indices: Saved[BufferDict]  # [n] int32, row-major
    supertuning_rank: Aux[dict]
    supertuning_lora_alpha: Aux[dict]
    supertuning_lora_dropout: Aux[nn.ModuleDict]
    kinds = (kinds.Linear, kinds.Conv1D)
    weight_need = "read"
    prefer_weight_path = True
    standalone_delta = False

    def create(self, name: str, cfg: Any) -> None:
        n = trained(self.in_features * self.out_features, cfg)
        self.supertuning_rank[name], self.supertuning_lora_alpha[name] = cfg.r or 0, cfg.lora_alpha
        self.supertuning_lora_dropout[name] = dropout(cfg.lora_dropout)
        self.supertuning_values[name] = nn.Parameter(torch.zeros(n) if cfg.init_weights else torch.randn(n))
        if not len(self.supertuning_indices):
            self.supertuning_indices.persistent = cfg.save_precomputed_indices
        self.supertuning_indices[name] = self._positions(n, cfg.select_top)
        if cfg.r:
            A, B = self.kind.low_rank(self.get_base_layer(), cfg.r)
            nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))  # type: ignore
            nn.init.zeros_(B.weight) if cfg.init_weights else nn.init.kaiming_uniform_(B.weight, a=math.sqrt(5))  # type: ignore
            self.supertuning_lora_A[name], self.supertuning_lora_B[name] = A, B

    @torch.no_grad()
    def _positions(self, n: int, largest: bool) -> torch.Tensor:
        weight = self.base_weight()
        if weight.device.type == "meta":
            return torch.zeros(n, dtype=torch.int32, device="meta")
        return weight.abs().flatten().topk(n, largest=largest).indices.to(torch.int32)

    def _sparse(self, name: str) -> torch.Tensor:
        values, indices = self.supertuning_values[name], self.supertuning_indices[name].long()
        flat = values.new_zeros(self.out_features * self.in_features).index_put_((indices.to(values.device),), values)
        return flat.view(self.out_features, self.in_features)

    def _scale(self, name: str) -> float:
        """Of the LoRA; 0 if there is none."""
        r = self.supertuning_rank[name]
        return self.supertuning_lora_alpha[name] / r if r else 0.0

    def delta_weight(self, name: str) -> torch.Tensor:
        sparse, scale = self._sparse(name), self._scale(name)
        if not scale:
            return sparse
        return sparse + scale * (self.supertuning_lora_B[name].weight @ self.supertuning_lora_A[name].weight)  # type: ignore

    def delta(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out, scale = self.kind.call(self.get_base_layer(), x, self._sparse(name)), self._scale(name)
        if scale:
            z = self.supertuning_lora_A[name](self.supertuning_lora_dropout[name](x))
            out = out + self.supertuning_lora_B[name](z * scale)
        return out


@register_method("supertuning", config=SupertuningConfig)
class SupertuningModel(TunerModel):
    layer_cls = SupertuningLayer
    unsupported_error = TypeError
    example = {"sparsity": 0.9, "r": 2}

    def check_target(self, cfg: Any, key: str, module: nn.Module) -> None:
        out, n_in = self.target_shape(module)[:2]
        if trained(out * n_in, cfg) < 1:
            raise ValueError(
                f"Target module {key}: sparsity={cfg.sparsity} leaves none of {out * n_in} weights to train; lower it."
            )

    def check_config(self, name: str, cfg: Any) -> None:
        super().check_config(name, cfg)
        if {c.save_precomputed_indices for c in self.peft_config.values()} != {cfg.save_precomputed_indices}:
            raise ValueError("`save_precomputed_indices` must be the same for all adapters of a model.")
