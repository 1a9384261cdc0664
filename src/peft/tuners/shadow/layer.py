# SPDX-License-Identifier: Apache-2.0
"""ShadowPEFT on one block: the shadow state corrects the input of the block and is updated by its output.

h~ = h + α · up(down(dropout(h - s)))      h' = block(h~)      s' = (1 - g) s + g T(h'),   g = σ(G(h'))
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...core import kinds
from ...core.layer import AdapterLayer, dropout
from ...core.slots import Aux, Trainable


@dataclass
class ShadowState:
    """Data of one call: s [b, t, d] before block i, and what belongs to the shadow network."""

    start: torch.Tensor  # the first state, for the loss
    before: dict[int, torch.Tensor] = field(default_factory=dict)  # block -> state
    cache: Any = None  # keys and values of the shadow network


class ShadowLayer(AdapterLayer):
    """A block with its correction. The state comes through `switch.call.shadow`: inputs and outputs stay the same."""

    shadow_down: Trainable[nn.ModuleDict]  # weight [r, d]
    shadow_up: Trainable[nn.ModuleDict]  # weight [d, r]
    shadow_update_transform: Trainable[nn.ModuleDict]  # T: d -> u -> d
    shadow_update_gate: Trainable[nn.ModuleDict]  # G: d -> u -> d
    shadow_dropout: Aux[nn.ModuleDict]
    shadow_alpha: Aux[dict]
    r: Aux[dict]
    place: Aux[dict]  # (index among the adapter's blocks, whether it is the last one)
    kinds = (kinds.Module,)
    one_active = True
    name_in_files = "default"

    def __getattr__(self, name: str) -> Any:
        """Models look at attributes of their blocks (`attention_type`)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def create(self, name: str, cfg: Any) -> None:
        d, u = cfg.hidden_size, cfg.update_hidden_size or cfg.r
        self.r[name], self.shadow_alpha[name] = cfg.r, cfg.shadow_alpha
        self.shadow_dropout[name] = dropout(cfg.shadow_dropout)
        self.shadow_down[name], self.shadow_up[name] = nn.Linear(d, cfg.r, bias=False), nn.Linear(cfg.r, d, bias=False)
        self.shadow_update_transform[name] = nn.Sequential(nn.Linear(d, u), nn.GELU(), nn.Linear(u, d))
        self.shadow_update_gate[name] = nn.Sequential(nn.Linear(d, u), nn.GELU(), nn.Linear(u, d))
        if cfg.init_weights:
            nn.init.zeros_(self.shadow_up[name].weight)  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plan, state = self._planned(), self.switch.call.shadow
        if not plan or state is None:
            return self.base_layer(*args, **kwargs)
        (name,), (index, last) = plan, self.place[plan[0]]
        h = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        s = state.before.get(index)
        if s is None:
            raise RuntimeError("The shadow state is gone: checkpoint blocks with `use_reentrant=False`.")
        s = s.to(h.device)
        if s.shape[:-1] != h.shape[:-1]:
            raise ValueError(
                f"The shadow state has shape {tuple(s.shape)}, but the block got hidden states of {tuple(h.shape)}."
            )
        h = h + self.correction(name, h, s)
        if "hidden_states" in kwargs:
            out = self.base_layer(*args, **{**kwargs, "hidden_states": h})
        else:
            out = self.base_layer(h, *args[1:], **kwargs)
        if not last:
            state.before[index + 1] = self.updated(name, s, out[0] if isinstance(out, tuple) else out)
        if not torch.is_grad_enabled():  # otherwise backward may recompute this block
            del state.before[index]
        return out

    def correction(self, name: str, h: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        down: Any = self.shadow_down[name]
        up = self.shadow_up[name]
        difference = self.shadow_dropout[name]((h - s).to(down.weight.dtype))
        return (self.shadow_alpha[name] * up(down(difference))).to(h.dtype)

    def updated(self, name: str, s: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        down: Any = self.shadow_down[name]
        x = h.to(down.weight.dtype)
        g, t = self.shadow_update_gate[name](x).sigmoid(), self.shadow_update_transform[name](x)
        return torch.lerp(s.to(t.dtype), t, g).to(s.dtype)  # of another dtype than x under autocast
