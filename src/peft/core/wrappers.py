# SPDX-License-Identifier: Apache-2.0
"""Putting auxiliary wrappers into a model: `modules_to_save`, modules tied to these, `trainable_token_indices`."""

import contextlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import nearest
from . import tied
from .aux_modules import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper, as_names, check_module
from .context import Switch
from .layer import AdapterLayer
from .match import Names
from .switching import find_parts

__all__ = [
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "TrainableTokensWrapper",
    "as_names",
    "check_additional_trainable_modules",
    "set_additional_trainable_modules",
]


@dataclass
class Place:
    key: str
    parent: nn.Module
    leaf: str
    module: nn.Module
    entry: str  # what it was found by


def find_places(model: nn.Module, entries: Iterable[str]) -> list[Place]:
    """The outermost modules with a name in `entries` (exact or dotted suffix), under each of their names."""
    wanted = Names(set(entries))
    found: list[Place] = []
    stack = [("", model)]
    while stack:
        prefix, parent = stack.pop()
        below = []
        for leaf, module in parent._modules.items():
            if module is None:
                continue
            key = prefix + leaf
            if hit := wanted.match(key):
                found.append(Place(key, parent, leaf, module, hit))
            elif isinstance(module, AdapterLayer):
                _refuse_adapter_names(key, module, wanted)
            elif not isinstance(module, AuxiliaryTrainingWrapper):
                below.append((key + ".", module))
        stack += reversed(below)
    return found


def _refuse_adapter_names(key: str, layer: AdapterLayer, wanted: Names) -> None:
    for slot in layer.slots.values():
        for name in layer.adapter_names:
            if slot.is_module and (hit := wanted.match(f"{key}.{slot.name}.{name}")):
                raise ValueError(
                    f"The module to save {hit!r} conflicts with the adapter called {name!r}: it matches weights of the "
                    f"adapter ({key}.{slot.name}.{name}). Rename the adapter or the entry."
                )


def _switch_of(model: nn.Module, active: tuple[str, ...]) -> Switch:
    parts = (m for m in model.modules() if isinstance(m, (AdapterLayer, AuxiliaryTrainingWrapper)))
    return next((m.switch for m in parts), None) or Switch(active)


class Placing:
    """Puts the wrappers of adapter `name` in place; `undo` gets the steps that take it back."""

    def __init__(self, undo: contextlib.ExitStack, name: str, activate: bool, switch: Switch, inference_mode: bool):
        self.name, self.activate, self.switch, self.inference_mode = name, activate, switch, inference_mode
        self._made: dict[int, AuxiliaryTrainingWrapper] = {}
        self._undo = undo

    def wrap(self, place: Place, cls: type[AuxiliaryTrainingWrapper], **kwargs: Any) -> AuxiliaryTrainingWrapper:
        """Add the adapter to the wrapper at `place`, or put a new one there; one for a module with several names."""
        module, name = place.module, self.name
        wrapper = self._made.get(id(module))
        if wrapper is None:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    self._undo.callback(parameter.requires_grad_)
            if isinstance(module, cls):
                wrapper = module
                wrapper.update(name, inference_mode=self.inference_mode, **kwargs)
                self._undo.callback(wrapper.drop, name)
            else:
                wrapper = cls(module, name, switch=self.switch, inference_mode=self.inference_mode, **kwargs)
                if self.activate and name not in wrapper._key[0]:
                    wrapper.set_adapter([name], self.inference_mode)
            self._made[id(module)] = wrapper
        if wrapper is not module:
            self._undo.callback(setattr, place.parent, place.leaf, module)
            setattr(place.parent, place.leaf, wrapper)
        return wrapper


def _set_trainable(
    model: nn.Module,
    adapter_name: str,
    module_names: Iterable[str],
    inference_mode: bool,
    strict_module_check: bool = False,
    wrapper_cls: type[AuxiliaryTrainingWrapper] | None = None,
    activate_adapter: bool = True,
    **wrapper_kwargs: Any,
) -> None:
    """Wrap the modules called `module_names` for training with adapter `adapter_name`."""
    cls = wrapper_cls or ModulesToSaveWrapper
    places = _checked_places(model, as_names(module_names), cls, strict_module_check)  # type: ignore[arg-type]
    switch = _switch_of(model, (adapter_name,) if activate_adapter else ())
    with contextlib.ExitStack() as undo:
        placing = Placing(undo, adapter_name, activate_adapter, switch, inference_mode)
        for place in places:
            placing.wrap(place, cls, **wrapper_kwargs)
        undo.pop_all()


def _checked_places(
    model: nn.Module, names: Sequence[str], cls: type[AuxiliaryTrainingWrapper], strict: bool
) -> list[Place]:
    places = find_places(model, names)
    found = {p.entry for p in places}
    if strict and (lost := [n for n in names if n not in found]):
        raise ValueError(f"{cls.option}: could not find modules {lost} in the model.{_near(lost, model)}")
    for place in places:
        if not isinstance(place.module, cls):
            if isinstance(place.module, AuxiliaryTrainingWrapper):
                raise ValueError(
                    f"{place.key!r} is in {place.module.option} already, so it cannot be in {cls.option} too."
                )
            check_module(place.module, cls.option, place.key)
    return places


def _near(names: Iterable[str], model: nn.Module) -> str:
    keys = [k for k, _ in model.named_modules() if k]
    return "".join(nearest(n, {*keys, *(k.rpartition(".")[2] for k in keys)}) for n in names)


