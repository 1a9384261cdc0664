# SPDX-License-Identifier: Apache-2.0
r"""Linear layers with low-rank additions: y = x Wᵀ + b + sum_i s_i · (drop_i(x) A_iᵀ) B_iᵀ.

Precision. The plain path is the peer's: each adapter's products in that adapter's dtype, accumulated there, the sum
cast to the base output's dtype. The fused path makes all products in the dtype of the base GEMM (`x.dtype`, or
autocast's), with the GEMM's own fp32 accumulation: float32 factors over a bfloat16 base are rounded to bfloat16 for the
products, and gradients come back in the factors' dtype. `peft.ops.plain()` / `use_plain()` give the peer's float32
arithmetic instead.

Memory. The fused path keeps x (the very tensor siblings keep, so the storage is shared), the rank-wide x Aᵀ, and the
factors. Dropout masks are regenerated from a seed. An input that is modified in place after the call raises autograd's
version error if A trains, as for a linear layer with a trainable weight; the output may be modified in place freely.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import DENSE, Fused, autocast_dtype, derived, fusable, is_plain, reshaped, settled
from .dropout import draw_seed, drop, dropout, keep_mask, rescale, seedable


class Factors(NamedTuple):
    """One adapter. A and B may be leaves or computed, trainable or frozen."""

    A: Tensor  # [r, in]
    B: Tensor  # [out, r]
    scale: float | Tensor = 1.0  # a number, or a tensor broadcast against x Aᵀ: 0-d (hot swap), [r], [..., 1] (gates)
    dropout: float = 0.0  # on the input, in training


Seeds = tuple[int | None, ...]
# below this many elements of x a call costs Python time, not memory traffic: fewer, fatter calls win over addmm
_SMALL = 1 << 15


def linear(x: Tensor, W: Tensor, b: Tensor | None, factors: tuple[Factors, ...], training: bool = False) -> Tensor:
    """x [..., in], W [out, in], b [out] -> [..., out]. Base product and adapters in one autograd function."""
    if is_plain():
        return plain_accumulate(F.linear(x, W, b), x, factors, training)
    if not torch.is_grad_enabled():
        return _infer(F.linear(x, W, b), x, factors, training, own=True)
    if not factors[0].A.requires_grad and (wide := _wide(x, W, factors, training)) is not None:
        return merged(x, W, b, *wide)
    low = autocast_dtype(x)
    own_dtype = W.dtype == x.dtype if low is None else not W.requires_grad  # autocast must see the cast of a trained W
    known = (
        _survey(factors, training, x, W, low or x.dtype, low is not None) if own_dtype and fusable(x, W, b) else None
    )
    if known is None:
        return _composite(x, W, b, None, factors, _seeds(x, factors, training), None, training)
    return _LowRank.apply(x, W, b, None, *known)


def accumulate(y: Tensor, x: Tensor, factors: tuple[Factors, ...], training: bool = False) -> Tensor:
    """y [..., out] + the adapters' output on x [..., in], in y's dtype, for a base output made elsewhere.

    Out of place always: whoever made y may have kept it, and the in-place form would not read or write fewer bytes.
    """
    if is_plain():
        return plain_accumulate(y, x, factors, training)
    if not torch.is_grad_enabled():
        return _infer(y, x, factors, training, own=False)
    dtype = autocast_dtype(x) or x.dtype
    same = dtype == y.dtype and y.shape[:-1] == x.shape[:-1]
    known = _survey(factors, training, x, None, dtype, False) if same and fusable(x, y) else None
    if known is None:
        return _composite(x, None, None, y, factors, _seeds(x, factors, training), None, training)
    base = None if y is x else y  # x + delta(x): one gradient for x, not two that autograd would add
    return _LowRank.apply(x, None, None, base, *known)


def merged(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    """x [..., in] -> x (W + B A)ᵀ + b with the gradients of the factors: for wide ranks cheaper than thin products.

    Full precision only (W + B A would lose a small B A), and W is frozen. If A trains, x is kept, otherwise x Aᵀ.
    """
    if is_plain() or not fusable(x, W, b, A, B):
        return F.linear(x, W + B @ A, b)
    return _Merged.apply(x, None if A.requires_grad else F.linear(x, A), W, b, A, B)  # type: ignore[return-value]


def _wide(x: Tensor, W: Tensor, factors: tuple[Factors, ...], training: bool) -> tuple[Tensor, Tensor] | None:
    """A and B of a single adapter with frozen A whose rank is a good part of the width, where merging saves products:
    r·in·out for W + B A against r (in + out) for each row twice."""
    A, B, s, p = factors[0]
    if len(factors) > 1 or W.requires_grad or not fusable(x, W, A, B):
        return None
    (out, n), rows = W.shape, x.numel() // x.shape[-1]
    if 8 * A.shape[0] < min(out, n) or W.numel() >= rows * (out + n) or (training and p > 0.0):
        return None
    full = W.dtype == x.dtype == A.dtype == B.dtype and W.dtype in (torch.float32, torch.float64)
    if not full or autocast_dtype(x) is not None or (isinstance(s, Tensor) and s.dim() > 1):
        return None
    B = B if _is_one(s) else B * s
    return (A, B) if B.requires_grad else None


def delta(x: Tensor, factors: Factors, training: bool = False) -> Tensor:
    """The plain low-rank product of one adapter, in its own dtype."""
    h = drop(x.to(factors.A.dtype), factors.dropout if training else 0.0)
    z, s = F.linear(h, factors.A), factors.scale
    if isinstance(s, Tensor) and s.dim() > 0:
        return F.linear(z * s, factors.B)
    return F.linear(z, factors.B) if _is_one(s) else F.linear(z, factors.B) * s


def plain_accumulate(y: Tensor, x: Tensor, factors: tuple[Factors, ...], training: bool = False) -> Tensor:
    """Reference: adapters added one after another in their own dtype; the result gets y's dtype."""
    out = y
    for f in factors:
        out = out + delta(x, f, training)
    return out.to(y.dtype)


