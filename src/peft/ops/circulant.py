# SPDX-License-Identifier: Apache-2.0
r"""Block-circulant products (C3A): for w [out/b, in/b, b], block (m, n) is D_mn[i, j] = w[m, n, (j - i) mod b].

In the frequency domain y_m = irfft(sum_n rfft(x_n) conj(rfft(w_mn))): one small complex product per frequency.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import Fused, fusable, is_plain, reshaped, wide

_DIRECT = 4  # below this block size building the matrix is cheaper than transforming the activations


def matrix(w: Tensor) -> Tensor:
    """w [M, N, b] -> the dense [M·b, N·b] matrix by one gather."""
    M, N, b = w.shape
    return w[..., _shifts(b, w.device)].permute(0, 2, 1, 3).reshape(M * b, N * b)


def multiply(x: Tensor, w: Tensor, scale: float = 1.0, published: bool = False) -> Tensor:
    """x [..., N·b], w [M, N, b] -> scale · x Dᵀ [..., M·b] in x's dtype.

    Plain, and for blocks below 4: in w's dtype, through the dense matrix. Fused: keeps x and w only; transforms in
    float32 at least.
    `published`: the input's gradient is the published library's, which reads the output's gradient backwards in each
    block (index -i mod b). Not the derivative; see tuners/c3a.py.
    """
    if _direct(x, w) or not fusable(x, w):
        if published and torch.is_grad_enabled() and x.requires_grad:
            y, mirrored = _plain(x.detach(), w, scale), _reflect(_plain(x, w.detach(), scale), w.shape[-1])
            return y + (mirrored - mirrored.detach())
        return _plain(x, w, scale)
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
        return _Circulant.apply(x, w, scale, published)  # type: ignore[return-value]
    return reshaped(_forward(x, w, scale), (*x.shape[:-1], w.shape[0] * w.shape[2]))


def _plain(x: Tensor, w: Tensor, scale: float) -> Tensor:
    if _direct(x, w):
        return ((x.to(w.dtype) @ matrix(w).t()) * scale).to(x.dtype)
    return _forward(x, w, scale).view(*x.shape[:-1], -1)


def _reflect(g: Tensor, b: int) -> Tensor:
    """Entry i of each block becomes entry -i mod b."""
    return g.unflatten(-1, (-1, b)).roll(-1, -1).flip(-1).flatten(-2)


def _shifts(b: int, device: torch.device) -> Tensor:
    i = torch.arange(b, device=device)
    return (i[None, :] - i[:, None]) % b


def _direct(x: Tensor, w: Tensor) -> bool:
    """Whether to build the matrix. FFT libraries refuse empty batches."""
    return is_plain() or w.shape[-1] < _DIRECT or x.numel() == 0


def _spectrum(x: Tensor, b: int) -> Tensor:
    """x [..., N·b] -> [frequency, rows, N]."""
    return torch.fft.rfft(wide(x).reshape(-1, x.shape[-1] // b, b)).permute(2, 0, 1)


def _signal(X: Tensor, b: int, dtype: torch.dtype) -> Tensor:
    """The inverse: [frequency, rows, N] -> [rows, N·b]."""
    return torch.fft.irfft(X.permute(1, 2, 0), n=b).flatten(1).to(dtype)


def _forward(x: Tensor, w: Tensor, scale: float) -> Tensor:
    """-> [rows, M·b]."""
    b = w.shape[-1]
    W = torch.fft.rfft(wide(w)).permute(2, 1, 0)
    return _signal(torch.bmm(_spectrum(x, b), W.conj()).mul(scale), b, x.dtype)


class _Circulant(Fused):
    """(x [..., N·b], w [M, N, b], scale) -> [..., M·b]; the backward is made of differentiable ops."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, scale: float, published: bool):
        ctx.published = published
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w)
        ctx.scale, ctx.shape = scale, x.shape
        return reshaped(_forward(x, w, scale), (*x.shape[:-1], w.shape[0] * w.shape[2]))

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        (g,) = grads
        x, w = ctx.saved_tensors
        b, G, dx, dw = w.shape[-1], _spectrum(g, w.shape[-1]), None, None
        if ctx.needs_input_grad[0]:
            W = torch.fft.rfft(wide(w)).permute(2, 0, 1)
            # a reflected real signal has the conjugate spectrum
            product = torch.bmm(G.conj() if ctx.published else G, W).mul(ctx.scale)
            dx = _signal(product, b, g.dtype).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            product = torch.bmm(G.conj().transpose(1, 2), _spectrum(x, b)).mul(ctx.scale)
            dw = torch.fft.irfft(product.permute(1, 2, 0), n=b).to(w.dtype)
        return dx, dw, None, None
