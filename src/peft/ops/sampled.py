# SPDX-License-Identifier: Apache-2.0
"""Products with a random hidden state: y = h Bᵀ, h = μ + ε ⊙ exp(ν / 2), [μ, ν] = z ⊙ d (PVeRA)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Fused, autocast_dtype, derived, fusable, is_plain


def multiply(z: Tensor, d: Tensor, noise: Tensor, B: Tensor) -> Tensor:
    """z [..., 2 r], d [2 r], noise [..., r], B [out, r] -> [..., out]. Keeps its inputs, not h."""
    dense = fusable(z, d, noise, B) and autocast_dtype(z) is None
    return _plain(z, d, noise, B) if is_plain() or not dense else _Sampled.apply(z, d, noise, B)  # type: ignore


def _hidden(z: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """μ and the standard deviation."""
    mean, log_variance = (z * d).chunk(2, dim=-1)
    return mean, (log_variance / 2).exp()


def _plain(z: Tensor, d: Tensor, noise: Tensor, B: Tensor) -> Tensor:
    mean, deviation = _hidden(z, d)
    return F.linear(torch.addcmul(mean, noise, deviation), B)


class _Sampled(Fused):
    @staticmethod
    def forward(ctx: Any, z: Tensor, d: Tensor, noise: Tensor, B: Tensor):
        ctx.save_for_backward(z, d, noise, B)
        return _plain(z, d, noise, B)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        z, d, noise, B = ctx.saved_tensors
        if torch.is_grad_enabled():
            return derived(_plain, (z, d, noise, B), ctx.needs_input_grad, grads[0])
        mean, deviation = _hidden(z, d)
        spread = deviation.mul_(noise)
        h = mean + spread
        dh = grads[0] @ B
        both = torch.cat((dh, spread.mul_(dh).mul_(0.5)), dim=-1)
        dB = grads[0].reshape(-1, B.shape[0]).t() @ h.view(-1, B.shape[1]) if ctx.needs_input_grad[3] else None
        return both * d, (both * z).flatten(0, -2).sum(0), None, dB
