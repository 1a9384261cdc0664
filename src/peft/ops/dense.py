# SPDX-License-Identifier: Apache-2.0
"""Dense weights made of few numbers, keeping no product of their size for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import Fused, derived, fusable, is_plain


def triplets(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """U diag(S) V for U [out, m], S [m], V [m, in]; keeps the three, not U diag(S)."""
    return _triplets(U, S, V) if is_plain() or not fusable(U, S, V) else _Triplets.apply(U, S, V)  # type: ignore


def _triplets(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    return (U * S) @ V


class _Triplets(Fused):
    @staticmethod
    def forward(ctx: Any, U: Tensor, S: Tensor, V: Tensor):
        ctx.save_for_backward(U, S, V)
        return _triplets(U, S, V)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        U, S, V = ctx.saved_tensors
        if torch.is_grad_enabled():
            return derived(_triplets, (U, S, V), ctx.needs_input_grad, grads[0])
        left = grads[0] @ V.t()
        return left * S, (left * U).sum(0), (U * S).t() @ grads[0]
