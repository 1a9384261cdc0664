# SPDX-License-Identifier: Apache-2.0
"""Modules whose weights accelerate keeps elsewhere (CPU, disk) between calls: bring them in, keep what changes."""

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..storage.dtensor import gathered, is_sharded, whole
from .modules import tree


def _hook_types() -> tuple[Any, ...]:
    hooks = sys.modules.get("accelerate.hooks")
    return () if hooks is None else (hooks.AlignDevicesHook, hooks.SequentialHook)


def _offloading(module: nn.Module) -> Any:
    """The hook that offloads the own weights of a module, or None."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None or not isinstance(hook, types := _hook_types()):
        return None
    parts = getattr(hook, "hooks", (hook,))
    return next((h for h in parts if isinstance(h, types[0]) and h.offload), None)


def is_offloaded(module: nn.Module) -> bool:
    """Whether the module's own weights are kept elsewhere between calls."""
    return _offloading(module) is not None


def compute_device(module: nn.Module, weight: torch.Tensor) -> torch.device:
    """Where a module computes: where its weight is, unless accelerate keeps that elsewhere (it is on meta then)."""
    hook = _offloading(module) if weight.device.type == "meta" else None
    if hook is None or hook.execution_device is None:
        return weight.device
    device = hook.execution_device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


@contextlib.contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """The own weights of an offloaded module are real inside, and its hook leaves alone what is put in their place.
    Tensors that were read stay what they are.
    """
    if (hook := _offloading(module)) is None:
        yield
        return
    _load(module, hook)
    hook.offload = False
    try:
        yield
    finally:
        hook.offload = True
        hook.post_forward(module, torch.empty(0))


@contextlib.contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """The weights of `layer` and its sub-modules are real inside the block; what is changed there is kept."""
    with gathered(layer.parameters()), _whole_adapters(layer):
        modules = layer.modules() if "accelerate.hooks" in sys.modules else ()
        loaded = [(m, hook) for m in modules if (hook := _offloading(m)) is not None]
        for module, hook in loaded:
            _load(module, hook)
        try:
            yield
        finally:
            for module, hook in loaded:
                _store(module, hook)
                hook.post_forward(module, torch.empty(0))


def _load(module: nn.Module, hook: Any) -> None:
    with torch.device("cpu"):  # files are read to the default device, which may be meta
        hook.pre_forward(module)


def _store(module: nn.Module, hook: Any) -> None:
    """Write the present weights into the map that the hook loads from."""
    weights = hook.weights_map
    prefix = getattr(weights, "prefix", "")
    store = getattr(weights, "dataset", weights)
    own = [
        *module.named_parameters(recurse=hook.place_submodules),
        *module.named_buffers(recurse=hook.place_submodules),
    ]
    for name, tensor in own:
        key = prefix + name
        if tensor.device.type == "meta" or key not in store:
            continue
        if isinstance(store, dict):
            store[key] = tensor.detach().to("cpu")
        elif isinstance(getattr(store, "state_dict", None), dict):  # OffloadedWeightsLoader: memory goes before disk
            store.state_dict[key] = tensor.detach().to("cpu")


def copy_module(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy with real, whole weights and device hooks of its own (a plain copy would run the original's)."""
    hooked = [m for m in module.modules() if "_hf_hook" in m.__dict__]
    split = [m for m in module.modules() if any(is_sharded(p) for p in m._parameters.values())]
    with onload_layer(module):
        if not hooked and not split:
            return copy.deepcopy(module, memo)
        memo = {} if memo is None else memo
        for m in hooked:
            memo[id(m._hf_hook)] = m._hf_hook  # weights maps are not copied
        for parameter in (p for m in split for p in m._parameters.values() if p is not None):
            memo.setdefault(id(parameter), nn.Parameter(whole(parameter.detach()).clone()))
        copied = copy.deepcopy(module, memo)
    for old, new in zip(module.modules(), copied.modules(), strict=True):
        if "_hf_hook" in old.__dict__:
            _rehook(old, new)
        elif old in split:
            new.__dict__.pop("forward", None)  # that of the original, for parts
    return copied


def _rehook(old: nn.Module, new: nn.Module) -> None:
    from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module

    for name in ("_hf_hook", "_old_forward", "forward"):
        new.__dict__.pop(name, None)
    hook: Any = old._hf_hook
    parts = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    for part in parts:
        if isinstance(part, AlignDevicesHook):  # trained weights stay on the device
            part = AlignDevicesHook(part.execution_device, io_same_device=part.io_same_device, skip_keys=part.skip_keys)
        add_hook_to_module(new, part, append=True)


@contextlib.contextmanager
def _whole_adapters(layer: Any) -> Iterator[None]:
    """Parameters of adapters that FSDP2 shards are whole inside, for reading; base weights are left to the storage."""
    base = {id(m) for m in layer.get_base_layer().modules()} if hasattr(layer, "get_base_layer") else None
    held = [] if base is None else [m._parameters for m in layer.modules() if m._parameters and id(m) not in base]
    sharded = [(ps, name, p) for ps in held for name, p in ps.items() if is_sharded(p)]
    for parameters, name, parameter in sharded:
        parameters[name] = nn.Parameter(whole(parameter.detach()), requires_grad=parameter.requires_grad)
    try:
        yield
    finally:
        for parameters, name, parameter in sharded:
            parameters[name] = parameter


@contextlib.contextmanager
def unsharded(model: nn.Module, write: bool = False) -> Iterator[bool]:
    """Parameters that FSDP1 shards are whole inside, for reading, or also for writing the same on all processes; yields
    whether they are so only inside. All processes must come here together.
    """
    sharded: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    if sharded is None or not torch.distributed.is_initialized():  # nothing is sharded: no walk
        yield False
        return
    units: list[Any] = [m for m in tree(model) if isinstance(m, sharded)]
    with contextlib.ExitStack() as stack:
        if units and all(u.training_state.name == "IDLE" for u in units):  # else the caller has made them whole
            if units[0] is not model and units[0]._is_root is None:
                raise RuntimeError(
                    "FSDP shards this model but has not run yet: give the outermost FSDP module, or run it once before."
                )
            on_gpu = units[0].compute_device.type != "cpu"
            stack.enter_context(sharded.summon_full_params(model, writeback=write, offload_to_cpu=on_gpu))
        yield bool(units)
