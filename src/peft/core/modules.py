# SPDX-License-Identifier: Apache-2.0
"""Modules in bulk: made without the cost of `nn.Module.__init__`, walked without that of `nn.Module.modules`.

A model gets ten new modules for each adapted layer, so these two costs are most of the time that injection takes.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._device import DeviceContext

M = TypeVar("M", bound=nn.Module)


@functools.cache
def _recipe(cls: type[nn.Module]) -> tuple[dict[str, Any], tuple[tuple[str, type], ...]]:
    """(plain attributes, (name, type) of the empty containers) of a new `cls()`."""
    state = vars(cls())
    containers = tuple((k, type(v)) for k, v in state.items() if isinstance(v, (dict, set, list)))
    if any(state[k] for k, _ in containers):
        raise TypeError(f"{cls.__name__}() is not empty: make it by calling it.")
    return {k: v for k, v in state.items() if not isinstance(v, (dict, set, list))}, containers


def blank_state(cls: type[nn.Module] = nn.Module) -> dict[str, Any]:
    """The `__dict__` of a new `cls()`."""
    constants, containers = _recipe(cls)
    state = constants.copy()
    for name, make in containers:
        state[name] = make()
    return state


def blank(cls: type[M]) -> M:
    """`cls()`, for classes whose new instances hold nothing."""
    made = cls.__new__(cls)
    object.__setattr__(made, "__dict__", blank_state(cls))
    return made


_awaiting = False


@contextlib.contextmanager
def awaiting_values() -> Iterator[None]:
    """What is made here gets its values from a file next: random draws that would be overwritten are left out."""
    global _awaiting
    before, _awaiting = _awaiting, True
    try:
        yield
    finally:
        _awaiting = before


def values_awaited() -> bool:
    return _awaiting


def making_on_meta() -> bool:
    """Whether new tensors go to meta, because of a `with torch.device("meta")` around the call."""
    mode = torch.overrides._get_current_function_mode()
    return isinstance(mode, DeviceContext) and mode.device.type == "meta"


class OnMeta(DeviceContext):
    """`with torch.device("meta")` where what has no device of its own is only shaped: for draws, stacks and the like on
    meta torch imports its compiler or sympy, 0.2 to 0.8 s in the first load of a process.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("meta"))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _IN_PLACE and (tensor := args[0] if args else kwargs["tensor"]).is_meta:
            return tensor
        if not kwargs and func in _SHAPES:
            size, dtype = _SHAPES[func](*args)
            if size is not None:
                return torch.empty(size, dtype=dtype, device=self.device)
        return super().__torch_function__(func, types, args, kwargs)


_IN_PLACE = (torch.Tensor.normal_, nn.init.normal_)


def _like(t: torch.Tensor) -> tuple[Any, torch.dtype]:
    return t.shape if t.is_meta else None, t.dtype


# Function -> (size or None for "not on meta", dtype) of what it makes of positional arguments.
_SHAPES: dict[Any, Callable[..., tuple[Any, torch.dtype | None]]] = {
    torch.randn: lambda *size: (size[0] if not isinstance(size[0], int) else size, None),
    torch.randint: lambda *bounds: (bounds[-1], torch.int64),
    torch.zeros_like: _like,
    torch.ones_like: _like,
    torch.stack: lambda tensors, dim=0: (
        (len(tensors), *tensors[0].shape) if dim == 0 and tensors[0].is_meta else None, tensors[0].dtype
    ),
}  # fmt: skip


def dropout(p: float) -> nn.Module:
    """The published container for a dropout probability: Identity when it is 0."""
    return nn.Dropout(p) if p > 0 else blank(nn.Identity)


def dropout_p(module: nn.Module) -> float:
    return getattr(module, "p", 0.0)


@functools.cache
def _bound(fan_in: int) -> float:
    return math.sqrt(3.0) * (nn.init.calculate_gain("leaky_relu", math.sqrt(5)) / math.sqrt(fan_in))


def kaiming_(tensor: torch.Tensor) -> torch.Tensor:
    """The draws of `nn.init.kaiming_uniform_(tensor, a=sqrt(5))`, nn.Linear's, without its bookkeeping."""
    bound = _bound(tensor[0].numel()) if tensor.numel() else 0.0
    return tensor.uniform_(-bound, bound)


def kaiming(*shape: int) -> torch.Tensor:
    """A new random tensor as nn.Linear makes its weight."""
    made = torch.empty(shape)
    return made if _awaiting else kaiming_(made)


def tree(module: nn.Module) -> list[nn.Module]:
    """Every module below and including `module`, each once, parents first."""
    found, seen = [module], {id(module)}
    for parent in found:  # grows while it is read
        for child in parent._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found


def parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter below `module`, each once."""
    found = {id(p): p for m in tree(module) for p in m._parameters.values() if p is not None}
    return iter(found.values())


def to_eval(module: nn.Module) -> None:
    """`module.eval()`."""
    if module._modules or type(module).train is not nn.Module.train:
        module.eval()
    else:
        module.__dict__["training"] = False