def _is_one(scale: float | Tensor) -> bool:
    return not isinstance(scale, Tensor) and scale == 1.0


def _seeds(x: Tensor, factors: tuple[Factors, ...], training: bool) -> Seeds:
    """One seed for each adapter whose dropout acts now; None elsewhere, and where the built-in op must be used."""
    if not training:
        return (None,) * len(factors)
    usable = any(f.dropout > 0.0 for f in factors) and seedable(x)
    return tuple(draw_seed() if usable and f.dropout > 0.0 else None for f in factors)


def _infer(y: Tensor, x: Tensor, factors: tuple[Factors, ...], training: bool, *, own: bool) -> Tensor:
    """Without a graph: thin products, and addmm (into y itself if we own it) where the traffic matters."""
    dtype = y.dtype
    h = x if x.dtype == dtype else x.to(dtype)
    flat = not torch.compiler.is_compiling() and x.numel() > _SMALL and fusable(x, y) and y.is_contiguous()
    out = y.view(-1, y.shape[-1]) if flat else y
    for A, B, s, p in factors:
        hd = drop(h, p) if training else h
        if A.dtype != dtype or B.dtype != dtype:
            A, B = A.to(dtype), B.to(dtype)
        z = F.linear(hd, A)
        if isinstance(s, Tensor):
            z, s = z * s.to(dtype), 1.0
        if not flat:
            out = torch.add(out, F.linear(z, B), alpha=s)
        else:
            z = z.reshape(out.shape[0], z.shape[-1])  # the rank may be 0
            out = out.addmm_(z, B.t(), alpha=s) if own else torch.addmm(out, z, B.t(), alpha=s)
            own = True
    return out.view(y.shape) if flat else out


