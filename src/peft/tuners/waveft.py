# SPDX-License-Identifier: Apache-2.0
"""WaveFT: Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets (arXiv 2505.12532).

ΔW = s · M_out S M_inᵀ, S sparse with n trained wavelet coefficients at seeded positions (use_idwt=False: ΔW = s · S).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import (
    PeftConfig,
    biases,
    excludes,
    fan_in_fan_out,
    layer_names,
    layer_range,
    nearest,
    option,
    saves,
    targets,
)
from ..core import kinds
from ..core.layer import AdapterLayer
from ..core.match import pattern_value
from ..core.slots import Aux, Trainable
from ..core.tuner import TunerModel
from ..ops import sparse, wavelet
from ..ops.wavelet_filters import FILTERS
from ..registry import register_method
from .fourierft import check_count, seeded_positions

PUBLISHED_FAMILIES = [
    *(f"db{i}" for i in range(1, 39)),
    *(f"sym{i}" for i in range(2, 21)),
    *(f"coif{i}" for i in range(1, 18)),
]


@dataclass
class WaveFTConfig(PeftConfig):
    """Options of WaveFT."""

    n_frequency: int = option(2592, "Number of trained coefficients a layer.")
    scaling: float = option(25.0, "Factor of the update.")
    wavelet_family: str = option("db1", "Wavelet: db1..db10, sym2..sym10, coif1..coif5.")
    use_idwt: bool = option(True, "False: the coefficients are entries of the weight.")
    random_loc_seed: int = option(777, "Seed of the positions; part of the file format.")
    fan_in_fan_out: bool = fan_in_fan_out()
    target_modules: list[str] | set[str] | str | None = targets()
    exclude_modules: list[str] | set[str] | str | None = excludes()
    bias: str = biases("waveft_only")
    modules_to_save: list[str] | None = saves()
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    n_frequency_pattern: dict | None = option(factory=dict, help="Numbers that differ: {name or regex: n_frequency}.")
    proportional_parameters: bool = option(False, "Share n_frequency x layers out in proportion to the layers' sizes.")
    init_weights: bool = option(True, "Start at zero.")

    def __post_init__(self) -> None:
        super().__post_init__()
        family, valid = self.wavelet_family, FILTERS if self.use_idwt else PUBLISHED_FAMILIES
        if family not in valid:
            raise ValueError(
                f"Unknown wavelet family {family!r}; use one of {', '.join(FILTERS)}.{nearest(family, valid)}"
            )


class WaveFTLayer(AdapterLayer):
    """Adds a matrix that is sparse in a wavelet basis."""

    waveft_spectrum: Trainable[nn.ParameterDict]  # [n]
    waveft_n_frequency: Aux[dict]
    waveft_scaling: Aux[dict]
    waveft_random_loc_seed: Aux[dict]
    waveft_wavelet_family: Aux[dict]
    waveft_use_idwt: Aux[dict]
    waveft_indices: Aux[dict]  # [2, n]
    _waveft_basis: Aux[dict]  # the same positions among the coefficients
    kinds = (kinds.Linear, kinds.Conv1D)
    prefer_weight_path = True

    def create(self, name: str, cfg: Any) -> None:
        n = cfg.n_frequency
        self.waveft_n_frequency[name], self.waveft_scaling[name] = n, cfg.scaling
        self.waveft_random_loc_seed[name], self.waveft_use_idwt[name] = cfg.random_loc_seed, cfg.use_idwt
        self.waveft_wavelet_family[name] = cfg.wavelet_family
        shape = (self.out_features, self.in_features)
        self.waveft_indices[name] = seeded_positions(n, shape, cfg.random_loc_seed)
        rows, cols = self.waveft_indices[name]
        if cfg.use_idwt:
            self._waveft_basis[name] = wavelet.basis(rows, cols, shape, cfg.wavelet_family)
        self.waveft_spectrum[name] = nn.Parameter(torch.zeros(n) if cfg.init_weights else 0.01 * torch.randn(n))

    def _few(self, x: torch.Tensor) -> bool:
        """Whether x has so few rows (decoding) that transforming them costs less than making the dense weight."""
        return 8 * (x.numel() // x.shape[-1]) < min(self.in_features, self.out_features)

    def _adapt_weight(self, names: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
        return self._adapt_activations(names, x) if self._few(x) else super()._adapt_weight(names, x)

    def delta(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not self._few(x):
            return super().delta(name, x, y)
        c, scale = self.waveft_spectrum[name], self.waveft_scaling[name]
        if self.waveft_use_idwt[name]:
            return wavelet.multiply(x, c, self._waveft_basis[name], scale)
        rows, cols = self.waveft_indices[name].to(c.device)
        return sparse.multiply(x, c, rows, cols, self.out_features, scale)

    def delta_weight(self, name: str) -> torch.Tensor:
        c, scale = self.waveft_spectrum[name], self.waveft_scaling[name]
        if self.waveft_use_idwt[name]:
            return wavelet.matrix(c, self._waveft_basis[name], scale)
        rows, cols = self.waveft_indices[name].to(c.device)
        return c.new_zeros(self.out_features, self.in_features).index_put_((rows, cols), c * scale)


@register_method("waveft", config=WaveFTConfig)
class WaveFTModel(TunerModel):
    layer_cls = WaveFTLayer
    unsupported_error = TypeError
    example = {"n_frequency": 20}
    patterned = {"n_frequency": "n_frequency_pattern"}

    def shared(self, name: str, cfg: Any, targets: dict[str, nn.Module]) -> None:
        """The budget of each layer when it is shared out by size."""
        sizes = {key: self.target_shape(m)[0] * self.target_shape(m)[1] for key, m in targets.items()}
        total, budget = sum(sizes.values()), cfg.n_frequency * len(sizes)
        self._budget = (
            {k: max(1, round(s / total * budget)) for k, s in sizes.items()} if cfg.proportional_parameters else {}
        )

    def layer_config(self, cfg: Any, key: str, module: nn.Module) -> Any:
        cfg = super().layer_config(cfg, key, module)
        return cfg.with_values(n_frequency=self._budget.get(key, cfg.n_frequency))

    def check_target(self, cfg: Any, key: str, module: nn.Module) -> None:
        check_count(pattern_value(cfg.n_frequency_pattern, key, cfg.n_frequency), key, self.target_shape(module))
