# SPDX-License-Identifier: Apache-2.0
"""The one bijection between the tensors of an adapter in memory and the keys of its file.

Both names come from the structure of the model, never from parts of names: one walk finds the adapter layers, the tuner
and the auxiliary wrappers, and every container of theirs that holds the adapter contributes its tensors.

    held by                          in memory                                   in the file
    slot of a layer                  P.lora_A.<name>.weight, P.ia3_l.<name>      P.lora_A.weight, P.ia3_l
    bare slot                        P.lora_magnitude_vector.<name>.weight       P.lora_magnitude_vector
    container of the tuner           base_model.vera_A.<name>                    base_model.vera_A
    auxiliary wrapper                P.modules_to_save.<name>.weight             P.weight
    bias of a base layer             P.base_layer.bias, P.bias                   the same

The name of the adapter is no part of the file, so it can be loaded under any name.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..core.layer import AdapterLayer
from ..core.slots import BufferDict, Slot
from ..core.tuner import TunerModel
from ..core.wrappers import AuxiliaryTrainingWrapper

# Modules that training wrappers put between a module and its parent; they are no part of any name.
FSDP_INFIX = "_fsdp_wrapped_module."
COMPILE_INFIX = "_orig_mod."
_INFIXES = (FSDP_INFIX[:-1], COMPILE_INFIX[:-1])
PEFT_PREFIX = "base_model.model."


class Entry(NamedTuple):
    """One tensor of an adapter: its names, and where it lives."""

    file: str
    memory: str
    owner: nn.Module
    attr: str
    layer: AdapterLayer | None = None
    role: str = "slot"  # "slot" | "shared" | "wrapper" | "bias" | "base"

    @property
    def tensor(self) -> torch.Tensor:
        return tensor_of(self.owner, self.attr)


def tensor_of(owner: nn.Module, attr: str) -> torch.Tensor:
    """A parameter or buffer; one that accelerate keeps elsewhere is fetched from there."""
    tensor = owner._parameters.get(attr)
    if tensor is None:
        tensor = owner._buffers[attr]
    assert tensor is not None
    if tensor.device.type == "meta":
        hook = getattr(owner, "_hf_hook", None)
        for part in (hook, *getattr(hook, "hooks", ())):
            weights = getattr(part, "weights_map", None)
            if weights is not None and attr in weights:
                return weights[attr]
    return tensor


def clean(key: str) -> str:
    """A name without the infixes of FSDP, and without torch.compile's unless the root itself is compiled."""
    key = key.replace(FSDP_INFIX, "")
    head = COMPILE_INFIX if key.startswith(COMPILE_INFIX) else ""
    return head + key.replace(COMPILE_INFIX, "")


def _join(path: str, child: str) -> str:
    if child == "_fsdp_wrapped_module" or (child == "_orig_mod" and path):
        return path
    return f"{path}.{child}" if path else child


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(clean name, module) of the model in registration order, each module once.

    What adapters own is not entered: of an adapter layer only the base layer, of a tuner only the model; wrappers are
    leaves.
    """
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        if isinstance(module, AdapterLayer):
            stack.append((_join(path, "base_layer"), module._modules["base_layer"]))  # type: ignore[arg-type]
        elif isinstance(module, TunerModel):
            stack.append((_join(path, "model"), module.model))
        elif module._modules and not isinstance(module, AuxiliaryTrainingWrapper):
            stack += [(_join(path, n), m) for n, m in reversed(module._modules.items()) if m is not None]


# ---- what one container, layer, tuner or wrapper holds


class _Roles(NamedTuple):
    unsaved: frozenset[str]  # frozen parameters that are no weights (AdaLoRA's ranknum); buffers say so themselves
    shared: frozenset[str]  # owned by the tuner
    bare: frozenset[str]  # modules whose weight is stored under the slot's name


def _roles(slots: dict[str, Slot]) -> _Roles:
    found = slots.values()
    unsaved = (s for s in found if s.role == "aux" and not s.saved and issubclass(s.container, nn.ParameterDict))
    return _Roles(
        frozenset(s.name for s in unsaved),
        frozenset(s.name for s in found if s.role == "shared"),
        frozenset(s.name for s in found if s.bare),
    )


@functools.cache
def _of_class(cls: type[AdapterLayer]) -> _Roles:
    return _roles(cls.slots)


def _persistent(module: nn.Module) -> Iterator[str]:
    """Names of the module's own tensors that belong into a state dict."""
    for attr, tensor in module._parameters.items():
        if tensor is not None:
            yield attr
    if module._buffers:
        for attr, tensor in module._buffers.items():
            if tensor is not None and attr not in module._non_persistent_buffers_set:
                yield attr


