# SPDX-License-Identifier: Apache-2.0
"""MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure (arXiv 2409.15371).

ΔW[o, i] = M[i mod r, o]: the input is summed over shards of width r, then multiplied by one small matrix M.
"mini": M is repeated along the outputs. "bat": W + ΔW with ΔW_{a,c} = W_{a,c} M_a + M_a on r x r blocks.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..config import PeftConfig, biases, excludes, layer_names, layer_range, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer, dropout, kaiming
from ..core.scaling import FixedScale
from ..core.slots import Aux, Trainable
from ..core.tuner import TunerModel
from ..registry import register_method
from ..storage.base import resolve


@dataclass
class MissConfig(PeftConfig):
    """Options of MiSS."""

    r: int = option(64, "Width of the shards along the input.")
    miss_dropout: float = option(0.0, "Dropout on the input (not for 'bat').")
    mini_r: int = option(1, "Width of the shards along the output, for 'mini'.")
    target_modules: list[str] | set[str] | str | None = targets()
    exclude_modules: list[str] | set[str] | str | None = excludes()
    init_weights: bool | Literal["bat", "mini"] = option(
        True, "The variant: True, 'bat' or 'mini'; all start at zero but False."
    )
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: str | None = layer_names()
    bias: str = biases("miss_only")
    modules_to_save: list[str] | None = saves()
    _pattern_alone = True
    _choices = ("init_weights",)


class MissLayer(FixedScale, AdapterLayer):
    """Shared shards of one small matrix."""

    miss_block: Trainable[nn.ParameterDict]  # [r, out]; mini [r, mini_r]; bat [out/r, r, r]
    miss_dropout: Aux[nn.ModuleDict]
    miss_r: Aux[dict]
    miss_mini_r: Aux[dict]
    variant: Aux[dict]  # for each adapter: "plain", "mini" or "bat"
    kinds = (kinds.Linear, kinds.Conv1D)

    def create(self, name: str, cfg: Any) -> None:
        r, out = cfg.r, self.out_features
        self.miss_r[name], self.miss_mini_r[name], self.miss_dropout[name] = r, cfg.mini_r, dropout(cfg.miss_dropout)
        variant = self.variant[name] = cfg.init_weights if cfg.init_weights in ("bat", "mini") else "plain"
        shape = {"plain": (r, out), "mini": (r, cfg.mini_r), "bat": (out // r, r, r)}[variant]
        self.miss_block[name] = nn.Parameter(torch.zeros(shape) if cfg.init_weights else kaiming(*shape))

    @property
    def miss_fn(self) -> Any:
        """The variant of the first adapter, under its published name."""
        first = next(iter(self.variant.values()), "plain")
        return True if first == "plain" else first

    def _adapt_activations(self, names: tuple[str, ...], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(names) == 1 or "bat" not in {self.variant[n] for n in names}:
            return super()._adapt_activations(names, x, *args, **kwargs)
        y = base = self._base_output(x, *args, **kwargs)
        weight = self.base_weight()
        for n in names:
            h = self._cast_input(n, x)
            y = y + (F.linear(h, self._bat(n, weight)) if self.variant[n] == "bat" else self.delta(n, h, base))
            weight, _ = self._applied(n, weight, None)
        return y.to(base.dtype)

    def delta(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.variant[name] == "bat":
            return F.linear(x, self.delta_weight(name))
        M, r = self.miss_block[name], self.miss_r[name]
        x = self.miss_dropout[name](x)
        whole = x.shape[-1] // r * r
        z = x[..., :whole].unflatten(-1, (-1, r)).sum(-2)
        if whole < x.shape[-1]:  # the last, incomplete shard
            z = z + F.pad(x[..., whole:], (0, whole + r - x.shape[-1]))
        out = z @ M
        return out if M.shape[1] == self.out_features else out.tile(self.out_features // M.shape[1])

    def delta_weight(self, name: str) -> torch.Tensor:
        M, n_in, n_out = self.miss_block[name], self.in_features, self.out_features
        if self.variant[name] == "bat":
            return self._bat(name, self.base_weight())
        return M.repeat(-(-n_in // M.shape[0]), n_out // M.shape[1])[:n_in].T

    def _bat(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What 'bat' adds to the weight [out, in] that it finds."""
        M, r = self.miss_block[name], self.miss_r[name]
        W = weight.to(M.dtype).unflatten(0, (-1, r)).unflatten(-1, (-1, r)).transpose(1, 2)  # [a, c, r, r]
        return (W @ M[:, None] + M[:, None]).transpose(1, 2).reshape(weight.shape)

    def additive(self, name: str) -> bool:
        return self.variant[name] != "bat"

    def _applied(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple:
        if self.additive(name):
            return super()._applied(name, weight, bias)
        return weight + self._bat(name, weight), bias

    def lora_factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(B, A) with B A = ΔW exactly: A sums the shards of the input, B is the block."""
        if self.variant[name] == "bat":
            return None
        M, r = self.miss_block[name], self.miss_r[name]
        A = torch.eye(r, dtype=M.dtype, device=M.device).repeat(1, -(-self.in_features // r))[:, : self.in_features]
        return M.repeat(1, self.out_features // M.shape[1]).T, A


@register_method("miss", config=MissConfig)
class MissModel(TunerModel):
    layer_cls = MissLayer
    unsupported_error = TypeError
    example = {"r": 4}

    def check_target(self, cfg: Any, key: str, module: nn.Module) -> None:
        out, n_in = self.target_shape(module)[:2]
        if cfg.r <= 0 or cfg.r > n_in:
            raise ValueError(
                f"Target module {key}: `r` should be positive and at most the input width {n_in}, got {cfg.r}."
            )
        if cfg.init_weights == "bat" and (n_in % cfg.r or out % cfg.r):
            raise ValueError(f"Target module {key}: the widths {(out, n_in)} must be divisible by r={cfg.r} for 'bat'.")
        if cfg.init_weights == "bat" and not (storage := resolve(module)).readable:
            raise TypeError(
                f"Target module {key}: 'bat' reads the weight in every forward, which the {storage.label} format does "
                "not allow. Load the base model unquantised, or set init_weights to True or 'mini'."
            )
        if cfg.init_weights == "mini" and (cfg.mini_r <= 0 or out % cfg.mini_r):
            raise ValueError(f"Target module {key}: the output width {out} must be divisible by mini_r={cfg.mini_r}.")