def _composite(
    x: Tensor, W: Tensor | None, b: Tensor | None, y: Tensor | None, factors: tuple[Factors, ...], seeds: Seeds,
    dtype: torch.dtype | None, training: bool = True,
) -> Tensor:  # fmt: skip
    """The fused path's arithmetic by ordinary ops: for tracers, transforms, subclasses, and double backward.

    `dtype` is given when a forward's choice must be repeated outside its autocast region.
    """
    if W is not None:
        if dtype is not None:
            x, b = x.to(dtype), None if b is None else b.to(dtype)
        y = F.linear(x, W, b)
    assert y is not None
    compute = dtype or autocast_dtype(x) or x.dtype
    h, out = x.to(compute), y
    flat = compute == y.dtype and fusable(x, y)
    for f, seed in zip(factors, seeds, strict=True):
        hd = dropout(h, f.dropout, seed) if training else h
        z, s = F.linear(hd, f.A.to(compute)), f.scale
        if isinstance(s, Tensor):
            z, s = z * s.to(compute), 1.0
        if flat:  # in one pass; other tensors may not like being flattened
            rows = out.reshape(-1, out.shape[-1])
            z = z.reshape(rows.shape[0], z.shape[-1])  # the rank may be 0
            out = torch.addmm(rows, z, f.B.to(compute).t(), alpha=s).view(out.shape)
        else:
            out = out + F.linear(z if s == 1.0 else z * s, f.B.to(compute))
    return out.to(y.dtype)


class _Plan(NamedTuple):
    """What the autograd function needs besides tensors."""

    scales: tuple[float, ...]  # 1 where the scale is a tensor
    drops: tuple[float, ...]
    seeds: Seeds
    dtype: torch.dtype
    cast: bool  # autocast is on: cast the base weight too


def _survey(
    factors: tuple[Factors, ...], training: bool, x: Tensor, W: Tensor | None, dtype: torch.dtype, cast: bool
) -> tuple[Any, ...] | None:
    """One walk over the factors: the autograd function's plan and its tensors A, B, S, A, B, S ...

    None where ordinary ops serve: exotic tensors, no seeded dropout, or neither W nor any A trains. In the last case
    ordinary ops keep just as little (x is not kept) and stay twice differentiable.
    """
    tensors: list[Tensor | None] = []
    trains, drops = W is not None and W.requires_grad, False
    for A, B, s, p in factors:
        if type(A) not in DENSE or type(B) not in DENSE:
            return None
        trains = trains or A.requires_grad
        drops = drops or p > 0.0
        tensors += (A, B, s if isinstance(s, Tensor) else None)
    if not trains or not x.is_floating_point():
        return None
    acts = drops and training
    if acts and not seedable(x):
        return None
    scales = tuple([1.0 if isinstance(f.scale, Tensor) else float(f.scale) for f in factors])
    probabilities = tuple([f.dropout if training else 0.0 for f in factors])
    seeds = _seeds(x, factors, training) if acts else (None,) * len(factors)
    return _Plan(scales, probabilities, seeds, dtype, cast), *tensors


