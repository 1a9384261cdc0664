# SPDX-License-Identifier: Apache-2.0
"""VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections (arXiv 2405.17991).

Values are those of LoRA. For the gradient of A, each group x_j of the input is kept as c_j = <x_j, e> only and stands
for scale·c_j e.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F

from ....core.slots import PersistentBufferDict, Slot
from .base import LoraVariant

EMBED = Slot("lora_velora_embed", PersistentBufferDict, "aux", saved=True)


class Velora(LoraVariant):
    name = "VeLoRA"
    slots = (EMBED,)

    def __init__(self, cfg: Any):
        options = cfg.velora_config
        self.num_groups, self.scale, self.init_type = options.num_groups, options.scale, options.init_type
        self.initialised = self.init_type == "random"

    def create(self, layer: Any, name: str, cfg: Any) -> None:
        size = math.ceil(layer.in_features / self.num_groups)
        embed = F.normalize(torch.randn(size), dim=0) if self.init_type == "random" else torch.zeros(size)
        layer.lora_velora_embed[name] = embed

    def advance(self, layer: Any, name: str, x: torch.Tensor, y: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        A, B = layer.lora_A[name], layer.lora_B[name]
        x = layer.lora_dropout[name](x)
        if layer.training and torch.is_grad_enabled() and A.weight.requires_grad:
            self._update(layer, name, x)
            z = _Project.apply(x, A.weight, layer.lora_velora_embed[name], self.num_groups, self.scale)
        else:
            z = A(x)
        return y + B(z) * layer.scaling[name]

    @torch.no_grad()
    def _update(self, layer: Any, name: str, x: torch.Tensor) -> None:
        """The projection is the normalised mean of all sub-tokens, of every batch or of the first one."""
        if self.init_type == "random" or (self.init_type == "batch_average_once" and self.initialised):
            return
        embed = layer.lora_velora_embed[name]
        mean = groups(x, self.num_groups, len(embed)).mean(dim=(0, 1))
        mean = torch.where(mean.norm() > 0, mean, torch.ones_like(mean))
        embed.copy_(F.normalize(mean, dim=0))
        self.initialised = True


def groups(x: torch.Tensor, n: int, size: int) -> torch.Tensor:
    """x [..., in], padded with zeros, as [tokens, n, size]."""
    x = x.reshape(-1, x.shape[-1])
    return F.pad(x, (0, n * size - x.shape[1])).view(-1, n, size)


class _Project(torch.autograd.Function):
    """x Aᵀ; keeps c [tokens, groups] instead of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, A: torch.Tensor, embed: torch.Tensor, n: int, scale: float) -> torch.Tensor:
        embed = embed.to(x.dtype)
        c = groups(x, n, len(embed)) @ embed
        ctx.save_for_backward(c, A, embed)
        ctx.scale = scale
        return F.linear(x, A.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        c, A, embed = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1])
        dx = (grads[0] @ A.to(g.dtype)) if ctx.needs_input_grad[0] else None
        # gᵀ (scale c ⊗ e) without the reconstructed input
        coefficients = g.T @ c.to(g.dtype)  # [r, groups]
        dA = (ctx.scale * coefficients[..., None] * embed.to(g.dtype)).flatten(1)[:, : A.shape[1]].to(A.dtype)
        return dx, dA, None, None, None
