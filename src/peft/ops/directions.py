# SPDX-License-Identifier: Apache-2.0
"""Low-rank factors of normalised directions: ΔW = Σ_i c_i B_i A_i ⊙ w with c_i = λ / (r ‖A_i‖ ‖B_i‖) (DeLoRA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import Fused, derived, fusable, is_plain

FLOOR = 1e-4  # shorter vectors are divided by this


def scaled(A: Tensor, B: Tensor, strength: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, in], B [out, r], λ [1], w [in] -> (A ⊙ w, B ⊙ c) of the same shapes.

    One autograd function that keeps the given tensors and the 2 r norms.
    """
    tensors = (A, B, strength, widths)
    if is_plain() or not fusable(*tensors) or widths.requires_grad or len({t.dtype for t in tensors}) > 1:
        return _plain(*tensors)
    return _Scaled.apply(*tensors)  # type: ignore[return-value]


def _plain(A: Tensor, B: Tensor, strength: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    norms = A.norm(dim=1).clamp(min=FLOOR) * B.norm(dim=0).clamp(min=FLOOR)
    return A * widths, B * (strength / A.shape[0] / norms)


class _Scaled(Fused):
    """(A, B, λ, w) -> (A ⊙ w, B ⊙ c)."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, strength: Tensor, widths: Tensor):
        norms = torch.stack((A.norm(dim=1), B.norm(dim=0))).clamp_(min=FLOOR)
        unit = (norms[0] * norms[1]).mul_(A.shape[0]).reciprocal_()
        ctx.save_for_backward(A, B, strength, widths, norms, unit)
        return A * widths, B * (unit * strength)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        A, B, strength, widths, norms, unit = ctx.saved_tensors
        gA, gB = grads
        if torch.is_grad_enabled():
            return derived(_plain, (A, B, strength, widths), ctx.needs_input_grad, grads)
        c, e = unit * strength, (gB * B).sum(0)  # and its gradient
        # a norm at the floor has no gradient: an infinite length stands for it
        pull = (e * c) / torch.threshold(norms, FLOOR, torch.inf).square_()
        dA = (gA * widths).addcmul_(A, pull[0][:, None], value=-1)
        dB = (gB * c).addcmul_(B, pull[1], value=-1)
        return dA, dB, torch.dot(e, unit).view(1), None
