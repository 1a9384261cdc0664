# SPDX-License-Identifier: Apache-2.0
r"""Raw parameters, above all stacks of experts [E, d1, d2], with low-rank additions W + sum_i s_i L_i R_i not formed.

`LowRankWeight` stands in for the parameter while its module runs. Indexing an expert, transposing, and the products
that expert layers use (linear, matmul, bmm, grouped_mm) keep it factored, so the cost follows the routed tokens:
rank-wide products instead of E weight-sized sums. Any other use turns it into the dense sum, which is always right but
for dropout: that acts on the input of a product and has no meaning for a dense sum, so there it does not act.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import low_rank
from .dispatch import fusable, is_plain
from .dropout import draw_seed, dropout, seedable


class Added(NamedTuple):
    """One adapter in the parameter's own orientation: W[..., d1, d2] + scale · L[..., d1, r] R[..., r, d2]."""

    L: Tensor
    R: Tensor
    scale: float | Tensor = 1.0
    dropout: float = 0.0  # on the input of the product, in training; 0 otherwise


def added(
    A: Tensor, B: Tensor, scale: float | Tensor = 1.0, *, experts: int | None = None, transposed: bool = False,
    dropout: float = 0.0,
) -> Added:  # fmt: skip
    """Factors in the layout of adapter files: A [E·r, in] (expert slowest), B [out, E·r] (expert fastest).

    `experts` is None for a two-dimensional parameter [out, in]; `transposed` for one stored as [.., in, out].
    """
    if experts is not None:
        A = A.view(experts, -1, A.shape[-1])
        B = B.view(B.shape[0], -1, experts).permute(2, 0, 1)
    L, R = (A.transpose(-2, -1), B.transpose(-2, -1)) if transposed else (B, A)
    return Added(L, R, scale, dropout)


def delta(part: Added) -> Tensor:
    """scale · L R, dense."""
    return (part.L @ part.R) * part.scale


def combine(W: Tensor, parts: Sequence[Added]) -> Tensor:
    """What to put in the parameter's place: a `LowRankWeight`, or the dense sum for tracers, transforms and plain()."""
    tensors = [t for part in parts for t in (part.L, part.R)]
    if is_plain() or not fusable(W, *tensors):
        out = W
        for part in parts:
            out = out + delta(part)
        return out.to(W.dtype)
    return LowRankWeight(W, parts)


