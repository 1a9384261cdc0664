# SPDX-License-Identifier: Apache-2.0
r"""Rotations: skew matrices, the Cayley map and its Neumann series, block-diagonal and butterfly products.

Conventions. A rotation acts on row vectors, y_k = x_k R_k for each block k of the last dimension, so the layer
y = W (x R)ᵀ has the weight W Rᵀ (`rotate_weight`). Exact: R = (I - Q)(I + Q)⁻¹. The series approximates the *inverse*,
(I + Q)(I - Q)⁻¹: the two parametrisations have opposite sign, and a checkpoint is only valid with its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import Fused, derived, fusable, is_plain, reshaped, settled, wide


def skew(v: Tensor, size: int, rows: Tensor | None = None, cols: Tensor | None = None) -> Tensor:
    """v [..., size(size-1)/2], the upper triangle in row-major order -> Q [..., size, size] with Qᵀ = -Q.

    `rows`, `cols` are `torch.triu_indices(size, size, 1)` if the caller keeps them.
    """
    if rows is None or cols is None or (rows.is_meta and not v.is_meta):  # kept from a time without a device
        rows, cols = torch.triu_indices(size, size, 1, device=v.device)
    if fusable(v) and not is_plain():
        return _Skew.apply(v, size, rows, cols)  # type: ignore[return-value]
    flat = v.new_zeros(*v.shape[:-1], size * size).index_copy(-1, rows * size + cols, v)
    upper = flat.unflatten(-1, (size, size))
    return upper - upper.transpose(-2, -1)


class _Skew(Fused):
    """(v [..., size(size-1)/2], size, rows, cols) -> [..., size, size]."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, size: int, rows: Tensor, cols: Tensor):
        ctx.save_for_backward(rows, cols)
        upper = v.new_zeros(*v.shape[:-1], size, size)
        upper[..., rows, cols] = v
        return upper - upper.transpose(-2, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        rows, cols = ctx.saved_tensors
        return (grads[0] - grads[0].transpose(-2, -1))[..., rows, cols], None, None, None


def cayley(Q: Tensor) -> Tensor:
    """(I - Q)(I + Q)⁻¹ for Q [..., n, n], orthogonal if Q is skew; in float32 at least, returned in Q's dtype."""
    work = wide(Q)
    if fusable(Q) and not is_plain():
        return _Cayley.apply(work).to(Q.dtype)  # type: ignore[union-attr]
    identity = torch.eye(Q.shape[-1], dtype=work.dtype, device=Q.device)
    # the factors commute, so solving from the left is the same and needs no transposition
    return torch.linalg.solve(identity + work, identity - work).to(Q.dtype)


class _Cayley(Fused):
    """Q -> R = 2 (I + Q)⁻¹ - I, which is all that is kept: dR = -(I + R) dQ (I + R) / 2."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor):
        identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        R = identity.lerp(torch.linalg.inv(identity + Q), 2.0)
        ctx.save_for_backward(R)
        return R

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        (R,) = ctx.saved_tensors
        g, R = (t.reshape(-1, *R.shape[-2:]) for t in (grads[0], R))
        M = (R + torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)).transpose(-2, -1)
        return torch.bmm(torch.baddbmm(g, M, g, beta=0, alpha=-0.5), M).view(grads[0].shape)


def cayley_series(Q: Tensor, terms: int) -> Tensor:
    """The truncated series of (I + Q)(I - Q)⁻¹: I + 2Q + ... + 2Q^(terms-2) + Q^(terms-1); two products for five
    terms. terms = 3 means the same as terms = 4, as published.
    """
    if terms < 1:
        raise ValueError(f"the Cayley-Neumann series needs at least 1 term, got {terms}")
    with settled(Q):  # a rotation keeps its dtype under autocast
        if terms == 5 and Q.dim() == 3 and fusable(Q) and not is_plain():
            return _FiveTerms.apply(Q)  # type: ignore[return-value]
        return _series(Q, 3 if terms == 3 else terms - 1)


def _series(Q: Tensor, degree: int) -> Tensor:
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    if degree == 0:
        return identity.expand_as(Q).clone()
    total, power = identity + 2 * Q, Q
    for k in range(2, degree + 1):
        power = power @ Q
        total = torch.add(total, power, alpha=1 if k == degree else 2)
    return total


class _FiveTerms(Fused):
    """The default series, I + 2Q + Q² (2I + 2Q + Q²) for Q [k, n, n], and its gradient by four products."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor):
        identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        square, line = torch.bmm(Q, Q), torch.add(identity, Q, alpha=2)
        inner = (square + line).add_(identity)
        ctx.save_for_backward(Q, square, inner)
        return torch.baddbmm(line, square, inner)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        Q, square, inner = ctx.saved_tensors
        (g,) = grads
        if torch.is_grad_enabled():
            return derived(lambda q: _series(q, 4), (Q,), (True,), g)
        Qt = Q.transpose(-2, -1)
        d_inner = torch.bmm(square.transpose(-2, -1), g)
        d_square = torch.baddbmm(d_inner, g, inner.transpose(-2, -1))
        return torch.baddbmm(g + d_inner, d_square, Qt, beta=2).baddbmm_(Qt, d_square)


def project(v: Tensor, radius: float) -> Tensor:
    """Scale each block's v [..., size(size-1)/2] so that its skew matrix has a Frobenius norm of at most `radius`."""
    norm = v.norm(dim=-1, keepdim=True) * 2**0.5
    return v * (radius / norm.clamp(min=torch.finfo(v.dtype).tiny)).clamp(max=1.0)


def bound(Q: Tensor, radius: float) -> Tensor:
    """The same for the skew matrices Q [..., n, n] themselves."""
    norm = torch.linalg.matrix_norm(Q, keepdim=True)
    return Q * (radius / norm.clamp(min=torch.finfo(Q.dtype).tiny)).clamp(max=1.0)


def block_diagonal(R: Tensor, size: int) -> Tensor:
    """R [blocks or 1, B, B] -> the dense [size, size] matrix."""
    B = R.shape[-1]
    R = R.expand(size // B, B, B)
    out = R.new_zeros(size // B, B, size // B, B)
    return torch.diagonal_scatter(out, R.permute(1, 2, 0), dim1=0, dim2=2).reshape(size, size)


def rotate(x: Tensor, R: Tensor) -> Tensor:
    """x [..., k·B], R [k, B, B] or one shared block [1, B, B] -> [..., k·B], each block x_k R_k; in x's dtype.

    Plain: in R's dtype, cast back. Fused: one batched product in x's dtype, written in place of a transposed copy. A
    half-precision x is multiplied by R - I and added to the product, so that a rotation near the identity keeps its
    small entries; x and R are all that is kept for backward.
    """
    if is_plain() or not fusable(x, R) or not x.is_floating_point():
        return _rotate_plain(x, R)
    if R.shape[0] == 1:
        h = x.reshape(-1, R.shape[-1])
        D = _minus_identity(R, x.dtype)
        return (torch.mm(h, R[0].to(x.dtype)) if D is None else torch.addmm(h, h, D[0])).view(x.shape)
    if torch.is_grad_enabled() and (x.requires_grad or R.requires_grad):
        return _Rotate.apply(x, R)  # type: ignore[return-value]
    return rotate_blocks(x.reshape(-1, *R.shape[:2]), R).view(x.shape)


def rotate_weight(W: Tensor, R: Tensor) -> Tensor:
    """W [out, in] -> W Rᵀ, the weight of the layer that `rotate`s its input first. Out·in·B multiplications."""
    return rotate(W, R.transpose(-2, -1))


def _rotate_plain(x: Tensor, R: Tensor) -> Tensor:
    B = R.shape[-1]
    h = x.to(R.dtype).unflatten(-1, (-1, B)).unsqueeze(-2)
    return (h @ R).squeeze(-2).flatten(-2).to(x.dtype)


def _minus_identity(R: Tensor, dtype: torch.dtype) -> Tensor | None:
    """R - I rounded to a half dtype, None for wider ones, whose rounding of R itself does no harm."""
    if dtype not in (torch.float16, torch.bfloat16):
        return None
    return (R - torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)).to(dtype)


def rotate_blocks(h: Tensor, R: Tensor) -> Tensor:
    """h [T, k, B], R [k, B, B] -> contiguous [T, k, B]."""
    out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    ht, D = h.transpose(0, 1), _minus_identity(R, h.dtype)
    if D is None:
        torch.bmm(ht, R.to(h.dtype), out=out.transpose(0, 1))
    else:
        torch.baddbmm(ht, ht, D, out=out.transpose(0, 1))
    return out


class _Rotate(Fused):
    """(x [..., k·B], R [k, B, B]) -> [..., k·B]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, R)
        return reshaped(rotate_blocks(x.reshape(-1, R.shape[0], R.shape[-1]), R), x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        (g,) = grads
        x, R = ctx.saved_tensors
        blocks = (-1, R.shape[0], R.shape[-1])
        dx = dR = None
        if ctx.needs_input_grad[0]:  # differentiable itself, for create_graph
            dx = rotate(g, R.transpose(-2, -1))
        if ctx.needs_input_grad[1]:
            dR = torch.bmm(x.reshape(blocks).permute(1, 2, 0), g.reshape(blocks).transpose(0, 1)).to(R.dtype)
        return dx, dR


def butterfly(x: Tensor, O: Tensor, transpose: bool = False) -> Tensor:  # noqa: E741 - the paper's name
    """x [..., n], O [N, n/B, B, B] -> x R (x Rᵀ if `transpose`), R = F_{N-1} ... F_0 as row operators of BOFT.

    F_i = P_i blockdiag(O_i) P_iᵀ, where P_i shuffles half blocks of B/2 columns over a distance of 2^i: a view and a
    transposition instead of a permutation matrix.
    """
    count, half = O.shape[0], O.shape[-1] // 2
    order = range(count) if transpose else range(count - 1, -1, -1)
    for i in order:
        factor = O[i].transpose(-2, -1) if transpose else O[i]
        z = _shuffle(x, 2, 2**i, half) if i else x  # P_0 is the identity
        z = rotate(z, factor)
        x = _shuffle(z, 2**i, 2, half) if i else z
    return x


def _shuffle(x: Tensor, first: int, second: int, half: int) -> Tensor:
    return x.unflatten(-1, (-1, first, second, half)).transpose(-3, -2).flatten(-4)
