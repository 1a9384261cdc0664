# SPDX-License-Identifier: Apache-2.0
"""Products with a matrix given by scattered entries: S [out, in] with S[rows[e], cols[e]] += values[e]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import Fused, fusable, is_plain, reshaped

_CHUNK = 1 << 24  # elements of gathered activations held at a time


def matrix(values: Tensor, rows: Tensor, cols: Tensor, shape: tuple[int, int]) -> Tensor:
    """The dense [out, in] matrix; equal positions add up."""
    out = values.new_zeros(shape[0] * shape[1])
    return out.index_add(0, rows * shape[1] + cols, values).view(shape)


def multiply(x: Tensor, values: Tensor, rows: Tensor, cols: Tensor, out: int, scale: float = 1.0) -> Tensor:
    """x [..., in], values [n], rows and cols [n] -> scale · x Sᵀ [..., out] in x's dtype.

    Plain: in the dtype of the values, through the dense matrix. Fused: n multiplications for each row of x, and for the
    gradient of the values n more; keeps x and the values, nothing of the size of the weight.
    """
    if is_plain():
        return ((x.to(values.dtype) @ matrix(values, rows, cols, (out, x.shape[-1])).t()) * scale).to(x.dtype)
    shape = (*x.shape[:-1], out)
    if fusable(x, values) and torch.is_grad_enabled() and (x.requires_grad or values.requires_grad):
        return _Sparse.apply(x, values, rows, cols, out, scale)  # type: ignore[return-value]
    return scatter(x.reshape(-1, x.shape[-1]).t(), values.to(x.dtype) * scale, rows, cols, out).t().reshape(shape)


def scatter(xt: Tensor, values: Tensor, rows: Tensor, cols: Tensor, out: int) -> Tensor:
    """S xt for xt [in, T] -> [out, T]: whole rows are moved, which is what memory likes."""
    xt = xt.contiguous()
    result = xt.new_zeros(out, xt.shape[1])
    for some in _chunks(rows, xt):
        result = result.index_add(0, rows[some], xt.index_select(0, cols[some]) * values[some].unsqueeze(-1))
    return result


def sample(gt: Tensor, xt: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """The entries (rows, cols) of gt xtᵀ for gt [out, T], xt [in, T] -> [n]."""
    gt, xt = gt.contiguous(), xt.contiguous()
    wide = torch.promote_types(gt.dtype, torch.float32)
    parts = [
        (gt.index_select(0, rows[some]) * xt.index_select(0, cols[some])).sum(1, dtype=wide)
        for some in _chunks(rows, xt)
    ]
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def _chunks(rows: Tensor, xt: Tensor) -> list[slice]:
    n = rows.numel()
    if torch.compiler.is_compiling():
        return [slice(0, n)]
    step = max(1, _CHUNK // max(1, xt.shape[1]))
    return [slice(i, min(i + step, n)) for i in range(0, n, step)] or [slice(0, 0)]


class _Sparse(Fused):
    """(x [..., in], values [n], rows, cols, out, scale) -> [..., out]; the backward is made of differentiable ops."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, rows: Tensor, cols: Tensor, out: int, scale: float):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, rows, cols)
        ctx.shape, ctx.scale = x.shape, scale
        xt = x.reshape(-1, x.shape[-1]).t()
        y = scatter(xt, values.to(x.dtype) * scale, rows, cols, out).t().contiguous()
        return reshaped(y, (*x.shape[:-1], out))

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        (g,) = grads
        x, values, rows, cols = ctx.saved_tensors
        gt = g.reshape(-1, g.shape[-1]).t()
        dx = dv = None
        if ctx.needs_input_grad[0]:
            dx = scatter(gt, values.to(g.dtype) * ctx.scale, cols, rows, ctx.shape[-1]).t().reshape(ctx.shape)
        if ctx.needs_input_grad[1]:
            dv = (sample(gt, x.reshape(-1, x.shape[-1]).t(), rows, cols) * ctx.scale).to(values.dtype)
        return dx, dv, None, None, None, None