class _LowRank(Fused):
    """(x [..., in], W, b, y, plan, A, B, S, A, B, S ...) -> [..., out].

    The base output is x Wᵀ + b, or y [..., out] without W, or x itself without both.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor | None, b: Tensor | None, y: Tensor | None, plan: _Plan, *tensors: Any):
        dtype, needs, kept, whole = plan.dtype, ctx.needs_input_grad, [], None
        h = x if x.dtype is dtype else x.to(dtype)
        if W is not None:
            Wc, bc = (W.to(dtype), None if b is None else b.to(dtype)) if plan.cast else (W, b)
            whole = F.linear(h, Wc, bc)
        h = h if h.dim() == 2 else h.reshape(-1, h.shape[-1])
        base = h if y is None else y.reshape(-1, y.shape[-1])
        out = base if whole is None else whole.view(-1, whole.shape[-1])
        for i, scale in enumerate(plan.scales):
            A, B, S = tensors[3 * i : 3 * i + 3]
            Ac, Bc = A.to(dtype), B.to(dtype)
            p, need_x = plan.drops[i], needs[0]
            z = F.linear(h if p == 0.0 else dropped(h, p, plan.seeds[i]), Ac)
            zs = z if S is None else gated(z, S, x.shape)
            alpha = scale if p == 0.0 else scale * rescale(p)
            out = torch.addmm(out, zs, Bc.t(), alpha=alpha) if out is base else out.addmm_(zs, Bc.t(), alpha=alpha)
            need_A, need_B, need_S = needs[5 + 3 * i : 8 + 3 * i]
            upstream = need_x or need_A or need_S
            kept += (A, B, S, Ac if need_x else None, Bc if upstream else None, z if need_B or need_S else None)
        ctx.save_for_backward(x, W if needs[0] or needs[1] else None, b, *kept)
        ctx.plan, ctx.residual = plan, W is None and y is None
        return whole if whole is not None and not whole._is_view() else reshaped(out, (*x.shape[:-1], out.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        saved = ctx.saved_tensors  # read once: checkpointing does not allow a second time
        step = _differentiable_backward if torch.is_grad_enabled() else _backward
        with settled(grads[0]):
            return step(ctx, grads[0], saved)


class _Merged(Fused):
    """(x [..., in], z = x Aᵀ or None, W, b, A, B) -> [..., out]; the backward is made of differentiable ops.

    The sum W + B A is kept while that is no more than a trained layer keeps, its x; otherwise it is made again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor | None, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor):
        total = torch.addmm(W, B, A)
        keep = z is not None and ctx.needs_input_grad[0] and W.numel() <= x.numel()
        ctx.save_for_backward(x if z is None else None, z, W, A, B, total if keep else None)
        return F.linear(x, total, b)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        x, z, W, A, B, total = ctx.saved_tensors
        needs = ctx.needs_input_grad
        g = grads[0].reshape(-1, W.shape[0])
        dx = db = dA = None
        if needs[0]:
            again = total is None or torch.is_grad_enabled()
            total = torch.addmm(W, B, A) if again else total
            dx = torch.mm(g, total).view(*grads[0].shape[:-1], W.shape[1])  # type: ignore[arg-type]
        if needs[3]:
            db = g.sum(0)
        if x is not None:
            h = x.reshape(-1, x.shape[-1])
            dA, z = torch.mm(torch.mm(g, B).t(), h), torch.mm(h, A.t())
        dB = torch.mm(g.t(), z.reshape(-1, A.shape[0])) if needs[5] else None
        return dx, None, None, db, dA, dB


def dropped(h: Tensor, p: float, seed: int | None) -> Tensor:
    """h times its 0/1 mask; the factor 1/(1-p) is left to a GEMM's alpha."""
    return h if seed is None else keep_mask(seed, p, h).mul_(h)


def gated(z: Tensor, S: Tensor, shape: torch.Size) -> Tensor:
    """z [N, r] times a tensor scale, which broadcasts against [..., r]; `shape` is x's."""
    if S.dim() < 2:
        return z * S.to(z.dtype)
    return (z.view(*shape[:-1], z.shape[-1]) * S.to(z.dtype)).view(z.shape)


def gate_grad(pz: Tensor, S: Tensor, shape: torch.Size) -> Tensor:
    return pz.view(*shape[:-1], pz.shape[-1]).sum_to_size(S.shape).to(S.dtype)


