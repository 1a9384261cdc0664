# SPDX-License-Identifier: Apache-2.0
"""What is in a model: the state of each adapter layer, and of the model as a whole."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .core.layer import AdapterLayer
from .core.tuner import TunerModel
from .core.wrappers import ModulesToSaveWrapper

Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """State of one adapter layer; "irregular": some parameters of the adapter are trainable and others not."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """State of a whole model. "irregular" stands where layers differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


def count_parameters(model: nn.Module, packed: bool = True) -> tuple[int, int]:
    """(trainable, all). Sharded ones count in full, 4-bit ones by elements or, `packed`, by storage size."""
    trainable = total = 0
    parameter: Any
    for parameter in model.parameters():
        count = parameter.numel()
        if count == 0 and hasattr(parameter, "ds_numel"):
            count = parameter.ds_numel
        if type(parameter).__name__ == "Params4bit":
            count *= 2
            if packed:
                storage = getattr(parameter, "quant_storage", None)
                count *= getattr(storage, "itemsize", None) or parameter.element_size()
        total += count
        if parameter.requires_grad:
            trainable += count
    return trainable, total


def trainable_line(counts: tuple[int, int]) -> str:
    trainable, total = counts
    share = 100 * trainable / max(total, 1)
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}"


def _one(values: Iterable[Any], empty: Any = None) -> Any:
    """The value that all share, or "irregular"."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return empty if not found else found[0] if len(found) == 1 else "irregular"


def _root(model: nn.Module, function: str) -> nn.Module:
    """The module whose layers are listed: the tuner of a PeftModel, any other module itself."""
    from .mixed_model import PeftMixedModel
    from .peft_model import PeftModel

    if isinstance(model, PeftMixedModel):
        raise TypeError(f"{function} is not supported for PeftMixedModel.")
    if not isinstance(model, PeftModel):
        return model
    tuner = model.base_model
    if not isinstance(tuner, TunerModel) or not hasattr(type(tuner), "layer_cls"):
        raise TypeError(
            f"{function}() got an invalid PeftModel instance; prefix tuning and adaption prompt are not supported."
        )
    return tuner


def _layer_status(name: str, layer: Any) -> TunerLayerStatus:
    adapters = sorted(layer.adapter_names)
    flags = {a: [p.requires_grad for p in layer.parameters_of(a)] for a in adapters}
    if isinstance(layer, AdapterLayer):
        tensors = {a: [t for _, _, t in layer._own_tensors(a)] for a in adapters}
    else:
        tensors = {a: list(layer.parameters_of(a)) for a in adapters}
    return TunerLayerStatus(
        name=name,
        module_type=layer._get_name(),
        enabled=not layer.disable_adapters,
        active_adapters=list(layer.active_adapters),
        merged_adapters=list(layer.merged_adapters),
        requires_grad={a: _one(f, empty=False) for a, f in flags.items()},
        available_adapters=adapters,
        devices={a: sorted({t.device.type for t in ts}) for a, ts in tensors.items()},
        quantization_backend=getattr(layer, "quantization_backend", None),
    )


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of each adapter layer and each module that is trained in full, in the order of the modules."""
    root = _root(model, "get_layer_status")
    kinds = (AdapterLayer, ModulesToSaveWrapper)
    found = [_layer_status(name, m) for name, m in root.named_modules() if isinstance(m, kinds)]
    if not found:
        raise ValueError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have PEFT adapters "
            "injected in the model."
        )
    return found


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of the model as a whole."""
    from .peft_model import PeftModel

    _root(model, "get_model_status")
    layers = get_layer_status(model)
    base_type, tuner_type, peft_types = "other", "None", {}
    transformers = sys.modules.get("transformers")
    if isinstance(model, PeftModel):
        base_type, tuner_type = type(model.get_base_model()).__name__, type(model.base_model).__name__
        peft_types = {n: str(getattr(c.peft_type, "value", c.peft_type)) for n, c in model.peft_config.items()}
    elif transformers is not None and isinstance(model, transformers.PreTrainedModel):
        base_type = type(model).__name__
    trainable, total = count_parameters(model)
    names = sorted({a for layer in layers for a in layer.available_adapters})
    return TunerModelStatus(
        base_model_type=base_type,
        adapter_model_type=tuner_type,
        peft_types=peft_types,
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_one(layer.enabled for layer in layers),
        active_adapters=_one(layer.active_adapters for layer in layers),
        merged_adapters=_merged(layers),
        requires_grad={a: _one(layer.requires_grad[a] for layer in layers if a in layer.requires_grad) for a in names},
        available_adapters=names,
        devices={a: sorted({d for layer in layers for d in layer.devices.get(a, ())}) for a in names},
        quantization_backend=_one(layer.quantization_backend for layer in layers),
    )


def _merged(layers: list[TunerLayerStatus]) -> list[str] | Irregular:
    """Merged adapters; "irregular" when one is merged in some of its layers only."""
    merged = sorted({a for layer in layers for a in layer.merged_adapters})
    can_merge = [layer for layer in layers if layer.module_type != "ModulesToSaveWrapper"]
    partly = any(
        a in layer.available_adapters and a not in layer.merged_adapters for layer in can_merge for a in merged
    )
    return "irregular" if partly else merged
