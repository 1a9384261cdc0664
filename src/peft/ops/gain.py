# SPDX-License-Identifier: Apache-2.0
r"""Linear layers with a trained gain of each output: y = s ⊙ (h Wᵀ), h = x or the rotated x R (IA³, BOFT).

The gradient of s needs the product u = h Wᵀ. Instead of u the function keeps the layer's own output, which the next op
often keeps anyway, and divides the reduced row by s. The output is kept without autograd's version check, because a
linear layer's output may be modified in place (`nn.ReLU(inplace=True)`): versions are compared here, and if somebody
wrote into y, u is computed again. Of a narrow layer (keys and values of grouped attention, down projections), whose
output is copied or added to the residual stream and not kept by anyone, u is always computed again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cayley import rotate, rotate_blocks
from .dispatch import autocast_dtype, derived, fusable, is_plain, reshaped

TINY = 1e-12  # added to a gain, so that u can be recovered from y where the gain is 0


def keep_output(ctx: Any, y: Tensor) -> Tensor:
    """What to save of an output y: shares its memory, but not autograd's version check."""
    ctx.watch, ctx.version = y.detach(), y._version
    ctx.watch.data = y.new_empty(0)  # keeps following y's version without holding its memory
    return y.data


def output_kept(ctx: Any) -> bool:
    """Whether nobody has written into the output since."""
    return ctx.watch._version == ctx.version


def narrow(W: Tensor) -> bool:
    """Whether the product of W [out, in] is computed again rather than kept."""
    return 2 * W.shape[0] <= W.shape[1]


def linear(base: nn.Module, x: Tensor, s: Tensor, R: Tensor | None = None) -> Tensor | None:
    """x [..., in] through a plain base layer [out, in] with gains s of `out` elements and blocks R [k, B, B] or none.

    None where ordinary ops serve: a bias, a trained weight, nothing to differentiate, other dtypes.
    """
    W: Tensor = base.weight  # type: ignore[assignment]
    trains = torch.is_grad_enabled() and s.requires_grad and not W.requires_grad and base.bias is None
    if is_plain() or not trains or not fusable(x, W, s, R) or autocast_dtype(x) is not None:
        return None
    if x.dtype != W.dtype or x.dtype is torch.float16 or (R is not None and R.shape[0] == 1):
        return None
    return _Gain.apply(x, W, s.flatten(), R)  # type: ignore[return-value]


def _composite(x: Tensor, W: Tensor, s: Tensor, R: Tensor | None) -> Tensor:
    return F.linear(x if R is None else rotate(x, R), W) * s.to(x.dtype)


class _Gain(torch.autograd.Function):
    """(x [..., in], W, s [out], R) -> [..., out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, s: Tensor, R: Tensor | None):
        y = torch.mm(_rotated(x, R), W.t())
        y = reshaped(torch.mul(y, s if narrow(W) else s + TINY, out=y), (*x.shape[:-1], y.shape[-1]))
        ctx.save_for_backward(x, W, s, R, None if narrow(W) else keep_output(ctx, y))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        x, W, s, R, y = ctx.saved_tensors
        if torch.is_grad_enabled():
            return derived(_composite, (x, W, s, R), ctx.needs_input_grad, grads[0])
        g = grads[0].reshape(-1, W.shape[0])
        dx = dR = None
        if y is not None and output_kept(ctx):
            ds = (g * y.view(g.shape)).sum(0, dtype=s.dtype) / (s + TINY)
        else:
            ds = (torch.mm(_rotated(x, R), W.t()).mul_(g)).sum(0, dtype=s.dtype)
        if ctx.needs_input_grad[0] or R is not None:
            dx = torch.mm(torch.mul(g, s, out=torch.empty_like(g)), W)
        if R is not None and dx is not None:
            blocks = (-1, R.shape[0], R.shape[-1])
            if ctx.needs_input_grad[3]:
                dR = torch.bmm(x.reshape(blocks).permute(1, 2, 0), dx.view(blocks).transpose(0, 1)).to(R.dtype)
            dx = rotate_blocks(dx.view(blocks), R.transpose(-2, -1))
        return None if dx is None else dx.view(x.shape), None, ds, dR


def _rotated(x: Tensor, R: Tensor | None) -> Tensor:
    """[T, in]"""
    if R is None:
        return x.reshape(-1, x.shape[-1])
    return rotate_blocks(x.reshape(-1, R.shape[0], R.shape[-1]), R).view(-1, x.shape[-1])
