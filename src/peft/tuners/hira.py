# SPDX-License-Identifier: Apache-2.0
"""HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models (ICLR 2025, OpenReview TwJrTz9cRS).

ΔW = W ⊙ (B A) with the base weight W.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..config import PeftConfig, excludes, fan_in_fan_out, layer_names, layer_range, option, positive, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer, dropout, kaiming
from ..core.slots import Aux, Trainable
from ..core.tuner import TunerModel
from ..registry import register_method


@dataclass
class HiraConfig(PeftConfig):
    """Options of HiRA."""

    r: int = option(32, "Rank of the factors.")
    target_modules: list[str] | set[str] | str | None = targets()
    exclude_modules: list[str] | set[str] | str | None = excludes()
    hira_dropout: float = option(0.0, "Dropout on the input.")
    fan_in_fan_out: bool = fan_in_fan_out()
    modules_to_save: list[str] | None = saves()
    init_weights: bool | Literal["gaussian"] | None = option(True, "Start at zero (B = 0); False draws both factors.")
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    rank_pattern: dict | None = option(factory=dict, help="Ranks that differ: {name or regex: rank}.")
    _pattern_alone = True


class HiraLayer(AdapterLayer):
    """Multiplies the base weight elementwise by 1 + B A."""

    hira_A: Trainable[nn.ParameterDict]  # [r, in]; convolutions [r, in, *kernel]
    hira_B: Trainable[nn.ParameterDict]  # [out, r]; convolutions [out, r, 1, ...]
    hira_embedding_A: Trainable[nn.ParameterDict]  # [r, num_embeddings]
    hira_embedding_B: Trainable[nn.ParameterDict]  # [dim, r]
    hira_dropout: Aux[nn.ModuleDict]
    r: Aux[dict]
    kinds = (kinds.Linear, kinds.Conv1D, kinds.Embedding, kinds.Conv1d, kinds.Conv2d, kinds.Conv3d)
    weight_need = "read"
    prefer_weight_path = True
    input_dropout = "hira_dropout"
    standalone_delta = False

    def create(self, name: str, cfg: Any) -> None:
        r, init = positive("r", cfg.r), cfg.init_weights
        if isinstance(init, str) and init.lower() != "gaussian":
            raise ValueError(f"Unknown initialization init_weights={init!r}; use True, False or 'gaussian'.")
        self.r[name], self.hira_dropout[name] = r, dropout(cfg.hira_dropout)
        out, n_in, *kernel = self.kind.shape(self.get_base_layer())
        A, B = torch.randn(r, n_in, *kernel), torch.randn(out, r, *(1,) * len(kernel))
        if self.kind is kinds.Embedding:
            if init is not False:
                nn.init.zeros_(A)
                nn.init.normal_(B)
            self.hira_embedding_A[name], self.hira_embedding_B[name] = nn.Parameter(A), nn.Parameter(B)
            return
        if init:
            gaussian = isinstance(init, str) and not kernel
            A = nn.init.normal_(A, std=1 / r) if gaussian else kaiming(*A.shape)
            B = torch.zeros_like(B)
        self.hira_A[name], self.hira_B[name] = nn.Parameter(A), nn.Parameter(B)

    def _factor(self, name: str) -> torch.Tensor:
        """B A as [out, in, *kernel]."""
        if self.kind is kinds.Embedding:
            return self.hira_embedding_B[name] @ self.hira_embedding_A[name]
        A, B = self.hira_A[name], self.hira_B[name]
        return (B.flatten(1) @ A.flatten(1)).view(B.shape[0], *A.shape[1:])

    def delta_weight(self, name: str) -> torch.Tensor:
        return self.base_weight() * self._factor(name)

    def delta(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.kind is not kinds.Embedding:
            return super().delta(name, x, y)
        rows = self.kind.look_up(self.get_base_layer(), x, self.hira_embedding_A[name].T)  # only the rows that are used
        return y * (rows @ self.hira_embedding_B[name].T)

    def weight_path_allowed(self, names: tuple[str, ...]) -> bool:
        return self.kind is not kinds.Embedding and super().weight_path_allowed(names)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """B A, the published (multiplicative) meaning; the additive delta is W ⊙ (B A)."""
        return self._to_storage(self._factor(adapter))


@register_method("hira", config=HiraConfig, mixed=True)
class HiraModel(TunerModel):
    layer_cls = HiraLayer
    example = {"r": 4}
    patterned = {"r": "rank_pattern"}

    def set_orientation(self, cfg: HiraConfig, layers: dict[str, AdapterLayer]) -> None:
        """Published files keep `fan_in_fan_out` as it was given."""

    def import_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Published files ignore the rank pattern: every layer has rank r."""
        from ..io.keys import misfits, resize

        r = self.peft_config[name].r
        for entry, value in misfits(self, name, state):
            own = entry.tensor.shape
            if tuple(value.shape) in ((r, *own[1:]), (own[0], r, *own[2:])):
                resize(entry, value.shape)
                entry.layer.r[name] = r  # type: ignore
        return state