def _tensors_below(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, str]]:
    """(name, owner, attribute) of all persistent tensors of a module."""
    for attr in _persistent(module):
        yield path + attr, module, attr
    for child_name, child in module._modules.items():
        if child is not None:
            inner = path if child_name in _INFIXES else f"{path}{child_name}."
            yield from _tensors_below(child, inner)


def _container_entries(
    path: str, container: nn.Module, name: str, bare: bool, layer: AdapterLayer | None, role: str
) -> list[Entry]:
    """Entries of adapter `name` in a container keyed by adapter name, which is found at `path`."""
    held = container._modules.get(name)
    if held is None:
        own = name in container._parameters or name in container._buffers
        saved = own and name not in container._non_persistent_buffers_set
        return [Entry(path, f"{path}.{name}", container, name, layer, role)] if saved else []
    if not held._modules and not held._buffers and not bare:  # nearly always: a Linear, a Dropout
        return [
            Entry(f"{path}.{attr}", f"{path}.{name}.{attr}", held, attr, layer, role)
            for attr, tensor in held._parameters.items()
            if tensor is not None
        ]
    return [
        Entry(_file_key(path, name, rest, bare), f"{path}.{name}.{rest}", owner, attr, layer, role)
        for rest, owner, attr in _tensors_below(held)
    ]


def _file_key(path: str, name: str, rest: str, bare: bool) -> str:
    """The adapter name is left out where it is the last or the last but one part; deeper down the published files keep
    it.
    """
    if bare and rest == "weight":
        return path
    return f"{path}.{name}.{rest}" if "." in rest else f"{path}.{rest}"


_CONTAINERS = (nn.ModuleDict, nn.ParameterDict, BufferDict)


def layer_entries(path: str, layer: AdapterLayer, name: str, with_shared: bool = False) -> list[Entry]:
    """Saved tensors of adapter `name` on one layer."""
    own = layer.__dict__.get("slots")  # variants add slots to single layers
    unsaved, shared, bare = _of_class(type(layer)) if own is None else _roles(own)
    dot = path + "." if path else ""
    entries: list[Entry] = []
    for slot, container in layer._modules.items():
        if slot == "base_layer" or slot in unsaved or (slot in shared and not with_shared):
            continue
        if isinstance(container, _CONTAINERS):
            entries += _container_entries(dot + slot, container, name, slot in bare, layer, "slot")
    if (fixed := type(layer).name_in_files) is not None:
        start = len(dot)
        for i, entry in enumerate(entries):
            slot, _, rest = entry.memory[start:].partition(f".{name}")
            entries[i] = entry._replace(file=f"{dot}{slot}.{fixed}{rest}")
    return entries


def misfits(tuner: TunerModel, name: str, state: Mapping[str, torch.Tensor]) -> list[tuple[Entry, torch.Tensor]]:
    """Parameters of adapter `name` whose tensors in a file have another shape, with those tensors."""
    layers = ((path, layer) for path, layer in tuner.named_layers().items() if name in layer)
    entries = (e for path, layer in layers for e in layer_entries(path, layer, name) if e.attr in e.owner._parameters)
    stored = ((entry, state.get(PEFT_PREFIX + entry.file, state.get(entry.file))) for entry in entries)
    return [(entry, value) for entry, value in stored if value is not None and value.shape != entry.tensor.shape]


