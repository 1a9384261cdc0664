# SPDX-License-Identifier: Apache-2.0
"""PVeRA: Probabilistic Vector-Based Random Matrix Adaptation (arXiv 2512.07703).

y = W x + b + λ_b ⊙ B h with h ~ N(μ, σ²), (μ, log σ²) = λ_d ⊙ A dropout(x); shared frozen A, B as in VeRA. The mean
is used in inference.
"""

import zlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..config import PeftConfig, biases, fan_in_fan_out, layer_names, layer_range, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer, dropout, dropout_p
from ..core.slots import Aux, BufferDict, Shared, Trainable
from ..core.tuner import TunerModel
from ..ops import low_rank, sampled
from ..ops.low_rank import Factors
from ..registry import register_method
from .vera import SharedProjections, start, warn_if_not_saved


@dataclass
class PveraConfig(PeftConfig):
    """Options of PVeRA."""

    r: int = option(256, "Rank of the shared projections.")
    target_modules: list[str] | set[str] | str | None = targets()
    projection_prng_key: int = option(0, "Seed of the shared projections.")
    save_projection: bool = option(True, "Store the projections in the file.")
    pvera_dropout: float = option(0.0, "Dropout on the input of A.")
    d_initial: float = option(0.1, "Initial value of λ_d.")
    fan_in_fan_out: bool = fan_in_fan_out()
    bias: str = biases("pvera_only")
    modules_to_save: list[str] | None = saves()
    init_weights: bool = option(True, "Start at zero.")
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    sample_at_inference: bool = option(False, "Sample in inference too.")
    generator_seed: int | None = option(None, "Seed of a generator of its own for the noise.")
    _regex_with_layers = "warn"
    _positive = ("r",)

    def __post_init__(self) -> None:
        super().__post_init__()
        warn_if_not_saved(self, "pvera_A and pvera_B")


class PveraLayer(AdapterLayer):
    """VeRA with a random hidden state."""

    pvera_lambda_b: Trainable[nn.ParameterDict]  # [out]
    pvera_lambda_d: Trainable[nn.ParameterDict]  # [2 r]: mean, log-variance
    pvera_A: Shared[BufferDict]  # [2 r, max_in]
    pvera_B: Shared[BufferDict]  # [max_out, r]
    pvera_dropout: Aux[nn.ModuleDict]
    r: Aux[dict]
    sample_at_inference: Aux[dict]
    generators: Aux[dict]
    kinds = (kinds.Linear, kinds.Conv1D)

    def create(self, name: str, cfg: Any) -> None:
        self.r[name], self.pvera_dropout[name] = cfg.r, dropout(cfg.pvera_dropout)
        self.sample_at_inference[name] = cfg.sample_at_inference
        seed = cfg.generator_seed
        self.generators[name] = None if seed is None else torch.Generator(device="cpu").manual_seed(seed)
        self.pvera_lambda_b[name], self.pvera_lambda_d[name] = start(cfg, self.out_features, 2 * cfg.r)

    def factors(self, name: str) -> Factors:
        """The mean: the log-variance half is not needed."""
        r, d, b = self.r[name], self.pvera_lambda_d[name], self.pvera_lambda_b[name]
        A = self.pvera_A[name][:r, : self.in_features].to(d.device)
        B = self.pvera_B[name][: self.out_features].to(b.device)
        return Factors(A, b[:, None] * B, d[:r], dropout_p(self.pvera_dropout[name]))

    def delta(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not (self.training or self.sample_at_inference[name]):
            return low_rank.delta(x, self.factors(name), self.training)
        A = self.pvera_A[name][:, : self.in_features].to(x.device)
        z = F.linear(self.pvera_dropout[name](x), A.to(x.dtype))
        generator, d, b = self.generators[name], self.pvera_lambda_d[name], self.pvera_lambda_b[name]
        shape, device = (*z.shape[:-1], self.r[name]), "cpu" if generator else z.device
        noise = torch.randn(shape, generator=generator, device=device, dtype=d.dtype)
        B = b[:, None] * self.pvera_B[name][: self.out_features].to(x.device)
        return sampled.multiply(z, d, noise.to(z.device), B)


@register_method("pvera", config=PveraConfig, prefix="pvera_lambda_")
class PveraModel(SharedProjections, TunerModel):
    layer_cls = PveraLayer
    uses_shared_state = True
    projections = {"pvera_A": 2, "pvera_B": 1}
    example = {"r": 4}

    def layer_config(self, cfg: Any, key: str, module: nn.Module) -> Any:
        """Noise of its own for each layer; the published library draws the same for all."""
        seed = cfg.generator_seed
        return cfg if seed is None else cfg.with_values(generator_seed=seed + zlib.crc32(key.encode()))
