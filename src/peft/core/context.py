# SPDX-License-Identifier: Apache-2.0
"""What all layers of one model share: which adapters are on (`Switch`), and the data of the current call.

Layers read the switch, so turning adapters on and off is one assignment for the whole model. A layer can be switched on its own too
(`layer.set_adapter`); such an override holds until the next switch of the model.
"""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class State:
    """An immutable setting of the switch; a new object for every change, so that layers notice by identity."""

    active: tuple[str, ...]
    disabled: bool = False


@dataclass
class Call:
    """Per-call data for layers. Kept until the next call starts while gradients are on, since backward may recompute layers."""

    adapter_names: tuple[str, ...] | None = None
    task_ids: torch.Tensor | None = None
    alora_offsets: Any = None
    gates: Any = None  # X-LoRA: per-token gates on the deltas
    rows: dict[str, torch.Tensor] | None = None  # adapter name -> row indices, built once per call

    def clear(self) -> None:
        self.adapter_names = self.task_ids = self.alora_offsets = self.gates = self.rows = None

    @property
    def routed(self) -> bool:
        return self.adapter_names is not None

    def row_index(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Rows of the batch for each adapter name, as index tensors on `device`."""
        if self.rows is None or next(iter(self.rows.values())).device != device:
            groups: dict[str, list[int]] = {}
            for i, name in enumerate(self.adapter_names or ()):
                groups.setdefault(name, []).append(i)
            self.rows = {name: torch.tensor(index, device=device) for name, index in groups.items()}
        return self.rows


class Switch:
    """Shared by the layers of one model: `state` and the data of the running `call`."""

    __slots__ = ("state", "call")

    def __init__(self, active: tuple[str, ...] | list[str] = (), disabled: bool = False):
        self.state = State(tuple(active), disabled)
        self.call = Call()

    def set_active(self, names: list[str] | tuple[str, ...]) -> None:
        self.state = State(tuple(names), self.state.disabled)

    def set_disabled(self, disabled: bool) -> None:
        self.state = State(self.state.active, disabled)

    def __getstate__(self):
        return (self.state,)

    def __setstate__(self, saved) -> None:
        (self.state,) = saved
        self.call = Call()

    def __deepcopy__(self, memo):
        copied = Switch(self.state.active, self.state.disabled)
        memo[id(self)] = copied
        return copied