class LowRankWeight(Tensor):
    """W + sum of `Added` that acts as the dense tensor would; W and the factors may be trainable or not."""

    _W: Tensor
    _parts: tuple[Added, ...]
    _experts: list[list[Tensor]] | None

    @staticmethod
    def __new__(cls, W: Tensor, parts: Sequence[Added]) -> LowRankWeight:
        make: Any = torch.Tensor._make_wrapper_subclass
        return make(cls, W.shape, strides=W.stride(), dtype=W.dtype, device=W.device, requires_grad=False)

    def __init__(self, W: Tensor, parts: Sequence[Added]) -> None:
        self._W, self._experts = W, None
        if not is_plain():  # one cast for the whole stack rather than one for each expert
            parts = [Added(p.L.to(W.dtype), p.R.to(W.dtype), p.scale, p.dropout) for p in parts]
        self._parts = tuple(parts)

    def __repr__(self, **_: Any) -> str:
        return f"LowRankWeight({tuple(self.shape)}, ranks={[p.R.shape[-2] for p in self._parts]})"

    def dense(self) -> Tensor:
        """The sum itself, in W's dtype."""
        out = self._W
        for part in self._parts:
            out = out + delta(part)
        return out.to(self._W.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        handler = _GETTERS.get(func) if name == "__get__" else _HANDLERS.get(name)
        if handler is not None:
            out = handler(func, args, kwargs)
            if out is not NotImplemented:
                return out
        elif name == "__get__" or name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return func(*_map_dense(args), **_map_dense(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return LowRankWeight(
                args[0]._W.detach(), [Added(p.L.detach(), p.R.detach(), *p[2:]) for p in args[0]._parts]
            )
        raise RuntimeError(f"{func} cannot take a low-rank weight; use its dense() form")


def _map_dense(value: Any) -> Any:
    if isinstance(value, LowRankWeight):
        return value.dense()
    if isinstance(value, (tuple, list)):
        return type(value)(_map_dense(v) for v in value)
    if isinstance(value, dict):
        return {k: _map_dense(v) for k, v in value.items()}
    return value


def _each(w: LowRankWeight, change: Callable[[Tensor], Tensor]) -> LowRankWeight:
    return LowRankWeight(change(w._W), [Added(change(p.L), change(p.R), p.scale, p.dropout) for p in w._parts])


def _swap(w: LowRankWeight) -> LowRankWeight:
    def turn(t: Tensor) -> Tensor:
        return t.transpose(-2, -1)

    return LowRankWeight(turn(w._W), [Added(turn(p.R), turn(p.L), p.scale, p.dropout) for p in w._parts])


def _transpose(func: Any, args: tuple, kwargs: dict) -> Any:
    w, *dims = args
    dims = [d % w.dim() for d in (*dims, *kwargs.values())]
    if func.__name__ in ("t", "mT", "__get__"):
        return _swap(w) if w.dim() >= 2 else NotImplemented
    return _swap(w) if sorted(dims) == [w.dim() - 2, w.dim() - 1] else NotImplemented


def _index(func: Any, args: tuple, kwargs: dict) -> Any:
    w, key = args
    if not isinstance(w, LowRankWeight) or w.dim() != 3 or isinstance(key, (bool, tuple, list, slice)) or key is None:
        return NotImplemented
    if isinstance(key, Tensor):
        if key.dtype == torch.bool or key.dim() > 1:
            return NotImplemented
        if key.dim() == 1:
            return _each(w, lambda t: t[key])
    if w._experts is None:  # one unbind for all experts: its backward is one stack, not a sum of E full-sized gradients
        w._experts = [list(t.contiguous().unbind(0)) for p in w._parts for t in (p.L, p.R)]
    i = int(key)
    factors = [t[i] for t in w._experts]
    parts = [Added(factors[2 * k], factors[2 * k + 1], *p[2:]) for k, p in enumerate(w._parts)]
    return LowRankWeight(w._W[i], parts)


def _dropped(x: Tensor, p: float) -> Tensor:
    return dropout(x, p, draw_seed() if p > 0.0 and seedable(x) else None)


def _factors(w: LowRankWeight) -> tuple[low_rank.Factors, ...]:
    return tuple(low_rank.Factors(p.R, p.L, p.scale, p.dropout) for p in w._parts)


def _linear(func: Any, args: tuple, kwargs: dict) -> Any:
    x = args[0]
    w, *rest = args[1:] or (kwargs["weight"],)
    b = rest[0] if rest else kwargs.get("bias")
    if not isinstance(w, LowRankWeight) or isinstance(x, LowRankWeight) or w.dim() != 2:
        return NotImplemented
    return low_rank.linear(x, w._W, b, _factors(w), training=True)


def _matmul(func: Any, args: tuple, kwargs: dict) -> Any:
    """x @ w, w @ x, bmm(x, w), bmm(w, x) and, through grouped, nothing else."""
    if len(args) != 2 or kwargs:
        return NotImplemented
    x, w = args
    if func.__name__ == "__rmatmul__":
        x, w = w, x
    if isinstance(x, LowRankWeight):
        if isinstance(w, LowRankWeight) or x.dim() != 3 or w.dim() != 3:
            return NotImplemented
        return _sum(
            torch.matmul, x._W, w, [(p, lambda h, p=p: p.L.to(h.dtype) @ (p.R.to(h.dtype) @ h)) for p in x._parts]
        )
    if w.dim() == 2 and x.dim() > 1:
        return _linear(func, (x, _swap(w)), {})
    if w.dim() != 3 or x.dim() != 3:
        return NotImplemented
    return _sum(
        torch.matmul,
        w._W,
        x,
        [(p, lambda h, p=p: (h @ p.L.to(h.dtype)) @ p.R.to(h.dtype)) for p in w._parts],
        right=True,
    )


def _sum(product: Any, W: Tensor, x: Tensor, terms: list, *, right: bool = False) -> Tensor:
    out = product(x, W) if right else product(W, x)
    dtype = out.dtype
    for part, apply in terms:
        h = _dropped(x.to(part.L.dtype), part.dropout)
        out = out + apply(h) * part.scale
    return out.to(dtype)


def _grouped(func: Any, args: tuple, kwargs: dict) -> Any:
    """func(x [S, d1], w [E, d1, d2], offs=[E]): rows of x are sorted by expert, offs are the ends of the groups."""
    x, w, *rest = args
    offs = rest[0] if rest else kwargs.get("offs")
    if not isinstance(w, LowRankWeight) or isinstance(x, LowRankWeight) or x.dim() != 2 or w.dim() != 3 or offs is None:
        return NotImplemented
    out = func(x, w._W, *rest, **kwargs)
    ends = offs.tolist() if x.device.type == "cpu" else None
    for part in w._parts:
        h = _dropped(x.to(part.L.dtype), part.dropout)
        z = grouped_mm(h, part.L, offs, ends) * part.scale
        out = out + grouped_mm(z, part.R, offs, ends).to(out.dtype)
    return out


def grouped_mm(x: Tensor, M: Tensor, offs: Tensor, ends: list[int] | None = None) -> Tensor:
    """x [S, a] sorted by group, M [E, a, b], offs [E] ends of the groups -> [S, b]; rows behind the last group give 0.

    With `ends` (offs as numbers) one product per non-empty group; else one product per row block without a host sync.
    """
    if ends is not None:
        starts = [0, *ends[:-1]]
        out = [x[s:e] @ m for s, e, m in zip(starts, ends, M.unbind(0), strict=True) if e > s]
        last = ends[-1] if ends else 0
        return torch.cat([*out, x.new_zeros(x.shape[0] - last, M.shape[-1])])
    group = torch.searchsorted(offs, torch.arange(x.shape[0], device=x.device, dtype=offs.dtype), right=True)
    inside = group < M.shape[0]
    return _grouped_device(x, M, offs, inside)


def _grouped_device(x: Tensor, M: Tensor, offs: Tensor, inside: Tensor) -> Tensor:
    """By the device's grouped kernel, whose rows must be multiples of 16 bytes: thin factors are padded with zeros."""
    unit = 16 // x.element_size()
    a, b = M.shape[-2:]
    pad_a, pad_b = -a % unit, -b % unit
    if pad_a or pad_b:
        x, M = F.pad(x, (0, pad_a)), F.pad(M, (0, pad_b, 0, pad_a))
    kernel: Any = getattr(F, "grouped_mm", None) or torch._grouped_mm  # type: ignore[attr-defined]
    inside = inside.unsqueeze(-1)  # the kernel leaves other rows undefined, in its output and in the gradient of x
    out = kernel(torch.where(inside, x, 0), M.contiguous(), offs=offs)[..., :b]
    return torch.where(inside, out, 0)


def _same_dtype(func: Any, args: tuple, kwargs: dict) -> Any:
    w, *rest = args
    target = {*rest, *kwargs.values()}
    if target <= {w._W.dtype, w._W.device, False}:
        return w
    dtypes = [t for t in target if isinstance(t, torch.dtype)]
    if len(dtypes) == len(target) == 1 and func.__name__ == "to":
        return _each(w, lambda t: t.to(dtypes[0]))
    return NotImplemented


_METADATA = frozenset((
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "is_contiguous",
    "is_floating_point", "is_complex", "is_signed", "__len__", "__hash__", "get_device", "is_same_size", "has_names",
    "is_inference",
))  # fmt: skip
_HANDLERS: dict[str, Callable[[Any, tuple, dict], Any]] = {
    "__getitem__": _index,
    "select": lambda f, a, k: _index(f, (a[0], a[2]), {}) if len(a) == 3 and a[1] == 0 and not k else NotImplemented,
    "linear": _linear, "matmul": _matmul, "mm": _matmul, "bmm": _matmul, "__matmul__": _matmul, "__rmatmul__": _matmul,
    "grouped_mm": _grouped, "_grouped_mm": _grouped, "grouped_mm_fallback": _grouped,
    "transpose": _transpose, "swapaxes": _transpose, "swapdims": _transpose, "t": _transpose,
    "to": _same_dtype, "contiguous": lambda f, a, k: a[0],
}  # fmt: skip
_GETTERS: dict[Any, Callable[[Any, tuple, dict], Any]] = {
    Tensor.mT.__get__: _transpose,  # type: ignore[attr-defined]
    Tensor.T.__get__: lambda f, a, k: _swap(a[0]) if a[0].dim() == 2 else NotImplemented,  # type: ignore[attr-defined]
    Tensor.data.__get__: lambda f, a, k: NotImplemented,  # type: ignore[attr-defined]
}
