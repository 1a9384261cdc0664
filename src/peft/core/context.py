# SPDX-License-Identifier: Apache-2.0
"""What all layers of one model share: which adapters are on (`Switch`), and the data of the current call.

Layers read the switch, so turning adapters on and off is one assignment for the whole model. A layer can be switched on
its own too (`layer.set_adapter`); such an override holds until the next switch of the model.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Call:
    """Per-call data for layers. While gradients are on it stays until the next call: backward may recompute layers."""

    adapter_names: tuple[str, ...] | None = None
    task_ids: torch.Tensor | None = None
    alora_offsets: Any = None
    gates: Any = None  # X-LoRA: an object whose `forward(layer, names, x, ...)` weighs the deltas for each token
    shadow: Any = None  # ShadowPEFT: states before the blocks
    rows: dict[str, torch.Tensor] | None = None  # adapter name -> row indices, built once per call
    part: torch.Tensor | None = None  # in a mixed batch: the rows that the layer is computing now
    generating: bool = False  # inside `generate`, which repeats rows for beams

    def clear(self) -> None:
        self.adapter_names = self.task_ids = self.alora_offsets = self.gates = self.rows = self.part = None
        self.generating, self.shadow = False, None

    @contextlib.contextmanager
    def only(self, name: str, count: int) -> Iterator[None]:
        """Inside, the batch is `count` rows of one adapter: for layers in a layer that takes a part of the batch."""
        before = self.adapter_names, self.rows
        self.adapter_names, self.rows = (name,) * count, None
        try:
            yield
        finally:
            self.adapter_names, self.rows = before

    def row_index(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Rows of the batch for each adapter name, as index tensors on `device`."""
        if self.rows is None or next(iter(self.rows.values())).device != device:
            groups: dict[str, list[int]] = {}
            for i, name in enumerate(self.adapter_names or ()):
                groups.setdefault(name, []).append(i)
            self.rows = {name: torch.tensor(index, device=device) for name, index in groups.items()}
        return self.rows


class Switch:
    """Shared by the layers of one model: the setting `key` and the data of the running `call`.

    `key` is (names of the active adapters, disabled). It is compared by value, which torch.compile can guard on.
    """

    __slots__ = ("key", "call", "__weakref__")

    def __init__(self, active: tuple[str, ...] | list[str] = (), disabled: bool = False):
        self.key: tuple[tuple[str, ...], bool] = (tuple(active), disabled)
        self.call = Call()

    @property
    def active(self) -> tuple[str, ...]:
        return self.key[0]

    @property
    def disabled(self) -> bool:
        return self.key[1]

    @property
    def at_work(self) -> tuple[str, ...]:
        """Adapters of the running call: those of a mixed batch, else the active ones; none while they are off."""
        return () if self.disabled else tuple(dict.fromkeys(self.call.adapter_names or self.active))

    def set_active(self, names: list[str] | tuple[str, ...]) -> None:
        self.key = (tuple(names), self.key[1])

    def set_disabled(self, disabled: bool) -> None:
        self.key = (self.key[0], disabled)

    def __getstate__(self):
        return self.key

    def __setstate__(self, key) -> None:
        self.key, self.call = key, Call()

    def __deepcopy__(self, memo):
        memo[id(self)] = copied = Switch(*self.key)
        return copied
