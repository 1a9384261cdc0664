# SPDX-License-Identifier: Apache-2.0
r"""Linear layers with a trained gain of each output: y = s ⊙ (h Wᵀ), h = x or the rotated x R (IA³, BOFT, RoAd).

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
from .dispatch import Fused, autocast_dtype, derived, fusable, is_plain, reshaped

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
    if not serves(base, x, s, R) or (R is not None and R.shape[0] == 1):
        return None
    return _Gain.apply(x, base.weight, s.flatten(), R)  # type: ignore[return-value]


def turned(base: nn.Module, x: Tensor, theta: Tensor, alpha: Tensor, half: int) -> Tensor | None:
    """The same for outputs whose pairs (j, j + half), in groups of 2 half, are turned by θ and scaled by α (RoAd)."""
    return _Turn.apply(x, base.weight, theta, alpha, half) if serves(base, x, theta, alpha) else None  # type: ignore


def serves(base: nn.Module, x: Tensor, trained: Tensor, other: Tensor | None) -> bool:
    """Whether the functions here take x through `base`, with the gains `trained` and what else is trained."""
    W: Tensor = base.weight  # type: ignore[assignment]
    if is_plain() or not torch.is_grad_enabled() or not trained.requires_grad or base.bias is not None:
        return False
    same = x.dtype == W.dtype and x.dtype is not torch.float16 and not W.requires_grad
    return same and fusable(x, W, trained, other) and autocast_dtype(x) is None


def _composite(x: Tensor, W: Tensor, s: Tensor, R: Tensor | None) -> Tensor:
    return F.linear(x if R is None else rotate(x, R), W) * s.to(x.dtype)


class _Gain(Fused):
    """(x [..., in], W, s [out], R) -> [..., out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, s: Tensor, R: Tensor | None):
        y = F.linear(x if R is None else _rotated(x, R).view(x.shape), W)
        y = reshaped(torch.mul(y, s if narrow(W) else s + TINY, out=y), y.shape)
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


def turn(y: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """y [..., out], c and s [groups, 2 or 1, half] -> pairs (c y1 + s y2, c y2 + s y1); s carries the signs."""
    pairs = y.unflatten(-1, (-1, 2, c.shape[-1]))
    return torch.addcmul(pairs * c, pairs.flip(-2), s).view(y.shape)


def _pairs(theta: Tensor, alpha: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """c [groups, 1, half] and s [groups, 2, half]"""
    s = (alpha * theta.sin()).view(-1, 1, half)
    return (alpha * theta.cos()).view(-1, 1, half), torch.cat((-s, s), 1)


def _turned(x: Tensor, W: Tensor, theta: Tensor, alpha: Tensor, half: int) -> Tensor:
    return turn(F.linear(x, W), *_pairs(theta, alpha, half)).to(x.dtype)


class _Turn(Fused):
    """(x [..., in], W, θ [out / 2], α [out / 2], half) -> y [..., out]. Another θ turns y by a right angle, so the
    gradients of θ and α are the cross and dot products of y with its gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, theta: Tensor, alpha: Tensor, half: int):
        c, s = _pairs(theta, alpha + TINY, half)
        y = turn(F.linear(x, W), c, s).to(x.dtype)
        y = reshaped(y, (*x.shape[:-1], y.shape[-1]))
        ctx.save_for_backward(x, W, theta, alpha, None if narrow(W) else keep_output(ctx, y), c, s)
        ctx.half = half
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        x, W, theta, alpha, y, c, s = ctx.saved_tensors
        (g,), half, needs = grads, ctx.half, ctx.needs_input_grad
        if torch.is_grad_enabled():
            return *derived(lambda *t: _turned(t[0], t[1], t[2], t[3], half), (x, W, theta, alpha), needs[:4], g), None
        if y is None or not output_kept(ctx):
            y = turn(F.linear(x, W), c, s)
        pairs, other = (t.reshape(-1, theta.numel() // half, 2, half) for t in (y, g))
        dot = (pairs * other).sum((0, 2), dtype=theta.dtype)
        cross = (pairs * other.flip(2)).sum(0, dtype=theta.dtype)
        dx = None
        if needs[0]:
            dx = turn(g, c, -s).to(g.dtype) @ W
        return dx, None, (cross[:, 0] - cross[:, 1]).view_as(theta), dot.view_as(alpha) / (alpha + TINY), None


def _rotated(x: Tensor, R: Tensor | None) -> Tensor:
    """[T, in]"""
    if R is None:
        return x.reshape(-1, x.shape[-1])
    return rotate_blocks(x.reshape(-1, R.shape[0], R.shape[-1]), R).view(-1, x.shape[-1])