def resize(entry: Entry, shape: Sequence[int]) -> None:
    """A new parameter, of another shape and without values, in the place of one that is about to be loaded."""
    old = entry.tensor
    entry.owner._parameters[entry.attr] = nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad)


def tuner_entries(path: str, tuner: TunerModel, name: str) -> Iterator[Entry]:
    """Saved tensors of adapter `name` that the tuner holds for all layers."""
    own = tuner.own_tensors(name)
    if own is not None:
        for file, memory, owner, attr in own:
            yield Entry(_join(path, file), clean(_join(path, memory)), owner, attr)
        return
    for slot, container in tuner._modules.items():
        if slot != "model" and isinstance(container, _CONTAINERS):
            yield from _container_entries(_join(path, slot), container, name, False, None, "shared")


def wrapper_entries(path: str, wrapper: AuxiliaryTrainingWrapper, name: str) -> Iterator[Entry]:
    """Tensors of adapter `name` in a module trained in full, or of its trained tokens; nothing if the wrapper lacks the
    adapter.
    """
    dot = path + "." if path else ""
    if name not in wrapper.adapter_names:
        return
    for in_file, in_module in wrapper.adapter_state_dict_load_map(name).items():
        found = resolve(wrapper, in_module)
        if found is not None:
            yield Entry(dot + in_file, clean(dot + in_module), found[0], found[1], None, "wrapper")


def resolve(root: nn.Module, key: str) -> tuple[nn.Module, str] | None:
    """(owner, attribute) of the tensor called `key` below `root`, or None. Wrapper infixes may be left out of `key`."""
    *path, attr = key.split(".")
    module: nn.Module | None = root
    for part in path:
        module = _holder(module, part, "_modules")
        module = None if module is None else module._modules[part]
    owner = _holder(module, attr, "_parameters", "_buffers")
    if owner is None or (owner._parameters.get(attr) is None and owner._buffers.get(attr) is None):
        return None
    return owner, attr


def _holder(module: nn.Module | None, name: str, *tables: str) -> nn.Module | None:
    """The module itself, or the one that training wrappers hold for it, that has `name` in one of its tables."""
    while module is not None and all(name not in module.__dict__[table] for table in tables):
        module = next((module._modules[n] for n in _INFIXES if n in module._modules), None)
    return module


# ---- the whole adapter


def adapter_entries(model: nn.Module, name: str, config: Any = None) -> list[Entry]:
    """Everything that belongs to adapter `name` and is saved, in the order of the published files: slots, biases,
    wrappers.
    """
    slots: list[Entry] = []
    wrapped: list[Entry] = []
    biases: list[Entry] = []
    bias = getattr(config, "bias", "none")
    bias = bias if isinstance(bias, str) else "none"
    bases: set[int] = set()
    has_tuner = False
    for path, module in walk(model):
        if isinstance(module, AdapterLayer):
            if name in module:
                slots += layer_entries(path, module, name, with_shared=not has_tuner)
                if bias != "none":
                    bases.add(id(module.get_base_layer()))
        elif isinstance(module, TunerModel):
            has_tuner = True
            slots += tuner_entries(path, module, name)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            wrapped += wrapper_entries(path, module, name)
        elif bias != "none" and (bias == "all" or id(module) in bases) and module._parameters.get("bias") is not None:
            key = _join(path, "bias")
            biases.append(Entry(key, key, module, "bias", None, "bias"))
    return slots + biases + wrapped


def find_tuner(model: nn.Module) -> TunerModel | None:
    """The tuner around or inside `model` (a PeftModel, a tuner, or what FSDP or torch.compile made of one)."""
    found: nn.Module | None = model
    while found is not None and not isinstance(found, TunerModel):
        found = next((found._modules[n] for n in ("base_model", *_INFIXES) if n in found._modules), None)
    return found


def state_keys(model: nn.Module) -> Iterator[str]:
    """Names of all tensors of a model's state dict, in its order, without building it."""
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        for attr in _persistent(module):
            yield path + attr
        if module._modules:
            dot = path.removesuffix(".")
            stack += [(_join(dot, n) + ".", m) for n, m in reversed(module._modules.items()) if m is not None]