def _set_adapter(model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
    """Activate an adapter on the auxiliary wrappers of a model; those that do not hold it become inactive."""
    names = as_names(adapter_name)
    wrappers = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    if wrappers and not names:
        raise ValueError("Please specify at least one adapter to set.")
    for wrapper in wrappers:
        wrapper.check_set_adapter(names)
    for wrapper in wrappers:
        wrapper.set_adapter(names, inference_mode)


# ---- what a configuration asks for
@dataclass
class Plan:
    saved: list[Place]
    saved_tied: list[Place]  # share the copy of the input embedding
    tokens: list[tuple[Place, list[int]]]
    tokens_tied: list[Place]  # share the rows of the input embedding
    embedding: str | None


def _plan(model: nn.Module, cfg: Any) -> Plan:
    """Everything that can be wrong is found here, before the model is changed."""
    entries = as_names(getattr(cfg, "modules_to_save", None) or ())
    saved = _checked_places(model, entries, ModulesToSaveWrapper, strict=False) if entries else []
    to_tie = getattr(cfg, "modules_to_tie", None) or ()
    saved_tied = _checked_places(model, sorted(to_tie), ModulesToSaveWrapper, strict=True) if to_tie else []
    indices = getattr(cfg, "trainable_token_indices", None)
    embedding = tied.embedding_name(model) if to_tie or indices else None
    plan = Plan(saved, saved_tied, [], [], embedding)
    if indices:
        _plan_tokens(plan, model, cfg, indices if isinstance(indices, Mapping) else {str(embedding): indices})
    return plan


def _plan_tokens(plan: Plan, model: nn.Module, cfg: Any, indices: Mapping[str, list[int]]) -> None:
    saved = [p.key for p in [*plan.saved, *plan.saved_tied]]
    for place in _checked_places(model, list(indices), TrainableTokensWrapper, strict=True):
        if around := next((k for k in saved if f"{place.key}.".startswith(f"{k}.")), None):
            raise ValueError(
                f"{place.key!r} is in trainable_token_indices and {around!r} in modules_to_save; a module can be "
                "trained in one way only."
            )
        plan.tokens.append((place, list(indices[place.entry])))
    ensure = getattr(cfg, "ensure_weight_tying", False)
    names = tied._get_module_names_tied_with_embedding(model)
    if not names and ensure:
        warnings.warn(
            "`ensure_weight_tying` was requested, but the model ties no modules to its input embedding.", stacklevel=6
        )
    own = {place.key: rows for place, rows in plan.tokens}
    if plan.embedding not in own:
        return
    for place in find_places(model, names) if names else ():
        if place.key not in names or place.key in saved:
            continue
        rows = own.get(place.key)
        if rows is not None and rows != own[plan.embedding] and not (ensure and set(rows) == set(own[plan.embedding])):
            if ensure:
                raise ValueError(
                    f"Cannot tie {place.key!r} to {plan.embedding!r}: their trainable_token_indices differ. Give both "
                    "the same indices, or set ensure_weight_tying=False."
                )
            continue
        plan.tokens = [(p, r) for p, r in plan.tokens if p.key != place.key]
        plan.tokens_tied.append(place)


def check_additional_trainable_modules(model: nn.Module, peft_config: Any) -> None:
    """Raise for everything that `set_additional_trainable_modules` would refuse in an unchanged model."""
    _plan(model, peft_config)


def set_additional_trainable_modules(
    model: nn.Module, peft_config: Any, model_config: Any, adapter_name: str, activate_adapter: bool = True
) -> None:
    """Wrap what `modules_to_save` and `trainable_token_indices` name. Modules not found in the former are ignored."""
    wrap_additional(model, peft_config, adapter_name, activate_adapter)
    for wrapper in find_parts(model)[1]:
        wrapper._known.add(adapter_name)


def wrap_additional(
    model: nn.Module, peft_config: Any, adapter_name: str, activate: bool, switch: Switch | None = None
) -> bool:
    """The wrapping of `set_additional_trainable_modules`; returns whether there was something to wrap."""
    plan = _plan(model, peft_config)
    if not (plan.saved or plan.saved_tied or plan.tokens):
        return False
    switch = switch or _switch_of(model, (adapter_name,) if activate else ())
    inference_mode = bool(getattr(peft_config, "inference_mode", False))
    with contextlib.ExitStack() as undo:
        placing = Placing(undo, adapter_name, activate, switch, inference_mode)
        wrappers = {place.key: placing.wrap(place, ModulesToSaveWrapper) for place in plan.saved}
        for place in plan.saved_tied:
            source = wrappers.get(str(plan.embedding))
            if not isinstance(source, ModulesToSaveWrapper):
                raise RuntimeError(
                    f"Cannot tie {place.key!r}: the input embedding {plan.embedding!r} is not in modules_to_save."
                )
            placing.wrap(place, ModulesToSaveWrapper, tied_module=source.modules_to_save[adapter_name])
        for place, rows in plan.tokens:
            wrappers[place.key] = placing.wrap(place, TrainableTokensWrapper, token_indices=rows)
        for place in plan.tokens_tied:
            source = wrappers[str(plan.embedding)]
            placing.wrap(place, TrainableTokensWrapper, token_indices=[], tied_adapter=source.token_adapter)
        undo.pop_all()
    return True
