# SPDX-License-Identifier: Apache-2.0
"""OFT: Controlling Text-to-Image Diffusion by Orthogonal Finetuning (arXiv 2306.07280), input-centric OFTv2 (arXiv
2506.19847).

y = W (x R)ᵀ + b with R = block_diag(R_1 .. R_r), R_i the Cayley map of a trained skew matrix. On embeddings y = e R.
"""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from packaging import version
from torch import nn

from ..config import PeftConfig, biases, excludes, fan_in_fan_out, layer_names, layer_range, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer
from ..core.scaling import FixedScale
from ..core.slots import Aux, Trainable
from ..core.tuner import TunerModel
from ..ops import cayley
from ..registry import register_method


@dataclass
class OFTConfig(PeftConfig):
    """Options of OFT. Give either the number of blocks `r` or their size."""

    r: int = option(0, "Number of blocks; exclusive with oft_block_size.")
    oft_block_size: int = option(32, "Size of the blocks; adjusted to the nearest divisor of the layer's width.")
    module_dropout: float = option(0.0, "Probability that a block is the identity in training.")
    target_modules: list[str] | set[str] | str | None = targets()
    fan_in_fan_out: bool = fan_in_fan_out()
    bias: Literal["none", "all", "oft_only"] = biases("oft_only")
    exclude_modules: list[str] | set[str] | str | None = excludes()
    init_weights: bool = option(True, "Start at the identity; False draws N(0, 0.1).")
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    modules_to_save: list[str] | None = saves()
    coft: bool = option(False, "Constrained OFT: keep the rotations within eps of the identity.")
    eps: float = option(6e-5, "Radius of constrained OFT.")
    block_share: bool = option(False, "One block for all positions.")
    use_cayley_neumann: bool = option(
        True, "Truncated series instead of the exact Cayley map. Not exchangeable: the signs are opposite."
    )
    num_cayley_neumann_terms: int = option(5, "Number of terms of the series.")
    _regex_with_layers = "warn"
    _positive = ("num_cayley_neumann_terms",)
    _not_negative = ("r", "oft_block_size")
    _choices = ("init_weights",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ValueError(
                f"Either `r` or `oft_block_size` must be non-zero, and not both: got r={self.r} and "
                f"oft_block_size={self.oft_block_size}. To give r, pass oft_block_size=0 too."
            )

    @classmethod
    def check_file_values(cls, values: dict[str, Any]) -> dict[str, Any]:
        if "oft_block_size" not in values:
            raise ValueError(
                "OFT has been updated since PEFT 0.14.0. Your trained adapter weights are incompatible with the latest "
                "version of OFT."
            )
        written_by = version.parse(str(values.get("peft_version") or "0.0.0"))
        if values.get("use_cayley_neumann") and written_by < version.parse("0.18.0"):
            warnings.warn(
                "The Cayley-Neumann parameterization has been slightly changed; adapters trained with "
                "PEFT < 0.18.0 may give slightly other outputs.",
                stacklevel=4,
            )
        return values


class OFTRotationModule(nn.Module):
    """The trained skew matrices of one adapter, and the rotations made of them."""

    def __init__(self, blocks: int, size: int, cfg: Any, total: int):
        super().__init__()
        self.r, self.oft_block_size, self.coft, self.eps = total, size, cfg.coft, cfg.eps
        self.use_cayley_neumann, self.num_cayley_neumann_terms = cfg.use_cayley_neumann, cfg.num_cayley_neumann_terms
        self.weight = nn.Parameter(torch.zeros(blocks, size * (size - 1) // 2))  # upper triangles, row by row
        self.dropout = cfg.module_dropout
        rows, cols = torch.triu_indices(size, size, 1, device="cpu")
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("cols", cols, persistent=False)

    def rotations(self) -> torch.Tensor:
        """[blocks, size, size] ([1, ...] when shared); y_k = x_k R_k."""
        v = self.weight
        if self.coft:
            inside = cayley.project(v.detach(), self.eps / v.shape[0] ** 0.5)
            if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                v.data.copy_(inside)  # projected gradient descent: the optimizer goes on from the projected point
            else:  # values are projected, gradients pass straight through
                v = v + (inside - v.detach())
        Q = cayley.skew(v, self.oft_block_size, self.rows, self.cols)  # type: ignore
        R = cayley.cayley_series(Q, self.num_cayley_neumann_terms) if self.use_cayley_neumann else cayley.cayley(Q)
        if self.training and self.dropout > 0:
            keep = torch.rand(R.shape[0], 1, 1, device=R.device) >= self.dropout
            R = torch.where(keep, R, torch.eye(self.oft_block_size, dtype=R.dtype, device=R.device))
        return R


class OFTLayer(FixedScale, AdapterLayer):
    """Rotates the input features in blocks (embeddings: the output features)."""

    oft_R: Trainable[nn.ModuleDict]  # weight [blocks, size(size-1)/2]
    oft_embedding_R: Trainable[nn.ModuleDict]
    r: Aux[dict]
    oft_block_size: Aux[dict]
    kinds = (kinds.Linear, kinds.Conv1D, kinds.Conv2d, kinds.Conv1d, kinds.Conv3d, kinds.Embedding)
    conv_by_weight = True
    casts_input = False

    def _features(self) -> int:
        shape = self.kind.shape(self.get_base_layer())
        return shape[0] if self.kind is kinds.Embedding else int(torch.Size(shape[1:]).numel())

    def create(self, name: str, cfg: Any) -> None:
        features = self._features()
        given = cfg.oft_block_size or cfg.r
        fitting = nearest_divisor(features, given)
        if fitting != given:
            option_name = "oft_block_size" if cfg.oft_block_size else "r"
            warnings.warn(
                f"Invalid `{option_name}` ({given}) for width {features}. Adjusted `{option_name}` to ({fitting}).",
                stacklevel=2,
            )
        size, blocks = (fitting, features // fitting) if cfg.oft_block_size else (features // fitting, fitting)
        self.r[name], self.oft_block_size[name] = blocks, size
        rotation = OFTRotationModule(1 if cfg.block_share else blocks, size, cfg, blocks)
        if not cfg.init_weights:
            nn.init.normal_(rotation.weight, mean=0.0, std=0.1)
        self._container()[name] = rotation

    def _container(self) -> nn.ModuleDict:
        return self.oft_embedding_R if self.kind is kinds.Embedding else self.oft_R

    def _rotations(self, name: str) -> torch.Tensor:
        return self._container()[name].rotations()  # type: ignore[operator]

    def map_input(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x if self.kind is kinds.Embedding else cayley.rotate(x, self._rotations(name))

    def map_output(self, name: str, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return cayley.rotate(y, self._rotations(name)) if self.kind is kinds.Embedding else y

    def map_weight(self, name: str, w: torch.Tensor) -> torch.Tensor:
        R = self._rotations(name)
        if self.kind is kinds.Embedding:
            return cayley.rotate(w.T.to(R.dtype), R).T
        return cayley.rotate_weight(w.flatten(1).to(R.dtype), R).view(w.shape)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The dense rotation [features, features] (not an additive weight: OFT multiplies)."""
        return cayley.block_diagonal(self._rotations(adapter), self._features())


def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of n nearest to `wanted`; the smaller one of two equally near."""
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))


@register_method("oft", config=OFTConfig)
class OFTModel(TunerModel):
    layer_cls = OFTLayer
    unsupported_error = TypeError
    example = {"oft_block_size": 4}

    def import_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if any(".oft_r." in key for key in state):
            raise ValueError(
                "Trying to load old OFT checkpoint, which is no longer supported. Please install PEFT "
                "<= v0.15.2 to load it or train a new OFT adapter."
            )
        return state