def _backward(ctx: Any, g: Tensor, saved: Any) -> tuple[Any, ...]:
    plan, needs = ctx.plan, ctx.needs_input_grad
    x, W, b, *kept = saved
    dtype, dy = plan.dtype, g if needs[3] else None
    g = g.reshape(-1, g.shape[-1])
    h = x if x.dtype is dtype else x.to(dtype)
    h = h.reshape(-1, h.shape[-1])
    dx: Any = None
    dW: Any = None
    db: Any = None
    if W is not None and needs[0]:
        dx = torch.mm(g, W if W.dtype is dtype else W.to(dtype))
    if needs[1]:
        dW = torch.mm(g.t(), h).to(g.dtype if W is None else W.dtype)
    if needs[2]:
        db = g.sum(0).to(b.dtype)
    out: list[Tensor | None] = []
    for i, scale in enumerate(plan.scales):
        A, B, S, Ac, Bc, z = kept[6 * i : 6 * i + 6]
        need_A, need_B, need_S = needs[5 + 3 * i : 8 + 3 * i]
        drop = plan.drops[i]
        alpha = scale if drop == 0.0 else scale * rescale(drop)
        dA: Any = None
        dB: Any = None
        dS: Any = None
        p: Any = None
        mask: Any = None
        if need_B:  # beta = 0: the first argument is never read, it only has the shape
            zs = z if S is None else gated(z, S, x.shape)
            dB = torch.addmm(B.to(dtype) if Bc is None else Bc, g.t(), zs, beta=0, alpha=alpha)
            dB = dB if dB.dtype is B.dtype else dB.to(B.dtype)
        if Bc is not None:
            p = torch.addmm(Bc[:1], g, Bc, beta=0, alpha=alpha)
            if need_S:
                dS = gate_grad(p * z, S, x.shape)  # type: ignore[arg-type]
            if S is not None:
                p = gated(p, S, x.shape)
            mask = None if plan.seeds[i] is None else keep_mask(plan.seeds[i], drop, h)  # type: ignore[arg-type]
        if need_A:
            dA = torch.mm(p.t(), h if mask is None else h * mask)
            dA = dA if dA.dtype is A.dtype else dA.to(A.dtype)
        if needs[0]:
            start = g if ctx.residual and dx is None else dx
            dx = add_input_grad(start, p, Ac, mask, own=start is not g)
        out += (dA, dB, dS)
    if dx is not None:
        dx = dx.view(x.shape)
        dx = dx if dx.dtype is x.dtype else dx.to(x.dtype)
    return dx, dW, db, dy, None, *out


def add_input_grad(dx: Tensor | None, p: Tensor, A: Tensor, mask: Tensor | None, *, own: bool = True) -> Tensor:
    """dx + mask * (p A), in place if dx is ours; p already holds the scale and 1/(1-drop)."""
    if mask is not None:
        part = torch.mm(p, A)
        if dx is None or not own:
            part = part.mul_(mask)
            return part if dx is None else part.add_(dx)
        return dx.addcmul_(part, mask)
    if dx is None:
        return torch.mm(p, A)
    return dx.addmm_(p, A) if own else torch.addmm(dx, p, A)


def _differentiable_backward(ctx: Any, g: Tensor, saved: tuple[Any, ...]) -> tuple[Any, ...]:
    """For create_graph=True: rebuild the output by ordinary ops from the inputs and differentiate that."""
    plan, needs = ctx.plan, ctx.needs_input_grad
    x, W, b, *kept = saved
    tensors = [t for i in range(len(plan.scales)) for t in kept[6 * i : 6 * i + 3]]

    def output(x: Tensor, W: Tensor | None, b: Tensor | None, *tensors: Any) -> Tensor:
        groups = zip(tensors[::3], tensors[1::3], tensors[2::3], plan.scales, plan.drops, strict=True)
        factors = tuple(Factors(A, B, s if S is None else S, p) for A, B, S, s, p in groups)
        base = W if W is None or not plan.cast else W.to(plan.dtype)
        y = None
        if base is None:
            y = x.to(plan.dtype) if ctx.residual else g.new_zeros(()).expand(g.shape)
        return _composite(x, base, b, y, factors, plan.seeds, plan.dtype)

    dx, dW, db, *others = derived(output, (x, W, b, *tensors), (*needs[:3], *needs[5:]), g)
    return dx, dW, db, g if needs[3] else None, None, *others
