# SPDX-License-Identifier: Apache-2.0
"""Lily: Low-Rank Interconnected Adaptation across Layers (arXiv 2407.09946).

y = W x + b + s · (x A) Σ_e p_e B_e: layers of one kind share the experts B, neighbours share A, and a router
on the data mixes.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..config import PeftConfig, excludes, layer_names, layer_range, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer
from ..core.match import suffixes
from ..core.slots import Aux, Trainable
from ..core.tuner import TunerModel
from ..registry import register_method
from .randlora import COPIES_UP_TO


@dataclass
class LilyConfig(PeftConfig):
    """Options of Lily."""

    r: int = option(32, "Rank.")
    stride_A: int = option(1, "Consecutive layers that share one A.")
    num_B: int = option(2, "Number of experts B.")
    scaling: float = option(1.0, "Factor of the update.")
    target_modules: list[str] | set[str] | str | None = targets()
    exclude_modules: list[str] | set[str] | str | None = excludes()
    modules_to_save: list[str] | None = saves()
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    init_weights: bool = option(True, "Start at zero (B = 0).")
    _regex_with_layers = "warn"
    _positive = ("r", "stride_A")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_B < 2:
            raise ValueError(f"`num_B` must be at least 2, got {self.num_B}.")


class LilyLayer(AdapterLayer):
    """A low-rank update mixed from shared experts."""

    lily_A: Trainable[nn.ModuleDict]  # weight [r, in], shared by neighbours
    lily_B: Trainable[nn.ModuleDict]  # weight [experts · r, out], shared by all layers of a group
    lily_router: Trainable[nn.ModuleDict]  # weight [experts, r]
    r: Aux[dict]
    num_B: Aux[dict]
    scaling: Aux[dict]
    kinds = (kinds.Linear, kinds.Conv1D)

    def create(self, name: str, cfg: Any) -> None:
        self.r[name], self.num_B[name], self.scaling[name] = cfg.r, cfg.num_B, cfg.scaling
        A = kinds.linear(self.in_features, cfg.r)
        B = kinds.linear(self.out_features, cfg.num_B * cfg.r)
        router = kinds.linear(cfg.r, cfg.num_B)
        for module in (A, router) if cfg.init_weights else (A, router, B):
            module.reset_parameters()  # drawn twice, as published
        if cfg.init_weights:
            nn.init.zeros_(B.weight)
        self.lily_A[name], self.lily_B[name], self.lily_router[name] = A, B, router

    def delta(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The router averages over all positions of the batch, as published."""
        h = F.linear(x, self.lily_A[name].weight)  # type: ignore
        p = F.linear(h, self.lily_router[name].weight).softmax(-1).view(-1, self.num_B[name])  # [T, experts]  # type: ignore
        p = p.sum(0) * (self.scaling[name] / max(len(p), 1))
        experts = self.lily_B[name].weight.view(self.num_B[name], self.r[name], -1)  # type: ignore
        mixed = torch.tensordot(p.to(experts.dtype), experts, dims=1)  # [r, out]
        return h @ mixed


@register_method("lily", config=LilyConfig)
class LilyModel(TunerModel):
    layer_cls = LilyLayer
    unsupported_error = NotImplementedError
    example = {"r": 4}

    def after_inject(self, name: str, cfg: Any, layers: dict[str, AdapterLayer]) -> None:
        """Share: groups are the layers matched by one target entry that have one shape, in module order."""
        groups: dict[Any, list[LilyLayer]] = {}
        for key, layer in layers.items():
            assert isinstance(layer, LilyLayer)
            groups.setdefault((self._entry(cfg, key), layer.out_features, layer.in_features), []).append(layer)
        for members in groups.values():
            for i, layer in enumerate(members):
                layer.lily_B[name] = members[0].lily_B[name]
                layer.lily_A[name] = members[i // cfg.stride_A * cfg.stride_A].lily_A[name]
                layer._holders.pop(name, None)

    def export_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Published files repeat shared tensors under every layer; readers need them once, so the copies are only
        written while they are small.
        """
        once = {v.untyped_storage()._cdata: k for k, v in reversed(state.items())}
        copies = {k for k, v in state.items() if once[v.untyped_storage()._cdata] != k}
        if sum(state[k].numel() * state[k].element_size() for k in copies) <= COPIES_UP_TO:
            return state
        return {k: v for k, v in state.items() if k not in copies}

    def import_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Complete files without copies. The published library does not share in adapters that were added later:
        where the copies differ, nothing is shared here either.
        """
        from ..io.keys import PEFT_PREFIX

        prefix = PEFT_PREFIX if any(k.startswith(PEFT_PREFIX) for k in state) else ""
        out, first = dict(state), {}
        for path, layer in self.holders(name).items():
            for slot in ("lily_A", "lily_B"):
                key, held = f"{prefix}{path}.{slot}.weight", getattr(layer, slot)
                value = first.setdefault(id(held[name]), state.get(key))
                if key not in state and value is not None:
                    out[key] = value
                elif value is not None and state[key].shape == value.shape and not torch.equal(value, state[key]):
                    weight, own = held[name].weight, kinds.linear(*value.T.shape)
                    device: Any = layer.get_base_layer().weight.device if weight.is_meta else weight.device
                    own.weight = nn.Parameter(state[key].to(device, weight.dtype, copy=True), weight.requires_grad)
                    layer._holders.pop(name, None)
                    held[name], out[key] = own, value  # the key's place is still the shared tensor
        return out

    @staticmethod
    def _entry(cfg: Any, key: str) -> str:
        """The target entry that the key ends with (the longest one); the whole regex for a string."""
        if isinstance(cfg.target_modules, str):
            return cfg.target_modules
        return next((s for s in suffixes(key) if s in cfg.target_modules), key)
