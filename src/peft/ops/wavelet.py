# SPDX-License-Identifier: Apache-2.0
r"""Matrices that are sparse in a one-level wavelet basis: D = M_out S M_inᵀ with a few entries in S (WaveFT).

M_N [N, P] rebuilds a signal of length N from P padded coefficients (first half low-pass, second half high-pass). Both
transforms are applied along the last dimension by their filter taps; the matrices M are never formed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import sparse
from .dispatch import Fused, fusable, is_plain, reshaped
from .wavelet_filters import FILTERS


class Basis(NamedTuple):
    """Where the trained coefficients of one matrix sit in S; computed once for each shape and set of positions."""

    rows: Tensor  # [n]
    cols: Tensor  # [n]
    shape: tuple[int, int]  # of D: [out, in]
    wavelet: str


def padded(n: int, wavelet: str) -> int:
    """How many coefficients a signal of length n needs: n + taps - 2, rounded up to an even number."""
    total = n + len(FILTERS[wavelet]) - 2
    return total + total % 2


def basis(rows: Tensor, cols: Tensor, shape: tuple[int, int], wavelet: str) -> Basis:
    """Positions in the [out, in] weight grid, as stored by adapters -> positions in S.

    The published layout centres the grid in the padded one and calls the upper right quadrant horizontal details, which
    the separable transform wants at the lower left: the off-diagonal quadrants change places.
    """
    if wavelet not in FILTERS:
        raise ValueError(f"wavelet {wavelet!r} has no filter; available: {', '.join(FILTERS)}")
    P, Q = padded(shape[0], wavelet), padded(shape[1], wavelet)
    rows, cols = rows + (P - shape[0]) // 2, cols + (Q - shape[1]) // 2
    lower, right = rows >= P // 2, cols >= Q // 2
    return Basis(rows % (P // 2) + right * (P // 2), cols % (Q // 2) + lower * (Q // 2), shape, wavelet)


def synthesise(a: Tensor, n: int, wavelet: str) -> Tensor:
    """a [..., padded(n)] -> a M_nᵀ [..., n]."""
    half, taps = a.shape[-1] // 2, len(FILTERS[wavelet])
    if taps == 2:
        g = FILTERS[wavelet][0]
        low, high = a[..., :half], a[..., half:]
        return (torch.stack((low + high, low - high), -1).flatten(-2) * g)[..., :n]
    out = F.conv_transpose1d(a.reshape(-1, 2, half), _pair(wavelet, a), stride=2, padding=taps - 2)
    return out[..., :n].reshape(*a.shape[:-1], n)


def analyse(x: Tensor, wavelet: str) -> Tensor:
    """The adjoint: x [..., n] -> x M_n [..., padded(n)]."""
    n, taps = x.shape[-1], len(FILTERS[wavelet])
    if n % 2:
        x = F.pad(x, (0, 1))
    if taps == 2:
        g = FILTERS[wavelet][0]
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.cat((even + odd, even - odd), -1) * g
    out = F.conv1d(x.reshape(-1, 1, x.shape[-1]), _pair(wavelet, x), stride=2, padding=taps - 2)
    return out.reshape(*x.shape[:-1], -1) if x.numel() else x.new_zeros(*x.shape[:-1], padded(n, wavelet))


def _pair(wavelet: str, like: Tensor) -> Tensor:
    """Low-pass and high-pass taps [2, 1, L]."""
    low = FILTERS[wavelet]
    high = [(-1) ** i * g for i, g in enumerate(reversed(low))]
    return torch.tensor([low, high], dtype=torch.float64).to(like).unsqueeze(1)


def matrix(c: Tensor, where: Basis, scale: float = 1.0) -> Tensor:
    """c [n] -> scale · D, dense [out, in], for merging and for a weight path: taps times the size of D, no products."""
    rows, cols = where.rows.to(c.device), where.cols.to(c.device)
    if is_plain() or not fusable(c):
        return _dense(c, rows, cols, where, scale)
    return _Matrix.apply(c, rows, cols, where, scale)  # type: ignore[return-value]


def _dense(c: Tensor, rows: Tensor, cols: Tensor, where: Basis, scale: float) -> Tensor:
    out, n = where.shape
    S = c.new_zeros(padded(out, where.wavelet), padded(n, where.wavelet))
    S = S.index_put((rows, cols), c * scale, accumulate=True)
    return synthesise(synthesise(S, n, where.wavelet).t(), out, where.wavelet).t()


class _Matrix(Fused):
    """(c [n], rows, cols, basis, scale) -> scale · D; the backward is the adjoint, of differentiable ops."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, rows: Tensor, cols: Tensor, where: Basis, scale: float):
        ctx.save_for_backward(rows, cols)
        ctx.wavelet, ctx.scale = where.wavelet, scale
        return _dense(c, rows, cols, where, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        rows, cols = ctx.saved_tensors
        dS = analyse(analyse(grads[0], ctx.wavelet).t(), ctx.wavelet)
        return dS[cols, rows] * ctx.scale, None, None, None, None


def multiply(x: Tensor, c: Tensor, where: Basis, scale: float = 1.0) -> Tensor:
    """x [..., in], c [n] -> scale · x Dᵀ [..., out] in x's dtype.

    Plain: in c's dtype, through the dense matrix. Fused: both transforms on the activations and n multiplications for
    each row; keeps x and c, and nothing of the size of the weight is made.
    """
    if is_plain():
        return (x.to(c.dtype) @ matrix(c, where, scale).t()).to(x.dtype)
    where = Basis(where.rows.to(c.device), where.cols.to(c.device), where.shape, where.wavelet)
    if fusable(x, c) and torch.is_grad_enabled() and (x.requires_grad or c.requires_grad):
        return _Wavelet.apply(x, c, where.rows, where.cols, where, scale)  # type: ignore[return-value]
    h = x.reshape(-1, x.shape[-1])
    return _product(h, c * scale, where).reshape(*x.shape[:-1], where.shape[0])


def _product(h: Tensor, c: Tensor, where: Basis) -> Tensor:
    out, wavelet = where.shape[0], where.wavelet
    u = analyse(h, wavelet).t()
    v = sparse.scatter(u, c.to(h.dtype), where.rows, where.cols, padded(out, wavelet))
    return synthesise(v.t(), out, wavelet)


class _Wavelet(Fused):
    """(x [..., in], c [n], rows, cols, basis, scale) -> [..., out]; the backward is made of differentiable ops."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, rows: Tensor, cols: Tensor, where: Basis, scale: float):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, c)
        ctx.where, ctx.scale, ctx.shape = where, scale, x.shape
        y = _product(x.reshape(-1, x.shape[-1]), c * scale, where)
        return reshaped(y.contiguous(), (*x.shape[:-1], where.shape[0]))

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        (g,) = grads
        x, c = ctx.saved_tensors
        rows, cols, (_, n), wavelet = ctx.where
        v = analyse(g.reshape(-1, g.shape[-1]), wavelet).t()
        dx = dc = None
        if ctx.needs_input_grad[0]:
            u = sparse.scatter(v, (c * ctx.scale).to(g.dtype), cols, rows, padded(n, wavelet))
            dx = synthesise(u.t(), n, wavelet).reshape(ctx.shape)
        if ctx.needs_input_grad[1]:
            u = analyse(x.reshape(-1, n), wavelet).t()
            dc = (sparse.sample(v, u, rows, cols) * ctx.scale).to(c.dtype)
        return dx, dc, None, None, None, None
