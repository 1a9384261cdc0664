# SPDX-License-Identifier: Apache-2.0
"""`layer_replication`: rebuild the stack of layers of a model from ranges; copies share their base weights."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ...core.layer import AdapterLayer

Ranges = Sequence[tuple[int, int]]


def find_stack(model: nn.Module) -> tuple[nn.Module, str]:
    """(owner, attribute) of the ModuleList of layers: (model.)*layers, (bert.)encoder.layer, or (transformer.)h."""
    while inner := next((n for n in ("model", "bert", "transformer") if hasattr(model, n)), None):
        model = getattr(model, inner)
    for owner, name in ((model, "layers"), (getattr(model, "encoder", None), "layer"), (model, "h")):
        if isinstance(getattr(owner, name, None), nn.ModuleList):
            return owner, name  # type: ignore[return-value]
    raise ValueError(
        f"Could not locate the layers of {type(model).__name__} to replicate: `layer_replication` needs a "
        "ModuleList called 'layers', 'encoder.layer' or 'h'."
    )


def replicate_layers(model: nn.Module, layer_map: Ranges) -> Callable[[], None]:
    """Replace the stack by the layers of the ranges [start, end), once. Returns what takes it back."""
    owner, attribute = find_stack(model)
    layers: Any = getattr(owner, attribute)
    ranges = [tuple(r) for r in layer_map]
    done = getattr(layers, "_peft_layer_map", None)
    if done is not None:
        if done != ranges:
            raise ValueError(
                f"The layers are replicated with {done} already; layer_replication={ranges} can't be added."
            )
        return lambda: None
    if any(isinstance(m, AdapterLayer) for m in layers.modules()):
        raise ValueError(
            "`layer_replication` must be set for the first adapter of a model; there are adapters already."
        )
    count = len(layers)
    for start, end in ranges:
        if not 0 <= start < end <= count:
            raise ValueError(f"layer_replication range ({start}, {end}) is outside of the model's {count} layers.")
    indices = [(m, m.layer_idx) for m in layers.modules() if hasattr(m, "layer_idx")]
    order = [i for start, end in ranges for i in range(start, end)]
    new = nn.ModuleList()
    used: set[int] = set()
    for i in order:
        layer = _shared_copy(layers[i]) if i in used else layers[i]
        used.add(i)
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = len(new)  # type: ignore[assignment]
        new.append(layer)
    new._peft_layer_map = ranges  # type: ignore[assignment]
    config: Any = getattr(model, "config", None)
    depth, types = getattr(config, "num_hidden_layers", None), getattr(config, "layer_types", None)
    setattr(owner, attribute, new)
    if depth is not None:
        config.num_hidden_layers = len(new)
    if types:
        config.layer_types = [types[i] for i in order]

    def undo() -> None:
        setattr(owner, attribute, layers)
        if depth is not None:
            config.num_hidden_layers = depth
        if types:
            config.layer_types = types
        for module, index in indices:
            module.layer_idx = index

    return undo


def _shared_copy(layer: nn.Module) -> nn.Module:
    """A copy of the modules with the same parameters and buffers."""
    memo = {id(t): t for t in (*layer.parameters(), *layer.buffers())}
    return copy.deepcopy(layer, memo)
