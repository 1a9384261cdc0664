# SPDX-License-Identifier: Apache-2.0
"""Arrow routing (arXiv 2405.11157) over LoRA experts on the same layer, and GenKnowSub (ACL 2025).

The prototype of expert e is the leading right singular vector of B_e A_e. Each token uses the experts with the
largest |<x, prototype>|, weighted by a softmax: y = W x + Σ_e c_e·s_e·B_e A_e x. GenKnowSub: A_e, B_e less the mean
over general experts.
"""

import re
from typing import Any

import torch
from torch import nn

from ....core.slots import Slot
from ....ops import low_rank
from ....ops.low_rank import Factors
from .base import LoraVariant

ROUTER = Slot("lora_arrow", nn.ModuleDict, "aux")
_GENERAL = re.compile(r"gks_\d+")


class Router(nn.Module):
    """Keeps what is made from the experts (prototypes [E, in], stacked factors) until one of them changes."""

    prototypes: torch.Tensor | None

    def __init__(self):
        super().__init__()
        self.register_buffer("prototypes", None, persistent=False)
        self._stacks: tuple[torch.Tensor, torch.Tensor] | None = None
        self._made_from: Any = None


class Arrow(LoraVariant):
    name = "Arrow"
    slots = (ROUTER,)
    quantised = True
    standalone = False

    def __init__(self, cfg: Any):
        self.options = cfg.arrow_config

    def create(self, layer: Any, name: str, cfg: Any) -> None:
        layer.lora_arrow[name] = Router()

    def check_merge(self, layer: Any, name: str) -> None:
        raise RuntimeError(
            "Cannot merge an active Arrow router adapter: it chooses experts for each token. Remove it first."
        )

    def delta_weight(self, layer: Any, name: str) -> torch.Tensor:
        raise RuntimeError("An Arrow router has no delta weight: it chooses experts for each token.")

    def experts(self, layer: Any, name: str) -> list[str]:
        """The experts present on the layer: those named in the configuration, or else all other adapters."""
        given = self.options.task_adapter_names
        if given is not None:
            return [n for n in given if n in layer and n != name]
        return [n for n in layer.adapter_names if n != name and n not in layer.lora_arrow and not _GENERAL.fullmatch(n)]

    def advance(self, layer: Any, name: str, x: torch.Tensor, y: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        names = self.experts(layer, name)
        if not names:
            return y
        prototypes, A, B = self._prepared(layer, name, names)
        gates = self._gates(x, prototypes.to(x.dtype))  # [..., E]
        scales = torch.tensor([layer.scaling[n] for n in names], device=x.device, dtype=x.dtype)
        ranks = torch.tensor([layer.r[n] for n in names], device=x.device)
        gates = (gates * scales).repeat_interleave(ranks, dim=-1, output_size=A.shape[0])
        drop = layer.lora_dropout[name]
        if layer.training and getattr(drop, "p", 0.0) > 0:
            return y + drop(low_rank.delta(x, Factors(A, B, gates)))
        return low_rank.accumulate(y, x, (Factors(A, B, gates),), layer.training)

    def _gates(self, x: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        """Weights of the experts for each token, 0 for those not chosen."""
        likeness = (x @ prototypes.T).abs()
        top, index = likeness.topk(min(self.options.top_k, likeness.shape[-1]), dim=-1)
        weights = torch.softmax(top / self.options.router_temperature, dim=-1)
        return torch.zeros_like(likeness).scatter(-1, index, weights)

    def _prepared(self, layer: Any, name: str, names: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Prototypes, A [Σ r, in], B [out, Σ r]; kept while the experts stay as they are and need no gradient."""
        router: Router = layer.lora_arrow[name]
        general = [n for n in self.options.gks_adapter_names if n in layer] if self.options.use_gks else []
        tensors = [t for n in (*names, *general) for t in layer.factor_tensors(n)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return self._make(layer, names, general)
        key = (tuple(names), tuple(general), tuple((t.data_ptr(), t._version) for t in tensors))
        if router._made_from != key or router.prototypes is None or router._stacks is None:
            with torch.no_grad():
                router.prototypes, *stacks = self._make(layer, names, general)
            router._stacks, router._made_from = (stacks[0], stacks[1]), key
        return router.prototypes, *router._stacks

    @staticmethod
    def _make(layer: Any, names: list[str], general: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pairs = [layer.static_factors(n)[:2] for n in names]
        if general:
            mean_a, mean_b = (
                torch.stack(t).mean(0) for t in zip(*(layer.static_factors(n)[:2] for n in general), strict=True)
            )
            pairs = [(A - mean_a, B - mean_b) for A, B in pairs]
        prototypes = torch.stack([leading_direction(A, B) for A, B in pairs])
        return prototypes, torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], dim=1)


@torch.no_grad()
def leading_direction(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """The leading right singular vector of B A, [in], by the SVD of an r x r core (the published power
    iteration finds the same).
    """
    Q, R = torch.linalg.qr(A.float().T)  # Aᵀ = Q R, so B A = (B Rᵀ) Qᵀ
    core = torch.linalg.qr(B.float()).R @ R.T
    return (Q @ torch.linalg.svd(core).Vh[0]).to(A.dtype)
