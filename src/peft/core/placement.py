# SPDX-License-Identifier: Apache-2.0
"""Device and dtype of the tensors of an adapter: they follow the base layer, half precision may become float32."""

from typing import Any

import torch
from torch import nn

from ..storage.base import DENSE
from ..utils.constants import UPCAST_DTYPES
from . import kinds
from .modules import tree
from .offload import compute_device

# Adapter dtypes that `cast_adapter` turns into float32.
UPCAST = {torch.float16, torch.bfloat16, *(getattr(torch, n) for n in UPCAST_DTYPES if hasattr(torch, n))}
Held = tuple[nn.Module, str, torch.Tensor]


class Placement:
    """The part of AdapterLayer that moves and casts what an adapter holds."""

    def _own_tensors(self: Any, name: str) -> list[Held]:
        """(owner, attribute, tensor) of everything that adapter `name` holds here, shared containers included."""
        found: list[Held] = []
        for slot_name in self.module_slots:
            container = self._modules.get(slot_name)
            if container is None:
                continue
            held = container._modules.get(name)
            if held is not None:
                for module in tree(held) if held._modules else (held,):
                    found += [(module, k, p) for k, p in module._parameters.items() if p is not None]
                    if module._buffers:
                        found += [(module, k, b) for k, b in module._buffers.items() if b is not None]
            elif name in container:
                found.append((container, name, container[name]))
        return found

    def move_adapter(self: Any, name: str) -> bool:
        """Move adapter `name` to the device and (floating) dtype of the base weight; meta tensors and integers keep
        what they are. Returns whether some are in half precision, or may be.
        """
        base = self.get_base_layer()
        weight = base.out_proj.weight if self.kind is kinds.MultiheadAttention else self._reference_tensor(base)
        if weight is None:
            return True
        dtype = getattr(base, "compute_dtype", None) or weight.dtype
        dtype = dtype if dtype.is_floating_point or dtype.is_complex else None
        home, half = compute_device(base, weight), dtype in UPCAST
        for owner, attr, tensor in self._own_tensors(name):
            there = tensor.is_meta or tensor.device == home
            if there and tensor.dtype == dtype:
                continue
            floating = tensor.is_floating_point() or tensor.is_complex()
            want = dtype if floating and dtype is not None else tensor.dtype
            half = half or want in UPCAST
            if not there or tensor.dtype != want:
                device = tensor.device if tensor.is_meta else home
                replace_tensor(owner, attr, tensor, tensor.data.to(device, want))
        return half

    def home(self: Any) -> torch.device | None:
        """Where the base layer computes; None if it has no tensors."""
        base = self.get_base_layer()
        weight = self._reference_tensor(base)
        return None if weight is None else compute_device(base, weight)

    def _reference_tensor(self: Any, base: nn.Module) -> torch.Tensor | None:
        packed = () if self.storage is DENSE else ("qweight", "W_q")
        for attr in (*packed, self.kind.weight_name, "weight"):
            found = base._parameters.get(attr)
            found = getattr(base, attr, None) if found is None else found
            if isinstance(found, torch.Tensor):
                return found
        return next(base.parameters(), None)

    def cast_adapter(self: Any, name: str) -> None:
        """Float32 copies of adapter tensors in half or quarter precision."""
        for owner, attr, tensor in self._own_tensors(name):
            if tensor.dtype in UPCAST and (attr == name or attr in owner._parameters):
                replace_tensor(owner, attr, tensor, tensor.data.to(torch.float32))
        self.__dict__["_seen"] = None  # the plan may depend on dtypes


def replace_tensor(owner: nn.Module, attr: str, old: torch.Tensor, new: torch.Tensor) -> None:
    """Put `new` in the place of `old`: a Parameter stays one, with its requires_grad."""
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    held: dict[str, Any] = owner._parameters if attr in owner._parameters else owner._buffers  # type: ignore[assignment]
    held[attr] = new
