# SPDX-License-Identifier: Apache-2.0
"""The base model's own state dict, with the names that it had before adapters were added."""

from collections import namedtuple
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..core.layer import AdapterLayer
from ..core.offload import onload_layer
from ..core.wrappers import AuxiliaryTrainingWrapper
from .keys import _join, clean, find_tuner

IncompatibleKeys = namedtuple("IncompatibleKeys", ("missing_keys", "unexpected_keys"))


def inside(module: nn.Module) -> str | None:
    """Where a module that came with an adapter holds the one of the base model; None for the base model's own."""
    if isinstance(module, AdapterLayer):
        return "base_layer"
    if isinstance(module, AuxiliaryTrainingWrapper):
        return "token_adapter" if "token_adapter" in module._modules else "original_module"
    return getattr(type(module), "base_attribute", None)


def _base_modules(module: nn.Module, name: str, path: str) -> Iterator[tuple[str, str, nn.Module]]:
    """(original name, name now, module) of the modules of the base model; aliases included, as in a state dict."""
    if inner := inside(module):
        yield from _base_modules(module.get_submodule(inner), name, _join(path, inner))
        return
    yield name, path, module
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _base_modules(child, _join(name, child_name), f"{path}.{child_name}" if path else child_name)


def _base_of(model: Any) -> nn.Module:
    """The user's model inside a PeftModel or tuner, or the model itself when adapters were injected into it."""
    model = getattr(model, "_orig_mod", model)
    tuner = find_tuner(model)
    if tuner is not None:
        return tuner.model
    return model.base_model if "prompt_encoder" in model._modules else model


def get_base_model_state_dict(model: Any) -> dict[str, torch.Tensor]:
    """State dict of the base model under its original names; tensors share memory with the model, except those that
    accelerate keeps elsewhere.
    """
    state: dict[str, torch.Tensor] = {}
    with onload_layer(base := _base_of(model)):
        for name, _, module in _base_modules(base, "", ""):
            module._save_to_state_dict(state, name + "." if name else "", keep_vars=False)
    return state


def set_base_model_state_dict(
    model: Any, state_dict: Mapping[str, torch.Tensor], strict: bool = True
) -> IncompatibleKeys:
    """Load a state dict of the original base model into the base weights of an adapted one.

    With `strict`, keys that are missing or too many raise RuntimeError before anything is loaded.
    """
    base = _base_of(model)
    renamed: dict[str, str] = {}
    shapes: dict[str, torch.Size | None] = {}
    for name, path, module in _base_modules(base, "", ""):
        own: dict[str, torch.Tensor] = {}
        module._save_to_state_dict(own, "", keep_vars=True)
        renamed |= {_join(name, key): _join(path, key) for key in own}
        shapes |= {_join(name, key): getattr(value, "shape", None) for key, value in own.items()}
    given = {clean(k): v for k, v in state_dict.items()}
    missing = [k for k in renamed if k not in given]
    unexpected = [k for k in given if k not in renamed]
    if strict and (missing or unexpected):
        lines = [f"Missing key(s): {missing}."] if missing else []
        lines += [f"Unexpected key(s): {unexpected}."] if unexpected else []
        raise RuntimeError(_nothing_loaded(base, " ".join(lines)))
    wrong = [
        f"size mismatch for {key}: shape {value.shape} in the state dict, {shapes[key]} in the model"
        for key, value in given.items()
        if isinstance(value, torch.Tensor) and shapes.get(key) not in (None, value.shape)
    ]
    if wrong:
        raise RuntimeError(_nothing_loaded(base, "; ".join(wrong) + "."))
    with onload_layer(base):
        base.load_state_dict({renamed[k]: v for k, v in given.items() if k in renamed}, strict=False)
    return IncompatibleKeys(missing, unexpected)


def _nothing_loaded(base: nn.Module, what: str) -> str:
    return f"Error(s) in loading the base model state_dict of {type(base).__name__}: {what} Nothing was loaded."
