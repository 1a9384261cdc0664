# SPDX-License-Identifier: Apache-2.0
"""FourierFT: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform (arXiv 2405.03003).

ΔW = s · Re(ifft2(S)), S sparse with n trained entries at seeded positions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig, biases, excludes, fan_in_fan_out, layer_names, layer_range, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer
from ..core.match import dotted_value
from ..core.slots import Aux, Trainable
from ..core.tuner import TunerModel
from ..ops.dispatch import wide
from ..registry import register_method


@dataclass
class FourierFTConfig(PeftConfig):
    """Options of FourierFT."""

    n_frequency: int = option(1000, "Number of trained entries of the spectrum.")
    scaling: float = option(150.0, "Factor of the update.")
    random_loc_seed: int | None = option(777, "Seed of their positions; part of the file format.")
    fan_in_fan_out: bool = fan_in_fan_out()
    target_modules: list[str] | set[str] | str | None = targets()
    exclude_modules: list[str] | set[str] | str | None = excludes()
    bias: str = biases("fourier_only")
    modules_to_save: list[str] | None = saves()
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    n_frequency_pattern: dict | None = option(factory=dict, help="Numbers that differ: {name or regex: n_frequency}.")
    init_weights: bool = option(False, "True starts at zero; False (the published default) draws the entries.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.random_loc_seed is None:
            raise ValueError(
                "`random_loc_seed` must be an integer: it decides the positions, which are not stored in the file."
            )


def seeded_positions(count: int, shape: tuple[int, int], seed: int) -> torch.Tensor:
    """[2, count] row and column indices, drawn without repetition; part of the file format."""
    chosen = torch.randperm(
        shape[0] * shape[1], generator=torch.Generator(device="cpu").manual_seed(seed), device="cpu"
    )[:count]
    return torch.stack([chosen // shape[1], chosen % shape[1]])


def half_spectrum(indices: torch.Tensor, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, columns [n] up to in/2, and factors that give Re(ifft2(S)) = irfft2: an entry (k, l) of a real S counts as
    half of (k, l) and half of (-k, -l), which is the other one of the pair that irfft2 makes of it. In columns that are
    their own mirror image irfft2 takes the real part, so the entry counts whole.
    """
    (rows, cols), (height, width) = indices, shape
    mirrored = 2 * cols > width
    rows, cols = torch.where(mirrored, -rows % height, rows), torch.where(mirrored, width - cols, cols)
    return rows, cols, torch.where((cols == 0) | (2 * cols == width), 1.0, 0.5)


class FourierFTLayer(AdapterLayer):
    """Adds the inverse Fourier transform of a sparse spectrum."""

    fourierft_spectrum: Trainable[nn.ParameterDict]  # [n]
    fourierft_n_frequency: Aux[dict]
    fourierft_scaling: Aux[dict]
    fourierft_random_loc_seed: Aux[dict]
    indices: Aux[dict]  # [2, n]
    _fourierft_half: Aux[dict]  # rows, columns and factors of the same entries in the half that irfft2 takes
    kinds = (kinds.Linear, kinds.Conv1D)
    prefer_weight_path = True

    def create(self, name: str, cfg: Any) -> None:
        n = cfg.n_frequency
        self.fourierft_n_frequency[name], self.fourierft_scaling[name] = n, cfg.scaling
        self.fourierft_random_loc_seed[name] = cfg.random_loc_seed
        self.indices[name] = seeded_positions(n, (self.out_features, self.in_features), cfg.random_loc_seed)
        self._fourierft_half[name] = half_spectrum(self.indices[name], (self.out_features, self.in_features))
        drawn = torch.randn(n)
        self.fourierft_spectrum[name] = nn.Parameter(torch.zeros(n) if cfg.init_weights else drawn)

    def delta_weight(self, name: str) -> torch.Tensor:
        c = self.fourierft_spectrum[name]
        rows, cols, factors = (part.to(c.device) for part in self._fourierft_half[name])
        values = wide(c) * (factors * self.fourierft_scaling[name])
        out, n_in = self.out_features, self.in_features
        half = values.new_zeros(out, n_in // 2 + 1).index_put_((rows, cols), values, accumulate=True)
        return torch.fft.irfft2(half, s=(out, n_in)).to(c.dtype)


def check_count(n: int, key: str, shape: tuple[int, ...]) -> None:
    """ValueError unless 0 < n_frequency <= in · out for the target `key`."""
    most = shape[0] * shape[1]
    if not 0 < n <= most:
        raise ValueError(f"Target module {key}: `n_frequency` must be above 0 and at most in · out = {most}, got {n}.")


@register_method("fourierft", config=FourierFTConfig)
class FourierFTModel(TunerModel):
    layer_cls = FourierFTLayer
    unsupported_error = TypeError
    example = {"n_frequency": 20, "init_weights": True}
    patterned = {"n_frequency": "n_frequency_pattern"}

    def layer_config(self, cfg: Any, key: str, module: nn.Module) -> Any:
        return cfg.with_values(n_frequency=dotted_value(cfg.n_frequency_pattern, key, cfg.n_frequency))

    def check_target(self, cfg: Any, key: str, module: nn.Module) -> None:
        check_count(self.layer_config(cfg, key, module).n_frequency, key, self.target_shape(module))
