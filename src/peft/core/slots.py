# SPDX-License-Identifier: Apache-2.0
"""Slots: how a method declares the per-adapter state of its layers.

    class VeraLayer(AdapterLayer):
        vera_lambda_b: Trainable[nn.ParameterDict]   # [out]
        vera_A: Shared[BufferDict]                   # [r, max_in], owned by the tuner
        r: Aux[dict]

Every slot is a container keyed by adapter name. `Trainable` get gradients and are saved; `Aux` is metadata, dropout,
buffers (persistent buffers are saved); `Shared` is one container owned by the tuner and registered on each layer.
Containers, merging, saving, moving, deletion and the published name lists all derive from these declarations.
"""

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin

import torch
from torch import nn

T = TypeVar("T")

Trainable = Annotated[T, "trainable"]
Aux = Annotated[T, "aux"]
Shared = Annotated[T, "shared"]
# One trained container for all layers, owned by the tuner.
SharedTrainable = Annotated[T, "shared", "trains"]
# A ModuleDict whose modules hold one `weight` that files store under the bare slot name (DoRA's magnitude).
BareTrainable = Annotated[T, "trainable", "bare"]
# Trained, but empty on most layers: the container is made when it is first asked for.
RareTrainable = Annotated[T, "trainable", "rare"]
# Aux buffers that are stored in files.
Saved = Annotated[T, "aux", "saved"]


class BufferDict(nn.Module):
    """A dict of buffers keyed by adapter name. `persistent` decides whether they are in the state dict."""

    def __init__(self, buffers: Mapping[str, torch.Tensor] | None = None, persistent: bool = False):
        super().__init__()
        self.persistent = persistent
        if buffers is not None:
            self.update(buffers)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._buffers[key]  # type: ignore[return-value]

    def __setitem__(self, key: str, buffer: torch.Tensor) -> None:
        self.register_buffer(key, buffer, persistent=self.persistent)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]
        self._non_persistent_buffers_set.discard(key)

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __contains__(self, key: object) -> bool:
        return key in self._buffers

    def clear(self) -> None:
        self._buffers.clear()
        self._non_persistent_buffers_set.clear()

    def pop(self, key: str) -> torch.Tensor:
        value = self[key]
        del self[key]
        return value

    def keys(self):
        return self._buffers.keys()

    def items(self):
        return self._buffers.items()

    def values(self):
        return self._buffers.values()

    def update(self, buffers: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> None:
        if not isinstance(buffers, Iterable):
            raise TypeError(f"BufferDict.update needs names and tensors in a mapping, got {type(buffers).__name__}.")
        for key, value in dict(buffers).items():
            self[key] = value

    def extra_repr(self) -> str:
        sizes = {k: f"{v.type()} of size {'x'.join(map(str, v.shape))}" for k, v in self.items()}  # type: ignore[union-attr]
        return "\n".join(f"  ({k}): Buffer containing: [{size}]" for k, size in sizes.items())


class PersistentBufferDict(BufferDict):
    """A BufferDict that is part of the state dict by default."""

    def __init__(self, buffers: Mapping[str, torch.Tensor] | None = None, persistent: bool = True):
        super().__init__(buffers, persistent)


@dataclass(frozen=True)
class Slot:
    name: str
    container: type
    role: str  # "trainable" | "aux" | "shared"
    bare: bool = False
    saved: bool = False
    is_module: bool = True
    trains: bool = False  # gets gradients
    rare: bool = False  # made when first asked for


def read_slots(cls: type) -> dict[str, Slot]:
    """The slots declared on `cls` and its bases, in order of declaration (bases first)."""
    slots: dict[str, Slot] = {}
    for base in reversed(cls.__mro__):
        for name, annotation in inspect.get_annotations(base).items():
            slot = _read(name, annotation, base)
            if slot is not None:
                slots[name] = slot
    return slots


def _read(name: str, annotation: Any, owner: type) -> Slot | None:
    if isinstance(annotation, str):  # `from __future__ import annotations` in the method's module
        if "[" not in annotation or not any(role in annotation for role in ("Trainable", "Aux", "Shared", "Saved")):
            return None
        annotation = eval(annotation, vars(sys.modules[owner.__module__]))
    if get_origin(annotation) is not Annotated:
        return None
    container, role, *rest = get_args(annotation)
    container = get_origin(container) or container
    saved = role == "trainable" or "saved" in rest
    trains = role == "trainable" or "trains" in rest
    return Slot(
        name,
        container,
        role,
        trains=trains,
        bare="bare" in rest,
        rare="rare" in rest or "bare" in rest,
        saved=saved,
        is_module=issubclass(container, nn.Module),
    )
