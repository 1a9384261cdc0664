# SPDX-License-Identifier: Apache-2.0
r"""DoRA (arXiv 2402.09353): y = g ⊙ (x Wᵀ + s·(x Aᵀ) Bᵀ) + b, g = m / ‖W + s B A‖ per output row, the norm detached.

The norm never forms B A: ‖W_i‖² + 2 s ⟨B_i, (W Aᵀ)_i⟩ + s² B_i (A Aᵀ) B_iᵀ.

Memory. The gradient of m needs the scaled product u = y / g. Where that costs no precision (no bias, not float16) the
function keeps the layer's own output or computes u again (`ops.gain` says when and why); otherwise (a bias, float16,
dropout acting) it keeps u.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Fused, autocast_dtype, derived, fusable, is_plain, reshaped, settled
from .dropout import draw_seed, drop, dropout, keep_mask, rescale, seedable
from .gain import TINY, keep_output, narrow, output_kept
from .low_rank import Factors, dropped

_CHUNK = 1 << 22  # elements of a half-precision weight that are widened at a time


@torch.no_grad()
def dora_norm(W: Tensor, A: Tensor, B: Tensor, scale: float | Tensor = 1.0, w_norm_sq: Tensor | None = None) -> Tensor:
    """Row norms of W + scale·B A, [out], for W [out, in] (any strides), in float32 at least and without gradient.

    `w_norm_sq` are the squared row norms of W if the caller keeps them (`row_norms_sq`).
    """
    dtype = _wide_dtype(W)
    A, B = A.to(dtype), B.to(dtype)
    if is_plain():
        return torch.linalg.vector_norm(W.to(dtype) + scale * (B @ A), dim=1)
    total = row_norms_sq(W) if w_norm_sq is None else w_norm_sq.to(dtype)
    cross, gram = _rows_times(W, A.t()), A @ A.t()  # [out, r], [r, r]
    if isinstance(scale, Tensor):
        cross, gram, scale = cross * scale, gram * (scale * scale), 1.0
    inner = torch.addmm(cross, B, gram, beta=2 * scale, alpha=scale * scale)
    return inner.mul_(B).sum(1).add_(total).clamp_(min=0).sqrt_()


@torch.no_grad()
def row_norms_sq(W: Tensor) -> Tensor:
    """‖W_i‖² for W [out, in], accumulated in float32 at least."""
    W = W.float() if W.dtype.itemsize == 1 else W  # float8 has no arithmetic
    return torch.linalg.vector_norm(W, dim=1, dtype=_wide_dtype(W)).square_()


def _wide_dtype(W: Tensor) -> torch.dtype:
    return torch.float64 if W.dtype == torch.float64 else torch.float32


def _rows_times(W: Tensor, M: Tensor) -> Tensor:
    """W @ M in M's dtype without a wide copy of the whole W."""
    step = max(1, _CHUNK // max(1, W.shape[1]))
    if W.dtype == M.dtype or W.shape[0] <= step:
        return W.to(M.dtype) @ M
    return torch.cat([rows.to(M.dtype) @ M for rows in W.split(step)])


def gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """m / ‖·‖ in the wider of both dtypes; 0 for a row whose norm is 0, where there is no direction to scale."""
    return magnitude / torch.threshold(norm, 0.0, torch.inf)


def dora_linear(
    x: Tensor, W: Tensor, b: Tensor | None, factors: Factors, magnitude: Tensor, norm: Tensor, training: bool = False
) -> Tensor:
    """x [..., in], W [out, in], b [out], magnitude and norm [out] -> [..., out].

    With dropout acting the base product inside the gain sees the dropped x as well, as published:
    y = x Wᵀ + b + (g - 1) ⊙ (drop(x) Wᵀ) + g ⊙ s·(drop(x) Aᵀ) Bᵀ.
    """
    A, B, s, p = factors
    p = p if training else 0.0
    if is_plain():
        return _plain(x, W, b, factors, gain(magnitude, norm), p)
    low = autocast_dtype(x)
    seed = draw_seed() if p > 0.0 and seedable(x) else None
    tensors = (x, W, b, A, B, magnitude, norm)
    graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    dense = fusable(*tensors) and type(s) is not Tensor and x.is_floating_point() and (p == 0.0 or seed is not None)
    if not graph or not dense or W.requires_grad or norm.requires_grad or (W.dtype != x.dtype and low is None):
        return _composite(x, W, b, factors, gain(magnitude, norm), p, seed, None)
    plan = _Plan(float(s), p, seed, low or x.dtype, low is not None)  # type: ignore[arg-type]
    return _Dora.apply(x, W, b, A, B, magnitude, norm, plan)  # type: ignore[return-value]


def dora_accumulate(
    y: Tensor, x: Tensor, b: Tensor | None, factors: Factors, magnitude: Tensor, norm: Tensor,
    training: bool = False, *, product: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """The same on a base output y [..., out] made elsewhere (quantised or hooked base, earlier adapters), in y's dtype.

    b [out] is the part of y that is not scaled. `product(x)` = x Wᵀ without bias is asked only while dropout acts.
    """
    p = factors.dropout if training else 0.0
    g = gain(magnitude, norm)
    if p > 0.0:
        if product is None:
            raise RuntimeError(
                "DoRA with dropout needs `product`: the base product, without bias, of the dropped input"
            )
        x = drop(x, p)
        inner = product(x)
        rest = y - inner
    else:
        inner, rest = (y, None) if b is None else (y - b, b)
    compute = autocast_dtype(x) or (factors.A.dtype if is_plain() else x.dtype)
    z = F.linear(x.to(compute), factors.A.to(compute)) * factors.scale
    scaled = (inner + F.linear(z, factors.B.to(compute))) * g
    return (scaled if rest is None else scaled + rest).to(y.dtype)


def _plain(x: Tensor, W: Tensor, b: Tensor | None, factors: Factors, g: Tensor, p: float) -> Tensor:
    """Reference: adapter products and the gain in the adapter's dtype."""
    y = F.linear(x, W, b)
    base = y if b is None else y - b
    if p > 0.0:
        x = drop(x, p)
        base = F.linear(x, W)
    delta = F.linear(F.linear(x.to(factors.A.dtype), factors.A), factors.B) * factors.scale
    return (y + (g - 1) * base + g * delta).to(y.dtype)


def _composite(
    x: Tensor, W: Tensor, b: Tensor | None, factors: Factors, g: Tensor, p: float, seed: int | None,
    dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """The fused path's arithmetic by ordinary ops; `dtype` repeats a forward's choice outside its autocast region."""
    compute = dtype or autocast_dtype(x) or x.dtype
    if dtype is not None:
        x, W, b = x.to(dtype), W.to(dtype), None if b is None else b.to(dtype)
    h = dropout(x, p, seed)
    u = base = F.linear(h, W)
    z = F.linear(h.to(compute), factors.A.to(compute))
    s = factors.scale
    z = z * (s.to(compute) if isinstance(s, Tensor) else s)
    u = u + F.linear(z, factors.B.to(compute))
    y = g * u
    if p > 0.0:
        y = F.linear(x, W) + (y - base)
    if b is not None:
        y = y + b
    return y.to(base.dtype)


class _Plan(NamedTuple):
    scale: float
    drop: float
    seed: int | None
    dtype: torch.dtype
    cast: bool  # autocast is on


class _Dora(Fused):
    """(x [..., in], W, b, A, B, m [out], norm [out], plan) -> [..., out]; the norm is a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, m: Tensor, norm: Tensor, plan):
        dtype, needs = plan.dtype, ctx.needs_input_grad
        h = x.reshape(-1, x.shape[-1]).to(dtype)
        Wc, Ac, Bc, bc = W.to(dtype), A.to(dtype), B.to(dtype), None if b is None else b.to(dtype)
        g = gain(m, norm)
        reuse = needs[5] and b is None and plan.seed is None and dtype is not torch.float16
        again = reuse and narrow(W)
        if reuse and not again:
            g = g + TINY
        y, u, z = _output(h, Wc, bc, Ac, Bc, g, plan, keep_product=needs[5] and not reuse)
        y = reshaped(y, (*x.shape[:-1], y.shape[-1]))
        if reuse:
            u = None if again else keep_output(ctx, y)
        ctx.reuse, ctx.plan = reuse, plan
        kept = (Ac if needs[0] else None, Bc, z if needs[4] else None, g, u if needs[5] else None)
        ctx.save_for_backward(x, W, b, A, B, m, norm, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        saved = ctx.saved_tensors
        step = _differentiable_backward if torch.is_grad_enabled() else _backward
        with settled(grads[0]):
            return step(ctx, grads[0], saved)


def _output(
    h: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, g: Tensor, plan: _Plan, *, keep_product: bool
):
    """y, u if it is to be kept (u and y may be one tensor otherwise), and z = drop(h) Aᵀ without the scale."""
    if plan.seed is None:
        u = torch.mm(h, W.t())
        z = torch.mm(h, A.t())
        u.addmm_(z, B.t(), alpha=plan.scale)
        y = torch.mul(u, g, out=torch.empty_like(u) if keep_product else u)
        return y if b is None else y.add_(b), u, z
    hd = dropped(h, plan.drop, plan.seed)
    alpha = rescale(plan.drop)
    y = torch.mm(h, W.t()) if b is None else torch.addmm(b, h, W.t())
    u = torch.addmm(B[:, 0], hd, W.t(), beta=0, alpha=alpha)  # beta = 0: the first argument only has a fitting shape
    y.sub_(u)
    z = torch.mm(hd, A.t())
    u.addmm_(z, B.t(), alpha=plan.scale * alpha)
    return _add_scaled_(y, u, g), u, z


def _add_scaled_(y: Tensor, u: Tensor, g: Tensor) -> Tensor:
    return y.addcmul_(u, g) if g.dtype == u.dtype else y.add_(_times(u, g))


def _times(t: Tensor, g: Tensor) -> Tensor:
    """t * g computed in the wider dtype, rounded once to t's."""
    return torch.mul(t, g, out=torch.empty_like(t))


def _backward(ctx: Any, G: Tensor, saved: Any) -> tuple[Any, ...]:
    plan, needs = ctx.plan, ctx.needs_input_grad
    x, W, b, A, B, m, norm, Ac, Bc, z, g, u = saved
    G = G.reshape(-1, G.shape[-1])
    h = x.reshape(-1, x.shape[-1]).to(plan.dtype)
    mask = None if plan.seed is None else keep_mask(plan.seed, plan.drop, h)
    alpha = plan.scale * rescale(plan.drop)
    dx = db = dA = dB = dm = None
    if needs[2]:
        db = G.sum(0).to(b.dtype)
    if needs[5]:
        divide = torch.threshold(norm, 0.0, torch.inf)
        if ctx.reuse and u is not None and output_kept(ctx):
            divide = g * divide  # u is y here
        elif ctx.reuse:
            u = torch.mm(h, W.to(plan.dtype).t()).addmm_(torch.mm(h, A.to(plan.dtype).t()), Bc.t(), alpha=plan.scale)
        rows = (G * u.view(G.shape)).sum(0, dtype=g.dtype)  # type: ignore[union-attr]
        dm = (rows / divide).to(m.dtype)
    dU = _times(G, g)
    if needs[4]:
        dB = torch.addmm(Bc, dU.t(), z, beta=0, alpha=alpha).to(B.dtype)
    p = torch.addmm(Bc[:1], dU, Bc, beta=0, alpha=alpha) if needs[0] or needs[3] else None
    if needs[3]:
        dA = torch.mm(p.t(), h if mask is None else h * mask).to(A.dtype)  # type: ignore[union-attr]
    if needs[0]:
        dx = _input_grad(G, dU, W.to(plan.dtype), p, Ac, plan.drop, mask).view(x.shape).to(x.dtype)
    return dx, None, db, dA, dB, dm, None, None


def _input_grad(G: Tensor, dU: Tensor, W: Tensor, p: Any, A: Tensor, drop: float, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.mm(dU, W).addmm_(p, A)
    inner = torch.mm(dU.sub_(G), W).mul_(rescale(drop)).addmm_(p, A)
    return torch.mm(G, W).addcmul_(inner, mask)


def _differentiable_backward(ctx: Any, G: Tensor, saved: Any) -> tuple[Any, ...]:
    """For create_graph=True: rebuild the output by ordinary ops from the inputs and differentiate that."""
    plan = ctx.plan

    def output(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, m: Tensor, norm: Tensor) -> Tensor:
        factors = Factors(A, B, plan.scale, plan.drop)
        return _composite(x, W, b, factors, gain(m, norm), plan.drop, plan.seed, plan.dtype)

    return *derived(output, saved[:7], ctx.needs_input_grad[:7], G), None
