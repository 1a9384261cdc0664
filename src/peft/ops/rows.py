# SPDX-License-Identifier: Apache-2.0
"""Trainable rows of a frozen [vocab, dim] matrix: patching what an embedding or an output head computed from it.

The matrix with replaced rows is never formed, and its gradient is never dense.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Fused, autocast_dtype, fusable, is_plain, reshaped, settled


def slots(indices: Tensor, vocab: int) -> Tensor:
    """indices [k] of the trained rows -> int64 [vocab]: each token's row, -1 for tokens that are not trained."""
    table = torch.full((vocab,), -1, dtype=torch.int64, device=indices.device)
    table[indices] = torch.arange(indices.numel(), device=indices.device)
    return table


def embed(
    y: Tensor,
    ids: Tensor,
    table: Tensor,
    rows: Tensor,
    *,
    scale: Tensor | float | None = None,
    fixed: int | None = None,
) -> Tensor:
    """y [..., dim] = base(ids [...]) with the rows [k, dim] put in where `table` (see `slots`) names one, in y's dtype.

    `scale` is what the base embedding multiplies its rows by; `fixed` is the slot of the padding token, whose row gets
    no gradient, as in `F.embedding`.
    """
    slot = table[ids]
    if fixed is not None:
        keep = torch.arange(rows.shape[0], device=rows.device).unsqueeze(-1) == fixed
        rows = torch.where(keep, rows.detach(), rows)
    rows = rows.to(y.dtype)  # k rows, before they are spread over the tokens
    if scale is not None:
        rows = rows * (scale.to(rows) if isinstance(scale, Tensor) else scale)
    return torch.where((slot >= 0).unsqueeze(-1), F.embedding(slot.clamp(min=0), rows), y)


def replaced(W: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """The dense matrix with replaced rows: for merging, and the reference."""
    return W.index_copy(0, indices, rows.to(W.dtype))


def head(x: Tensor, W: Tensor, b: Tensor | None, indices: Tensor, rows: Tensor) -> Tensor:
    """x [..., dim] -> logits [..., vocab] of the matrix W [vocab, dim] with `rows` [k, dim] at `indices` [k].

    Fused: the logits are computed once and k columns overwritten; x is kept, nothing of vocabulary width is. In
    backward dx = g W + g_k (rows - W_k), so that the incoming gradient is neither copied nor masked.
    """
    if is_plain():
        return F.linear(x, replaced(W, indices, rows), b)
    low = autocast_dtype(x)
    frozen = not W.requires_grad and (b is None or not b.requires_grad)
    graph = torch.is_grad_enabled() and (x.requires_grad or rows.requires_grad)
    if not fusable(x, W, b, rows) or not graph or not frozen or (W.dtype != x.dtype and low is None):
        return patch(F.linear(x, W, b), x, b, indices, rows)
    return _Head.apply(x, W, b, indices, rows, low or x.dtype)  # type: ignore[return-value]


def patch(logits: Tensor, x: Tensor, b: Tensor | None, indices: Tensor, rows: Tensor) -> Tensor:
    """The same for logits [..., vocab] computed elsewhere; out of place, as others may hold them."""
    columns = F.linear(x, rows.to(x.dtype), None if b is None else b[indices].to(x.dtype))
    return logits.index_copy(-1, indices, columns.to(logits.dtype))


class _Head(Fused):
    """(x [..., dim], W, b, indices [k], rows [k, dim], dtype of the products) -> [..., vocab]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, indices: Tensor, rows: Tensor, dtype: torch.dtype):
        h = x.reshape(-1, x.shape[-1]).to(dtype)
        R = rows.to(dtype)
        Wc, bc = W.to(dtype), None if b is None else b.to(dtype)
        logits = torch.mm(h, Wc.t()) if bc is None else torch.addmm(bc, h, Wc.t())
        columns = torch.mm(h, R.t()) if bc is None else torch.addmm(bc[indices], h, R.t())
        logits.index_copy_(-1, indices, columns)
        ctx.save_for_backward(x, W if ctx.needs_input_grad[0] else None, indices, rows)
        ctx.dtype = dtype
        return reshaped(logits, (*x.shape[:-1], W.shape[0]))

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        """Made of differentiable ops: W is frozen and x and rows are inputs, so a second derivative is right too."""
        x, W, indices, rows = ctx.saved_tensors
        g, dx, drows = grads[0].reshape(-1, grads[0].shape[-1]), None, None
        with settled(g):
            picked = g.index_select(-1, indices)
            if ctx.needs_input_grad[0]:
                change = rows.to(ctx.dtype) - W.index_select(0, indices).to(ctx.dtype)
                wide = torch.mm(g, W.to(ctx.dtype))
                grown = torch.addmm(wide, picked, change) if torch.is_grad_enabled() else wide.addmm_(picked, change)
                dx = grown.view(x.shape).to(x.dtype)
            if ctx.needs_input_grad[4]:
                drows = torch.mm(picked.t(), x.reshape(-1, x.shape[-1]).to(ctx.dtype)).to(rows.dtype)
        return dx, None, None, None, drows, None
