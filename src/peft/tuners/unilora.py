# SPDX-License-Identifier: Apache-2.0
"""Uni-LoRA: One Vector is All You Need (arXiv 2506.00799).

ΔW = B A, every entry of which is an entry of one trained vector θ, chosen by a seeded shuffle and scaled by 1/√(its
number of uses).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..config import PeftConfig, biases, fan_in_fan_out, layer_names, layer_range, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer, dropout, dropout_p
from ..core.slots import Aux, BufferDict, Saved, SharedTrainable
from ..core.tuner import TunerModel
from ..ops.low_rank import Factors
from ..registry import register_method


@dataclass
class UniLoraConfig(PeftConfig):
    """Options of Uni-LoRA."""

    r: int = option(4, "Rank.")
    proj_seed: int = option(42, "Seed of the assignment; part of the file format.")
    theta_d_length: int = option(256, "Length of the trained vector.")
    target_modules: list[str] | set[str] | str | None = targets()
    unilora_dropout: float = option(0.0, "Dropout on the input.")
    fan_in_fan_out: bool = fan_in_fan_out()
    bias: Literal["none", "all", "unilora_only"] = biases("unilora_only")
    modules_to_save: list[str] | None = saves()
    init_theta_d_bound: float = option(0.02, "The vector starts as U(-bound, bound).")
    init_weights: bool = option(True, "False draws the vector from N(0, 1).")
    save_indices: bool = option(
        False, "Store the assignment; otherwise it is drawn again, for the same layers in the same order."
    )
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    _pattern_alone = True
    _choices = ("bias",)
    _positive = ("r", "theta_d_length", "init_theta_d_bound")


class UniLoraLayer(AdapterLayer):
    """Low-rank factors gathered from one vector."""

    unilora_theta_d: SharedTrainable[nn.ParameterDict]  # [length]
    unilora_indices_A: Saved[BufferDict]  # [r, in] int64
    unilora_indices_B: Saved[BufferDict]  # [out, r]
    unilora_scales_A: Saved[BufferDict]
    unilora_scales_B: Saved[BufferDict]
    unilora_dropout: Aux[nn.ModuleDict]
    r: Aux[dict]
    kinds = (kinds.Linear, kinds.Conv1D)

    def create(self, name: str, cfg: Any) -> None:
        self.r[name], self.unilora_dropout[name] = cfg.r, dropout(cfg.unilora_dropout)
        for side, shape in (("A", (cfg.r, self.in_features)), ("B", (self.out_features, cfg.r))):
            torch.randint(0, cfg.theta_d_length, shape)  # drawn and discarded: the published library consumes it
            for kind, dtype in (("indices", torch.int64), ("scales", torch.float32)):
                container: BufferDict = getattr(self, f"unilora_{kind}_{side}")
                container.persistent = cfg.save_indices
                container[name] = torch.zeros(shape, dtype=dtype, device="cpu")

    def factors(self, name: str) -> Factors:
        theta = self.unilora_theta_d[name].to(self.unilora_indices_A[name].device)
        A = theta[self.unilora_indices_A[name]] * self.unilora_scales_A[name]
        B = theta[self.unilora_indices_B[name]] * self.unilora_scales_B[name]
        return Factors(A, B, 1.0, dropout_p(self.unilora_dropout[name]))


def assignment(total: int, length: int, seed: int) -> torch.Tensor:
    """[total] indices into the vector: as even as possible, shuffled; part of the file format."""
    import numpy as np

    rng = np.random.default_rng(seed)
    data = np.repeat(np.arange(length), total // length)
    if total % length:
        data = np.concatenate([data, rng.choice(length, size=total % length, replace=False)])
    rng.shuffle(data)
    return torch.from_numpy(data).long()


@register_method("unilora", config=UniLoraConfig)
class UniLoraModel(TunerModel):
    layer_cls = UniLoraLayer
    uses_shared_state = True
    unsupported_error = TypeError
    identity_at_init = False
    example = {"r": 2, "theta_d_length": 16}

    def shared(self, name: str, cfg: Any, targets: dict[str, nn.Module]) -> None:
        theta, bound = torch.empty(cfg.theta_d_length), cfg.init_theta_d_bound
        theta = theta.uniform_(-bound, bound) if cfg.init_weights else theta.normal_()
        self.unilora_theta_d[name] = nn.Parameter(theta)

    def after_inject(self, name: str, cfg: Any, layers: dict[str, AdapterLayer]) -> None:
        """Deal the indices out: layers in order, A before B, row by row."""
        slots = [(layer, side) for layer in layers.values() for side in ("A", "B")]
        sizes = [getattr(layer, f"unilora_indices_{side}")[name].shape for layer, side in slots]
        data = assignment(sum(s.numel() for s in sizes), cfg.theta_d_length, cfg.proj_seed)
        counts = torch.bincount(data, minlength=cfg.theta_d_length).float()
        scale = torch.where(counts > 0, counts.clamp(min=1).rsqrt(), torch.zeros_like(counts))
        start = 0
        for (layer, side), shape in zip(slots, sizes, strict=True):
            index = data[start : start + shape.numel()].view(shape)
            start += shape.numel()
            indices, scales = getattr(layer, f"unilora_indices_{side}"), getattr(layer, f"unilora_scales_{side}")
            indices[name] = index.to(indices[name].device)
            scales[name] = scale[index].to(scales[name])
