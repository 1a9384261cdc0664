# SPDX-License-Identifier: Apache-2.0
r"""Stacks of experts [E, d1, d2] with low-rank additions W + sum_i s_i L_i R_i that are not formed.

`LowRankWeight` stands in for the parameter while its module runs. Indexing an expert, transposing, and the products
that expert layers use (linear, matmul, bmm, grouped_mm) keep it factored, so the cost follows the routed tokens:
rank-wide products instead of E weight-sized sums. Any other torch function gets the dense sum. Code below torch
functions (autograd functions, kernels that take addresses) would not see the additions: `allowed` leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import low_rank
from .dispatch import fusable, is_plain

# Implementations of transformers' expert modules ("eager": the forward of the class) that only use torch functions.
FACTORED = frozenset(("eager", "batched_mm", "grouped_mm"))


class Added(NamedTuple):
    """One adapter in the parameter's own orientation: W[..., d1, d2] + scale · L[..., d1, r] R[..., r, d2]."""

    L: Tensor
    R: Tensor
    scale: float | Tensor = 1.0


def added(A: Tensor, B: Tensor, scale: float | Tensor, experts: int, transposed: bool = False) -> Added:
    """Factors in the layout of adapter files: A [E·r, in] (expert slowest), B [out, E·r] (expert fastest);
    `transposed` for a stack stored as [E, in, out].
    """
    R, L = A.view(experts, -1, A.shape[-1]), B.view(B.shape[0], -1, experts).permute(2, 0, 1)
    return Added(R.transpose(-2, -1), L.transpose(-2, -1), scale) if transposed else Added(L, R, scale)


def allowed(module: nn.Module, W: Tensor, *factors: Tensor) -> bool:
    """Whether `module` can compute with a `LowRankWeight` in the place of its stack W: it runs code of transformers
    that is known to use torch functions only, and nobody has exchanged that.
    """
    forward, own = type(module).forward, module.__dict__
    return (
        W.dim() == 3
        and getattr(getattr(module, "config", None), "_experts_implementation", None) in FACTORED
        and getattr(forward, "__module__", "").startswith("transformers.")
        and ("forward" not in own or "_hf_hook" in own)  # accelerate's hooks call the forward of the class
        and not W.is_meta
        and not is_plain()
        and fusable(W, *factors)
    )


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
        # one cast for the whole stack rather than one for each expert
        self._parts = tuple([Added(p.L.to(W.dtype), p.R.to(W.dtype), p.scale) for p in parts])

    def __repr__(self, **_: Any) -> str:
        return f"LowRankWeight({tuple(self.shape)}, ranks={[p.R.shape[-2] for p in self._parts]})"

    def dense(self) -> Tensor:
        """The sum itself, in W's dtype."""
        out = self._W
        for part in self._parts:
            out = out + (part.L @ part.R) * part.scale
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
    return LowRankWeight(change(w._W), [Added(change(p.L), change(p.R), p.scale) for p in w._parts])


def _swap(w: LowRankWeight) -> LowRankWeight:
    def turn(t: Tensor) -> Tensor:
        return t.transpose(-2, -1)

    return LowRankWeight(turn(w._W), [Added(turn(p.R), turn(p.L), p.scale) for p in w._parts])


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
    parts = [Added(factors[2 * k], factors[2 * k + 1], p.scale) for k, p in enumerate(w._parts)]
    return LowRankWeight(w._W[i], parts)


def _linear(func: Any, args: tuple, kwargs: dict) -> Any:
    x = args[0]
    w, *rest = args[1:] or (kwargs["weight"],)
    b = rest[0] if rest else kwargs.get("bias")
    if not isinstance(w, LowRankWeight) or isinstance(x, LowRankWeight) or w.dim() != 2:
        return NotImplemented
    return low_rank.linear(x, w._W, b, tuple([low_rank.Factors(p.R, p.L, p.scale, 0.0) for p in w._parts]))


def _matmul(func: Any, args: tuple, kwargs: dict) -> Any:
    """x @ w or w @ x, of matrices and vectors in a batch."""
    if len(args) != 2 or kwargs:
        return NotImplemented
    x, w = reversed(args) if func.__name__ == "__rmatmul__" else args
    if isinstance(x, LowRankWeight) and isinstance(w, LowRankWeight):
        return NotImplemented
    right = isinstance(w, LowRankWeight)
    if right and w.dim() == 2 and x.dim() > 1:
        return _linear(func, (x, _swap(w)), {})
    if w.dim() != 3 or x.dim() != 3:
        return NotImplemented
    weight, x = (w, x) if right else (x, w)
    out = torch.bmm(x, weight._W) if right else torch.bmm(weight._W, x)
    for L, R, scale in weight._parts:
        h = x.to(L.dtype)
        out = out + ((h @ L @ R if right else L @ (R @ h)) * scale).to(out.dtype)
    return out


def _grouped(func: Any, args: tuple, kwargs: dict) -> Any:
    """func(x [S, d1], w [E, d1, d2], offs=[E]): rows of x are sorted by expert, offs are the ends of the groups."""
    x, w, *rest = args
    offs = rest[0] if rest else kwargs.get("offs")
    if not isinstance(w, LowRankWeight) or isinstance(x, LowRankWeight) or x.dim() != 2 or w.dim() != 3 or offs is None:
        return NotImplemented
    out = func(x, w._W, *rest, **kwargs)
    for L, R, scale in w._parts:
        z = _thin(func, x.to(L.dtype), L, offs) * scale
        out = out + _thin(func, z, R, offs).to(out.dtype)
    return out


def _thin(func: Any, x: Tensor, M: Tensor, offs: Tensor) -> Tensor:
    """The grouped product with factors. Kernels want aligned rows of multiples of 16 bytes: thin ones are padded with
    zeros.
    """
    unit, (a, b) = 16 // x.element_size(), M.shape[-2:]
    if a % unit or b % unit:
        x, M = F.pad(x, (0, -a % unit)), F.pad(M, (0, -b % unit, 0, -a % unit))
    if 1 not in M.stride()[-2:]:
        M = M.contiguous()
    elif M.data_ptr() % 16:  # mapped from a file, perhaps
        M = M.clone()
    return func(x, M, offs=offs)[..., :b]


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
    "data_ptr": lambda f, a, k: a[0]._W.data_ptr(),  # of interest for its alignment
}  # fmt: skip
_GETTERS: dict[Any, Callable[[Any, tuple, dict], Any]] = {
    Tensor.mT.__get__: _transpose,  # type: ignore[attr-defined]
    Tensor.T.__get__: lambda f, a, k: _swap(a[0]) if a[0].dim() == 2 else NotImplemented,  # type: ignore[attr-defined]
    Tensor.data.__get__: lambda f, a, k: NotImplemented,  # type: ignore[attr-defined]
}
