# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs: the plain switch, the predicate for fused paths, parts of autograd functions.

Every op has a plain path (the textbook formula by ordinary autograd) and may have a fused one. The fused path is chosen
by predicate (`fusable`), never by a user flag; `plain()` and `use_plain()` force the plain path, for debugging and for
the tests that compare both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# `_requests` counts everything that asks for the plain path, in any thread. It is a module global on purpose:
# torch.compile guards on it without a graph break, and as long as it is 0 (always, outside tests) nothing else is read.
_requests = 0
_everywhere = False
_lock = threading.Lock()


class _Depth(threading.local):
    value = 0


_depth = _Depth()
DENSE = frozenset((Tensor, nn.Parameter))


def is_plain() -> bool:
    """Whether the plain path is forced, for this thread or for the process."""
    return _requests > 0 and (_everywhere or _depth.value > 0)


def _count(change: int) -> None:
    global _requests
    with _lock:
        _requests += change


@contextmanager
def plain(enabled: bool = True) -> Iterator[None]:
    """Force the plain path of every op inside the block, in this thread only.

    The path is chosen when an op is called: its backward follows that choice even if it runs outside the block.
    """
    step = 1 if enabled else 0
    _count(step)
    _depth.value += step
    try:
        yield
    finally:
        _depth.value -= step
        _count(-step)


def use_plain(enabled: bool = True) -> None:
    """Force (or stop forcing) the plain path of every op in the whole process."""
    global _everywhere
    if enabled != _everywhere:
        _everywhere = enabled
        _count(1 if enabled else -1)


def fusable(*tensors: Tensor | None) -> bool:
    """Whether an eager autograd function may handle `tensors`.

    Tracers, function transforms, forward-mode AD and tensor subclasses (sharded, fake, quantised) get ordinary ops
    instead, which they know how to differentiate, batch, or shard.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if forward_ad._current_level >= 0 or torch._C._get_tracing_state() is not None:
        return False
    for t in tensors:  # noqa: SIM110 - a generator costs more than the whole rest of this function
        if t is not None and type(t) not in DENSE:
            return False
    return True


def wide(t: Tensor) -> Tensor:
    """`t` in float32 if it is in half precision."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype matrix products of `x` get from an active autocast region, None without one (float64 is exempt)."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def settled(g: Tensor) -> AbstractContextManager:
    """Autocast is off inside: for a backward that gets g, as forward settled the dtypes, and for small matrices."""
    return nullcontext() if autocast_dtype(g) is None else torch.autocast(g.device.type, enabled=False)


def reshaped(t: Tensor, shape: Sequence[int]) -> Tensor:
    """A fresh contiguous `t` in another shape, for the output of an autograd function.

    It is no view for autograd, so whoever gets it may modify it in place as cheaply as a linear layer's output.
    """
    if t.shape == torch.Size(shape) and not t._is_view():
        return t
    return torch.ops.aten._unsafe_view.default(t, shape)


def derived(
    plain_form: Callable[..., Any], inputs: Sequence, needs: Sequence[bool], g: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of `plain_form(*inputs)` for the output gradients g, by ordinary ops.

    What the backward of an autograd function returns under create_graph=True, when they are differentiable themselves.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        out = plain_form(*inputs)
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        got = iter(torch.autograd.grad(out, wanted, g, create_graph=again, allow_unused=True))
    return tuple(next(got) if need else None for need in needs)


class Fused(torch.autograd.Function):
    """An autograd function that is applied only where `fusable` holds, hence without torch's walk over the arguments
    for wrappers of functorch: 4 us a call, a tenth of what a LoRA layer costs where kernels are short.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def recomputed(form: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`form(*inputs)`, of which only the inputs are kept: for weights made of parameters by a few cheap ops.

    Not under autocast, whose dtypes a second run outside of it would not have.
    """
    if is_plain() or not fusable(*inputs) or autocast_dtype(inputs[0]) is not None:
        return form(*inputs)
    return _Recomputed.apply(form, *inputs)  # type: ignore[return-value]


class _Recomputed(Fused):
    """(form, inputs) -> form(*inputs)."""

    @staticmethod
    def forward(ctx: Any, form: Callable[..., Tensor], *inputs: Tensor):
        ctx.form = form
        ctx.save_for_backward(*inputs)
        return form(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        return None, *derived(ctx.form, ctx.saved_tensors, ctx.needs_input_grad[1:], grads[0])
