# SPDX-License-Identifier: Apache-2.0
"""RandLoRA: Full-rank parameter-efficient fine-tuning of large models (arXiv 2502.00987).

ΔW = α / r · Σ_j B_j diag(λ_j) A diag(γ_j): many shared random bases of rank r, scaled by trained vectors.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig, biases, fan_in_fan_out, layer_names, layer_range, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer, dropout
from ..core.slots import Aux, BufferDict, Shared, Trainable
from ..core.tuner import TunerModel
from ..ops.dispatch import recomputed
from ..registry import register_method
from .vera import warn_if_not_saved

COPIES_UP_TO = 1 << 20  # bytes of repeated bases that a file may hold


@dataclass
class RandLoraConfig(PeftConfig):
    """Options of RandLoRA. A smaller r means more bases and more parameters."""

    r: int = option(32, "Rank of one basis.")
    target_modules: list[str] | set[str] | str | None = targets()
    projection_prng_key: int = option(0, "Seed of the bases.")
    save_projection: bool = option(True, "Store the bases in the file (once).")
    sparse: bool = option(False, "Ternary bases, one third non-zero.")
    very_sparse: bool = option(False, "Ternary bases with 1/sqrt(width) non-zero.")
    randlora_dropout: float = option(0.0, "Dropout on the input.")
    fan_in_fan_out: bool = fan_in_fan_out()
    randlora_alpha: int = option(640, "The update is scaled by randlora_alpha / r.")
    bias: str = biases("randlora_only")
    modules_to_save: list[str] | None = saves()
    init_weights: bool = option(True, "Start at zero.")
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: str | None = layer_names()
    _positive = ("r",)

    def __post_init__(self) -> None:
        super().__post_init__()
        warn_if_not_saved(self, "the random bases")

    def _check_layer_range(self) -> None:
        """Never checked by the published library; a pattern without layers is simply unused."""


class RandLoraLayer(AdapterLayer):
    """A full-rank update from scaled random bases."""

    randlora_lambda: Trainable[nn.ParameterDict]  # [r, bases]
    randlora_gamma: Trainable[nn.ParameterDict]  # [bases, min(in, out)]
    randlora_A: Shared[BufferDict]  # [r, 1, min_dim]
    randlora_B: Shared[BufferDict]  # [max_dim, bases, r]
    randlora_dropout: Aux[nn.ModuleDict]
    r: Aux[dict]
    scaling: Aux[dict]
    kinds = (kinds.Linear, kinds.Conv1D)
    prefer_weight_path = True
    input_dropout = "randlora_dropout"

    def create(self, name: str, cfg: Any) -> None:
        r, small = cfg.r, min(self.in_features, self.out_features)
        large, bases = max(self.in_features, self.out_features), math.ceil(small / r)
        self.r[name], self.scaling[name] = r, cfg.randlora_alpha / r
        self.randlora_dropout[name] = dropout(cfg.randlora_dropout)
        drawn = torch.randn(r, bases)  # drawn in any case: the published library consumes it too
        start = 1 / max(bases, small) if cfg.init_weights else 1 / large
        self.randlora_lambda[name] = nn.Parameter(torch.zeros(r, bases) if cfg.init_weights else drawn)
        self.randlora_gamma[name] = nn.Parameter(torch.full((bases, small), start))

    def delta_weight(self, name: str) -> torch.Tensor:
        """[out, in]. The two factors are flattened in different orders; files rely on it."""
        lam, gamma = self.randlora_lambda[name], self.randlora_gamma[name]
        small, large = sorted((self.in_features, self.out_features))
        A = self.randlora_A[name][: lam.shape[0], 0, :small].to(lam)  # [r, small]
        B = self.randlora_B[name][:large, : lam.shape[1], : lam.shape[0]].to(lam).flatten(1)  # [large, bases · r]
        S = recomputed(scaled_bases, lam, A, gamma)  # [r · bases, small]
        core = (B @ S) * self.scaling[name]
        return core if self.in_features == small else core.T


def scaled_bases(lam: torch.Tensor, A: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """λ [r, bases], A [r, small], γ [bases, small] -> [r · bases, small]."""
    return (lam[:, :, None] * A[:, None] * gamma).flatten(0, 1)


def dense_bases(r: int, shape: tuple[int, int, int], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, 1, min_dim] and B [max_dim, bases, r], drawn in bfloat16 with unit standard deviation; part of the file
    format.
    """
    large, bases, small = shape

    def draw(*size: int) -> torch.Tensor:
        empty = torch.empty(*size, dtype=torch.bfloat16, device="cpu")
        return nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)

    A = draw(r, 1, small)
    B = torch.cat([draw(large, 1, r) for _ in range(bases)], dim=1)
    return A / A.std(), B / B.std()


def sparse_bases(
    r: int, shape: tuple[int, int, int], generator: torch.Generator, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with entries -1, 0, 1 of density 1 / factor."""
    large, bases, small = shape

    def draw(*size: int) -> torch.Tensor:
        u = torch.rand(size, generator=generator, device="cpu")
        ternary = (u > 1 - 1 / (2 * factor)).float() - (u < 1 / (2 * factor)).float()
        return ternary / ternary.std()

    return draw(r, 1, small), draw(large, bases, r)


@register_method("randlora", config=RandLoraConfig)
class RandLoraModel(TunerModel):
    layer_cls = RandLoraLayer
    example = {"r": 4, "randlora_alpha": 8}

    def shared(self, name: str, cfg: Any, targets: dict[str, nn.Module]) -> None:
        shapes = [self.target_shape(m) for m in targets.values()]
        small, large = sorted((max(s[0] for s in shapes), max(s[1] for s in shapes)))
        generator = torch.Generator(device="cpu").manual_seed(cfg.projection_prng_key)
        shape = (large, math.ceil(small / cfg.r), small)
        if cfg.sparse or cfg.very_sparse:
            A, B = sparse_bases(cfg.r, shape, generator, math.sqrt(small) if cfg.very_sparse else 3)
        else:
            A, B = dense_bases(cfg.r, shape, generator)
        for container, value in ((self.randlora_A, A), (self.randlora_B, B)):
            container.persistent = cfg.save_projection
            container[name] = value

    def export_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Published files repeat the bases under every layer (gigabytes on real models). Readers get by with the
        model's pair, so the copies are only written while they are small.
        """
        ends = {k.rpartition(".")[2]: v for k, v in state.items()}
        bases = {slot: ends[slot] for slot in ("randlora_A", "randlora_B") if slot in ends}
        layers = [k.removesuffix("randlora_lambda") for k in state if k.endswith(".randlora_lambda")]
        if len(layers) * sum(v.numel() * v.element_size() for v in bases.values()) > COPIES_UP_TO:
            return state
        return state | {prefix + slot: v for prefix in layers for slot, v in bases.items()}

    def import_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Published files hold a copy of the bases under every layer; the pair of the model is enough."""
        return {k: v for k, v in state.items() if not k.endswith((".randlora_A", ".randlora_B")) or k.count(".") <= 1}
