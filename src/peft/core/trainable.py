# SPDX-License-Identifier: Apache-2.0
"""Which parameters get gradients: freezing of the base, bias modes; switching and dtype casting over a whole model."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..storage.dtensor import agree
from .aux_modules import AuxiliaryTrainingWrapper, as_names
from .context import Switch
from .layer import AdapterLayer
from .wrappers import _set_adapter

if TYPE_CHECKING:
    from .tuner import TunerModel

Part = AdapterLayer | AuxiliaryTrainingWrapper


# ---- injection
def check_bias(cfg: Any) -> None:
    """Refuse an unknown `bias` option before the model is touched."""
    mode = getattr(cfg, "bias", "none")
    if mode not in ("none", "all") and not str(mode).endswith("_only"):
        raise NotImplementedError(
            f"Requested bias: {mode!r}, is not implemented. Use 'none', 'all' or '<method>_only'."
        )


def mark_trainable(model: nn.Module, tuner: "TunerModel", name: str, cfg: Any, first: bool) -> None:
    """Freeze the base model and train the biases that `cfg.bias` selects.

    Only the `first` adapter does so: adding an adapter never changes the trainability of what was there.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for layer in tuner.layers():
            agree(getattr(layer.get_base_layer(), "weight", None), layer.parameters_of(name))
    if not first:
        return
    for parameter in base_parameters(model):
        parameter.requires_grad_(False)
    mode = "none" if cfg.inference_mode else getattr(cfg, "bias", "none")
    train_biases(model, mode, [m for m in tuner.layers() if isinstance(m, tuner.layer_cls)])


def base_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of the base model: those of adapter layers themselves and of auxiliary wrappers are left out."""
    stack = [model]
    while stack:
        module = stack.pop()
        if isinstance(module, AuxiliaryTrainingWrapper):
            continue
        if isinstance(module, AdapterLayer):
            stack.append(module.base_layer)
            continue
        yield from (p for p in module._parameters.values() if p is not None)
        stack.extend(m for m in module._modules.values() if m is not None)


def train_biases(model: nn.Module, mode: str, layers: Iterable[AdapterLayer]) -> None:
    """`mode`: "none", "all" (every parameter called bias), or "<method>_only" (biases of the adapted layers)."""
    if mode == "none":
        return
    if mode == "all":
        saved = {id(p) for m in _parts(model, AuxiliaryTrainingWrapper) for p in m.parameters()}  # set their own
        found = (p for n, p in model.named_parameters() if n.rpartition(".")[2] == "bias" and id(p) not in saved)
    else:
        found = (getattr(layer.get_base_layer(), "bias", None) for layer in layers)
    for bias in found:
        if isinstance(bias, nn.Parameter):
            bias.requires_grad_(True)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Float32 for the half and quarter precision weights of one adapter; saved modules and shared state stay."""
    for layer in model.modules() if autocast_adapter_dtype else ():
        if isinstance(layer, AdapterLayer) and adapter_name in layer:
            layer.cast_adapter(adapter_name)


# ---- whole plain models (injected without PeftModel)
def _parts(model: nn.Module, layer_cls: type[nn.Module] = AdapterLayer) -> list[Part]:
    return [m for m in model.modules() if isinstance(m, (layer_cls, AuxiliaryTrainingWrapper))]  # type: ignore[misc]


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Turn gradients of named adapters on or off; unknown names are ignored."""
    for part in _parts(model):
        part.set_requires_grad(adapter_names, requires_grad)


def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    inference_mode: bool = False,
    layer_cls: type[nn.Module] = AdapterLayer,
) -> None:
    """Activate adapters on all layers of `layer_cls` and on the auxiliary wrappers of a model."""
    names = as_names(adapter_name)
    parts = _parts(model, layer_cls)
    _set_adapter(model, names, inference_mode)
    for part in parts:
        if isinstance(part, AdapterLayer):
            part.set_adapter(names, inference_mode)
    if layer_cls is AdapterLayer:
        _settle(parts)


def _settle(parts: list[Part]) -> None:
    """Turn an override that all parts of a switch agree on into the setting of the switch."""
    switches: dict[int, tuple[Switch, list[Part]]] = {}
    for part in parts:
        switches.setdefault(id(part.switch), (part.switch, []))[1].append(part)
    for switch, members in switches.values():
        keys = {m._key for m in members}
        if len(keys) == 1:
            switch.key = keys.pop()
            for member in members:
                member._local = None


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: type[nn.Module] = AdapterLayer
) -> list[str] | None:
    """Delete an adapter from all layers and auxiliary wrappers of a model; `model.peft_config` is left to the caller.

    Returns the adapters that are active afterwards (None if the model has no adapter layers). If the deleted one was
    the only active one, the first remaining one becomes active, on all layers. `prefix` is not needed: layers are known
    by their type.
    """
    parts = _parts(model, layer_cls)
    active = list(dict.fromkeys(n for part in parts for n in part._key[0]))
    for part in parts:
        part.drop(adapter_name)
    left = [n for n in active if n != adapter_name]
    if left != active:
        remaining = sorted({n for part in parts for n in part.adapter_names})
        if left or not remaining:  # those still active keep their gradients
            for part in parts:
                part._local = (tuple(n for n in part._key[0] if n != adapter_name), part._key[1])
        else:
            left = remaining[:1]
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {left[0]}.",
                stacklevel=2,
            )
            for part in parts:
                part.set_adapter(left)
        _settle(parts)
    return left if any(isinstance(part, AdapterLayer) for part in parts) else None
