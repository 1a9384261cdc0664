# SPDX-License-Identifier: Apache-2.0
"""BOFT: Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization (arXiv 2311.06243).

y = s ⊙ (W (x R)ᵀ) + b,  R = F_{N-1} .. F_0, every factor a shuffled block-diagonal of Cayley rotations.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig, biases, excludes, fan_in_fan_out, layer_names, layer_range, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer
from ..core.scaling import FixedScale
from ..core.slots import Aux, Trainable
from ..core.tuner import TunerModel
from ..ops import cayley, gain
from ..registry import register_method


@dataclass
class BOFTConfig(PeftConfig):
    """Options of BOFT. Give either the size or the number of blocks."""

    boft_block_size: int = option(4, "Size of the blocks; exclusive with boft_block_num.")
    boft_block_num: int = option(0, "Number of blocks; exclusive with boft_block_size.")
    boft_n_butterfly_factor: int = option(1, "Number of butterfly factors.")
    target_modules: list[str] | set[str] | str | None = targets()
    exclude_modules: list[str] | set[str] | str | None = excludes()
    boft_dropout: float = option(0.0, "Share of blocks of one random factor that are the identity in a training step.")
    fan_in_fan_out: bool = fan_in_fan_out()
    bias: str = biases("boft_only")
    modules_to_save: list[str] | None = saves()
    init_weights: bool = option(True, "Start at the identity; False is random.")
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    _regex_with_layers = "warn"
    _choices = ("init_weights",)
    _positive = ("boft_n_butterfly_factor",)

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = sorted((self.boft_block_size, self.boft_block_num))
        if not low == 0 < high:
            raise ValueError(
                "Either `boft_block_size` or `boft_block_num` must be above 0, and not both: got "
                f"boft_block_size={self.boft_block_size} and boft_block_num={self.boft_block_num}."
            )


def blocks(features: int, cfg: Any) -> tuple[int, int]:
    """(size, number) of the blocks for a layer of that width; ValueError when they do not fit."""
    size, count, factors = cfg.boft_block_size, cfg.boft_block_num, cfg.boft_n_butterfly_factor
    given = f"width {features}, boft_block_size={size}, boft_block_num={count}, boft_n_butterfly_factor={factors}"
    if features % (size or count):
        raise ValueError(f"The width must be divisible by the block size or number: {given}.")
    size, count = (size, features // size) if size else (features // count, count)
    if count % 2 ** (factors - 1):
        raise ValueError(
            f"Too many butterfly factors: the number of blocks must be divisible by 2^(factors - 1): {given}."
        )
    if factors > 1 and size % 2:
        raise ValueError(f"Blocks must have an even size when there are several factors: {given}.")
    return size, count


class MultiplicativeDropout(nn.Module):
    """In training, replaces a share p of the blocks of one random factor by the identity. [N, blocks, B, B] -> same."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, R: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p <= 0:
            return R
        mask, factor = torch.zeros(R.shape[:2], dtype=torch.bool), torch.randint(len(R), (1,))
        mask[factor] = torch.randperm(R.shape[1]) < int(self.p * R.shape[1])
        eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
        return torch.where(mask.to(R.device)[..., None, None], eye, R)


class BOFTLayer(FixedScale, AdapterLayer):
    """Rotates the input features by a butterfly product and scales the outputs."""

    boft_R: Trainable[nn.ParameterDict]  # [factors, blocks, size, size]
    boft_s: Trainable[nn.ParameterDict]  # [out, 1]; convolutions [1, out]
    boft_dropout: Aux[nn.ModuleDict]
    boft_block_size: Aux[dict]
    boft_block_num: Aux[dict]
    kinds = (kinds.Linear, kinds.Conv1D, kinds.Conv1d, kinds.Conv2d, kinds.Conv3d)
    conv_by_weight = True
    casts_input = False

    def create(self, name: str, cfg: Any) -> None:
        size, count = blocks(math.prod(self.kind.shape(self.get_base_layer())[1:]), cfg)
        self.boft_block_size[name], self.boft_block_num[name] = size, count
        self.boft_dropout[name] = MultiplicativeDropout(cfg.boft_dropout)
        R = torch.zeros(cfg.boft_n_butterfly_factor, count, size, size)
        s = torch.ones((1, self.out_features) if self.kind.is_conv else (self.out_features, 1))
        if not cfg.init_weights:
            R, s = nn.init.normal_(R, 0.0, 0.1), nn.init.normal_(s, 1.0, 0.1)
        self.boft_R[name], self.boft_s[name] = nn.Parameter(R), nn.Parameter(s)

    def _rotations(self, name: str) -> torch.Tensor:
        """[factors, blocks, size, size]"""
        A = self.boft_R[name]
        return self.boft_dropout[name](cayley.cayley((A - A.transpose(-2, -1)) / 2))

    def _adapt_activations(self, names: tuple[str, ...], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base, y, A, s = self.base_layer, None, self.boft_R[names[0]], self.boft_s[names[0]]
        simple = len(names) == len(A) == 1 and A.shape[1] > 1 and self.kind is kinds.Linear and not kwargs
        if simple and self._base_is_plain(base) and gain.serves(base, x, s, A):
            y = gain.linear(base, x, s, self._rotations(names[0])[0])
        return super()._adapt_activations(names, x, *args, **kwargs) if y is None else y

    def map_input(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return cayley.butterfly(x, self._rotations(name))

    def map_output(self, name: str, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The scale leaves the bias out: s (y - b) + b."""
        s, bias = self.boft_s[name].flatten().to(y.dtype), self.base_bias()
        return y * s if bias is None else torch.addcmul(bias * (1 - s), y, s)

    def map_weight(self, name: str, w: torch.Tensor) -> torch.Tensor:
        rotated = cayley.butterfly(w.flatten(1).to(self.boft_R[name].dtype), self._rotations(name), transpose=True)
        return (rotated * self.boft_s[name].view(-1, 1)).view(w.shape)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(R [features, features], s): BOFT multiplies, this is no additive weight."""
        n = math.prod(self.kind.shape(self.get_base_layer())[1:])
        eye = torch.eye(n, dtype=self.boft_R[adapter].dtype, device=self.boft_R[adapter].device)
        return cayley.butterfly(eye, self._rotations(adapter)), self.boft_s[adapter]


@register_method("boft", config=BOFTConfig)
class BOFTModel(TunerModel):
    layer_cls = BOFTLayer
    unsupported_error = TypeError

    def check_target(self, cfg: Any, key: str, module: nn.Module) -> None:
        try:
            blocks(math.prod(self.target_shape(module)[1:]), cfg)
        except ValueError as exc:
            raise ValueError(f"Target module {key}: {exc}") from None

    def import_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Without its CUDA kernel the published library trains one factor, whatever the configuration says."""
        from ..io.keys import misfits, resize

        for entry, value in misfits(self, name, state):
            if tuple(value.shape) == (1, *entry.tensor.shape[1:]):
                resize(entry, value.shape)
        return state
