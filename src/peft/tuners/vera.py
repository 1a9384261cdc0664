# SPDX-License-Identifier: Apache-2.0
"""VeRA: Vector-based Random Matrix Adaptation (arXiv 2310.11454).

y = W x + b + diag(λ_b) B diag(λ_d) A dropout(x), with random frozen A, B shared by all layers and trained vectors
λ_b, λ_d.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig, biases, fan_in_fan_out, layer_names, layer_range, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer, dropout, dropout_p
from ..core.slots import Aux, BufferDict, Shared, Trainable
from ..core.tuner import TunerModel
from ..ops.low_rank import Factors
from ..registry import register_method


@dataclass
class VeraConfig(PeftConfig):
    """Options of VeRA."""

    r: int = option(256, "Rank of the shared projections.")
    target_modules: list[str] | set[str] | str | None = targets()
    projection_prng_key: int = option(0, "Seed of the shared projections.")
    save_projection: bool = option(
        True, "Store the projections in the file, which is then independent of the random generator."
    )
    vera_dropout: float = option(0.0, "Dropout on the input of A.")
    d_initial: float = option(0.1, "Initial value of λ_d.")
    fan_in_fan_out: bool = fan_in_fan_out()
    bias: str = biases("vera_only")
    modules_to_save: list[str] | None = saves()
    init_weights: bool = option(True, "Start at zero; False draws λ_d and sets λ_b to one.")
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    _regex_with_layers = "warn"
    _positive = ("r",)

    def __post_init__(self) -> None:
        super().__post_init__()
        warn_if_not_saved(self, "vera_A and vera_B")


def warn_if_not_saved(cfg: Any, what: str) -> None:
    if not cfg.save_projection:
        warnings.warn(
            f"Specified to not save {what} within the state dictionary, instead they will be restored using the PRNG "
            "key store in `config.projection_prng_key`. Consider setting `config.save_projection` to `True` to "
            "guarantee restoring the checkpoint correctly on all system configurations.",
            stacklevel=5,
        )


class VeraLayer(AdapterLayer):
    """A whole method's maths: two trained vectors around two shared random matrices."""

    vera_lambda_b: Trainable[nn.ParameterDict]  # [out]
    vera_lambda_d: Trainable[nn.ParameterDict]  # [r]
    vera_A: Shared[BufferDict]  # [r, max_in]
    vera_B: Shared[BufferDict]  # [max_out, r]
    vera_dropout: Aux[nn.ModuleDict]
    r: Aux[dict]
    kinds = (kinds.Linear, kinds.Conv1D)

    def create(self, name: str, cfg: Any) -> None:
        self.r[name], self.vera_dropout[name] = cfg.r, dropout(cfg.vera_dropout)
        self.vera_lambda_b[name], self.vera_lambda_d[name] = start(cfg, self.out_features, cfg.r)

    def factors(self, name: str) -> Factors:
        d, b = self.vera_lambda_d[name], self.vera_lambda_b[name]
        A = self.vera_A[name][:, : self.in_features].to(d.device)
        B = self.vera_B[name][: self.out_features].to(b.device)
        return Factors(A, b[:, None] * B, d, dropout_p(self.vera_dropout[name]))


def start(cfg: Any, out: int, width: int) -> tuple[nn.Parameter, nn.Parameter]:
    """λ_b [out] and λ_d [width]."""
    drawn = torch.randn(width)  # in any case: the published library consumes it too
    if cfg.init_weights:
        return nn.Parameter(torch.zeros(out)), nn.Parameter(torch.full((width,), cfg.d_initial))
    return nn.Parameter(torch.ones(out)), nn.Parameter(drawn)


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Kaiming-uniform draw, U(-c, c) with c = sqrt(6 / fan_in); part of the file format when the projections are
    not saved.
    """
    bound = math.sqrt(6 / shape[1])
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)


class SharedProjections:
    """Frozen random A and B of a tuner, drawn from a seed for the largest target in each dimension (also PVeRA)."""

    projections: dict[str, int]  # slot of A, slot of B -> multiple of r

    def shared(self: Any, name: str, cfg: Any, targets: dict[str, nn.Module]) -> None:
        """A first, then B, from one CPU generator."""
        shapes = [self.target_shape(m) for m in targets.values()]
        generator = torch.Generator(device="cpu").manual_seed(cfg.projection_prng_key)
        (slot_a, times_a), (slot_b, times_b) = self.projections.items()
        sizes = (
            (slot_a, (times_a * cfg.r, max(s[1] for s in shapes))),
            (slot_b, (max(s[0] for s in shapes), times_b * cfg.r)),
        )
        for slot, shape in sizes:
            container = getattr(self, slot)
            container.persistent = cfg.save_projection
            container[name] = _uniform(shape, generator)

    def import_state(self: Any, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Files without projections rely on the seed; files with them are taken at their word."""
        slots, cfg = tuple(self.projections), self.peft_config[name]
        if cfg.save_projection and not any(k.endswith(tuple("." + s for s in slots)) for k in state):
            raise ValueError(
                f"Specified to load {' and '.join(slots)} from state dictionary however they were not present! "
                "Set save_projection=False in adapter_config.json to draw them again from projection_prng_key."
            )
        if not cfg.save_projection:
            warnings.warn(
                f"Specified to not load {' and '.join(slots)} from state dictionary. This means we will be relying "
                "on PRNG initialisation to restore these projections using `config.projection_prng_key`, which may not "
                "be accurate on all system configurations.",
                stacklevel=2,
            )
        return state


@register_method("vera", config=VeraConfig, prefix="vera_lambda_")
class VeraModel(SharedProjections, TunerModel):
    layer_cls = VeraLayer
    uses_shared_state = True
    projections = {"vera_A": 1, "vera_B": 1}
    example = {"r": 4}
    unsupported_error = TypeError
