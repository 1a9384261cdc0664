# SPDX-License-Identifier: Apache-2.0
"""SHiRA: Sparse High Rank Adapters (arXiv 2406.13175).

W' = W + ΔW with r·(in + out) trained entries at the positions of a mask.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig, fan_in_fan_out, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer
from ..core.slots import Aux, PersistentBufferDict, Saved, Trainable
from ..core.tuner import TunerModel
from ..registry import register_method


def random_mask(base_layer: nn.Module, r: int, random_seed: int | None = None, **kwargs: Any) -> torch.Tensor:
    """A 0/1 mask of the weight's shape with r·(in + out) ones at seeded positions."""
    kind: Any = kinds.kind_of(base_layer)  # knows the shape of packed weights
    rows, cols = kind.shape(base_layer)[:: -1 if kind.transposed else 1]
    generator = torch.Generator(device="cpu")
    if random_seed is not None:
        generator.manual_seed(random_seed)
    mask = torch.zeros(rows * cols, device="cpu")
    mask[torch.randperm(rows * cols, generator=generator, device="cpu")[: r * (rows + cols)]] = 1.0
    return mask.view(rows, cols)


@dataclass
class ShiraConfig(PeftConfig):
    """Options of SHiRA. For another `mask_type` than "random" set `config.mask_fn = f(base_layer, r, **kwargs) ->
    mask`.
    """

    r: int = option(32, "Budget: r·(in + out) entries a layer.")
    mask_type: str = option("random", "'random', or a name for your own mask_fn.")
    random_seed: int | None = option(None, "Seed of the random mask; None is a fixed seed too.")
    target_modules: list[str] | set[str] | str | None = targets()
    fan_in_fan_out: bool = fan_in_fan_out()
    init_weights: bool = option(True, "Start at zero; False draws the entries.")
    modules_to_save: list[str] | None = saves()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mask_fn: Callable[..., torch.Tensor] | None = random_mask if self.mask_type == "random" else None
        if self.mask_fn is None and not self.inference_mode:
            warnings.warn(
                f"Argument {self.mask_type=} is not recognized, please supply your own masking function "
                "by calling `config.mask_fn = my_mask_fn`.",
                stacklevel=4,
            )


class ShiraLayer(AdapterLayer):
    """Adds a sparse matrix to the weight."""

    shira_weight: Trainable[nn.ParameterDict]  # [n]
    shira_indices: Saved[PersistentBufferDict]  # [2, n] int32, rows and columns
    _unmasked: Aux[dict]  # adapter without positions until a file brings them -> its mask_type
    scaling: Aux[dict]
    r: Aux[dict]
    kinds = (kinds.Linear, kinds.Conv1D)
    prefer_weight_path = True

    def create(self, name: str, cfg: Any) -> None:
        self.r[name], self.scaling[name] = cfg.r, 1.0
        n = cfg.r * (self.in_features + self.out_features)
        indices = torch.zeros(2, n, dtype=torch.int64, device="cpu")  # without a mask the file has them
        if cfg.mask_fn is None:
            self._unmasked[name] = cfg.mask_type
        else:
            kwargs = {"random_seed": cfg.random_seed} if cfg.mask_type == "random" else {}
            indices = self.kind.canonical(cfg.mask_fn(self.get_base_layer(), cfg.r, **kwargs)).nonzero().T
            if indices.shape[1] != n:
                raise ValueError(
                    f"The mask of mask_type={cfg.mask_type!r} has {indices.shape[1]} ones for a layer of "
                    f"{self.in_features} -> {self.out_features} features, but r={cfg.r} asks for r·(in + out) = {n}."
                )
        self.shira_indices[name] = indices.to(torch.int32).contiguous()
        self.shira_weight[name] = nn.Parameter(torch.zeros(n) if cfg.init_weights else torch.randn(n))

    def delta_weight(self, name: str) -> torch.Tensor:
        if name in self._unmasked:
            raise ValueError(
                f"SHiRA adapter {name!r} has no positions: set `config.mask_fn` for mask_type="
                f"{self._unmasked[name]!r} before adding the adapter, or load its file."
            )
        values = self.shira_weight[name]
        rows, cols = self.shira_indices[name].to(values.device, torch.int64)
        zeros = values.new_zeros(self.out_features, self.in_features)
        return zeros.index_put_((rows, cols), values * self.scaling[name])

    def set_scale(self, adapter: str, scale: float) -> None:
        if adapter in self.scaling:
            self.scaling[adapter] = scale


@register_method("shira", config=ShiraConfig, mixed=True)
class ShiraModel(TunerModel):
    layer_cls = ShiraLayer
    unsupported_error = TypeError
    example = {"r": 1}

    def check_target(self, cfg: Any, key: str, module: nn.Module) -> None:
        out, n_in = self.target_shape(module)[:2]
        if cfg.r <= 0 or cfg.r * (out + n_in) > out * n_in:
            raise ValueError(
                f"Target module {key}: r·(in + out) must be positive and at most in·out = {out * n_in}, got r={cfg.r}."
            )

    def import_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Some systems wrote the indices as floats."""
        for key, layer in self.holders(name).items():
            if any(k.endswith(f"{key}.shira_indices") for k in state):
                layer._unmasked.pop(name, None)
        return {k: v.to(torch.int32) if k.endswith("shira_indices") else v for k, v in state.items()}
