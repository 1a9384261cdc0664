# SPDX-License-Identifier: Apache-2.0
"""Replacing the weights of a loaded LoRA by those of another file, in place: no new modules, so a compiled model stays
compiled.
"""

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from ..config import PeftConfig, nearest
from ..core.layer import AdapterLayer
from ..core.match import pattern_value
from ..utils.peft_types import PeftType
from .files import read_adapter
from .initial import rank_axis
from .keys import COMPILE_INFIX, PEFT_PREFIX, Entry, adapter_entries, clean, walk
from .load import Places

# Options that must agree, since they are part of the computation and not of the weights.
CONFIG_KEYS_TO_CHECK = {PeftType.LORA: ["use_rslora", "lora_dropout", "alpha_pattern", "use_dora"]}


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """ValueError when an adapter of `config1` cannot take the place of one of `config0`. Ranks and alphas may
    differ.
    """
    if config0.peft_type != config1.peft_type:
        raise ValueError(f"Incompatible PEFT types found: {_name(config0)} and {_name(config1)}")
    if config0.peft_type not in CONFIG_KEYS_TO_CHECK:
        raise ValueError(
            f"Hotswapping only supports {', '.join(t.value for t in CONFIG_KEYS_TO_CHECK)} but {_name(config0)} was "
            "passed."
        )
    for key in CONFIG_KEYS_TO_CHECK[PeftType(config0.peft_type)]:
        values = [getattr(c, key, None) for c in (config0, config1)]
        if values[0] != values[1]:
            raise ValueError(f"Configs are incompatible: for {key}, {values[0]} != {values[1]}")


def _name(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Put the weights of the LoRA in a folder or hub repository into adapter `adapter_name` of `model`.

    The adapter keeps its name; its configuration in `model.peft_config` becomes the one of the file. Modules that the
    new adapter lacks are turned off, modules that only it has are an error. A failing call changes nothing.
    """
    config, state = read_adapter(model_name_or_path, device=torch_device, **kwargs)
    configs: dict[str, Any] = model.peft_config  # type: ignore[assignment]
    if adapter_name not in configs:
        raise RuntimeError(
            f"Hot swapping the adapter did not succeed, there is no adapter {adapter_name!r} to replace, only "
            f"{sorted(configs)}.{nearest(adapter_name, configs)}"
        )
    check_hotswap_configs_compatible(configs[adapter_name], config)
    hotswap_adapter_from_state_dict(model, state, adapter_name, config)


def _insert_adapter_name_into_state_dict(
    state_dict: Mapping[str, torch.Tensor], adapter_name: str, parameter_prefix: str
) -> dict[str, torch.Tensor]:
    """Names in memory of the keys of a file: the adapter's name comes after the part that starts with the prefix."""
    named = {}
    for key, value in state_dict.items():
        parts = key.split(".")
        at = next((i for i in range(len(parts) - 1, -1, -1) if parts[i].startswith(parameter_prefix)), None)
        if at is not None:
            parts.insert(at + 1, adapter_name)
            if parts[at] == "lora_magnitude_vector" and at + 2 == len(parts):
                parts.append("weight")
        named[".".join(parts)] = value
    return named


# A tensor of the model, and what takes its place (None: zeros).
_Swap = tuple[Entry, torch.Tensor | None]


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str,
    config: Any,
    parameter_prefix: str = "lora_",
) -> None:
    """Swap in tensors named as in memory (with the adapter's name) or as in a file. Parameters keep their identity, and
    their storage if it is big enough.
    """
    model = getattr(model, "_orig_mod", model)
    swaps, layers = _plan(model, state_dict, adapter_name, config, parameter_prefix)
    for entry, value in swaps:
        _write(entry, value)
    for path, layer in layers.items():
        _set_scaling(layer, path, adapter_name, config)
    _refresh_config(model, adapter_name, config)


def _plan(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], name: str, config: Any, prefix: str
) -> tuple[list[_Swap], dict[str, AdapterLayer]]:
    """What to write where; all errors are raised here."""
    layers = {path: m for path, m in walk(model) if isinstance(m, AdapterLayer) and name in m}
    merged = [p for p, layer in layers.items() if name in layer.merged_adapters or layer.merged]
    if merged:
        raise ValueError(
            f"Cannot hot-swap adapter {name!r} because it is currently merged into the base weights (of "
            f"{merged[0]!r}). Unmerge it first, by `unmerge_adapter` (diffusers: `unfuse_lora`)."
        )
    entries = adapter_entries(model, name, config)
    places = Places(model, name, entries)
    given = {clean(k).removeprefix(COMPILE_INFIX): v for k, v in state_dict.items()}
    found = {key: places.find(key) for key in given}
    unexpected = [key for key, entry in found.items() if entry is None]
    swaps: list[_Swap] = [(entry, given[key]) for key, entry in found.items() if entry is not None]
    touched = {entry.memory for entry, _ in swaps}
    swaps += [(e, None) for e in entries if e.role == "slot" and prefix in e.memory and e.memory not in touched]
    if unexpected:
        hints = "".join(nearest(k, places.by_file, prefix=f" Nearest to {k!r}: ").rstrip("?") for k in unexpected[:2])
        raise RuntimeError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected[:10])}"
            f"{' ...' if len(unexpected) > 10 else ''}.{hints} Only modules that the loaded adapter has can be swapped."
        )
    for entry, value in swaps:
        if value is not None:
            _check(entry, value)
    return swaps, layers


def _check(entry: Entry, new: torch.Tensor) -> None:
    """Ranks may differ: a bigger factor takes the place of the old one, a smaller one is padded."""
    old, shapes = entry.tensor, f"{tuple(entry.tensor.shape)} (loaded) and {tuple(new.shape)} (new)"
    differ = [i for i, sizes in enumerate(zip(old.shape, new.shape, strict=False)) if len(set(sizes)) > 1]
    if old.dim() != new.dim() or differ not in ([], [rank_axis(entry.file)]):
        raise ValueError(f"{entry.memory}: incompatible shapes {shapes}.")
    if new.numel() < old.numel() and old.dim() not in (2, 4):
        raise NotImplementedError(f"{entry.memory}: only linear and Conv2d factors can be padded, not {shapes}.")


@torch.no_grad()
def _write(entry: Entry, new: torch.Tensor | None) -> None:
    old = entry.tensor
    if new is None:
        old.zero_()
    elif new.shape == old.shape:
        old.copy_(new)
    elif new.numel() < old.numel():
        _pad_into(old, new, 1 if entry.layer is None else _groups(entry.layer))
    else:
        _grow(old, new)


def _pad_into(old: torch.Tensor, new: torch.Tensor, groups: int) -> None:
    """Zeros around the new values: the product of the factors does not change."""
    old.zero_()
    if old.shape[0] == new.shape[0]:
        old[:, : new.shape[1]].copy_(new)
    else:  # the outputs of A feed the groups of B block by block
        old.unflatten(0, (groups, -1))[:, : new.shape[0] // groups].copy_(new.unflatten(0, (groups, -1)))


def _groups(layer: AdapterLayer) -> int:
    return int(getattr(layer.get_base_layer(), "groups", 1))


def _grow(old: torch.Tensor, new: torch.Tensor) -> None:
    """A bigger storage behind the same parameter object."""
    value = new.detach().to(old.device, old.dtype).clone()
    try:
        torch.utils.swap_tensors(old, nn.Parameter(value, requires_grad=old.requires_grad))
    except RuntimeError:  # something holds a weak reference to the old tensor
        old.data = value


def _set_scaling(layer: Any, path: str, name: str, config: Any) -> None:
    module = _module_name(path, layer)
    r = pattern_value(config.rank_pattern, module, config.r)
    alpha = pattern_value(config.alpha_pattern, module, config.lora_alpha)
    scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
    current = layer.scaling[name]
    if isinstance(current, torch.Tensor):
        current.fill_(scaling)
    else:
        layer.scaling[name] = scaling
    layer.r[name], layer.lora_alpha[name] = r, alpha
    layer.__dict__.pop("_norm_cache", None)
    layer._seen = None


def _module_name(path: str, layer: Any) -> str:
    """The name that patterns are matched with: the one in the base model, of a raw parameter with its own."""
    name = path.removeprefix(PEFT_PREFIX).replace(".base_layer", "")
    return f"{name}.{layer.kind.weight_name}" if layer.kind.class_name == "ParamWrapper" else name


def _refresh_config(model: Any, name: str, config: Any) -> None:
    """The options that go with the new weights, in the configuration object that the model has."""
    configs = getattr(model, "peft_config", {})  # a part of a model has none
    if name in configs:
        fields = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
        configs[name] = configs[name].with_values(**{f: copy.copy(getattr(config, f)) for f in fields})


# ---- saving


def trim_padding(entries: list[Entry], name: str, config: Any) -> dict[str, torch.Tensor]:
    """Factors that are padded with zeros beyond the rank of the configuration, cut to it: file key -> tensor.

    Zero rows of A and the zero columns of B that go with them get no gradients, so they stay zero in training.
    """
    padded: set[int] = set()
    for entry in entries:  # a hot loop: one look at each A
        if entry.layer is not None and entry.file.endswith(("lora_A.weight", "lora_embedding_A")):
            rank = entry.layer.__dict__["r"].get(name)
            if rank != entry.owner._parameters[entry.attr].shape[0]:  # type: ignore[union-attr]
                padded.add(id(entry.layer))
    trimmed: dict[str, torch.Tensor] = {}
    for place in padded:
        trimmed.update(_trim([e for e in entries if id(e.layer) == place], name, config))
    return trimmed


def _trim(entries: list[Entry], name: str, config: Any) -> dict[str, torch.Tensor]:
    layer: Any = entries[0].layer
    A, B = layer.factor_tensors(name)
    files = {id(e.tensor): e.file for e in entries}
    place = files[id(A)].removesuffix(".weight").rpartition(".")[0]
    rank = pattern_value(config.rank_pattern, _module_name(place, layer), config.r)
    groups = _groups(layer)
    if rank >= A.shape[0] or rank % groups:
        return {}
    blocks = A.detach().unflatten(0, (groups, -1))
    keep = rank // groups
    columns = rank if B.shape[1] == A.shape[0] else keep
    if blocks[:, keep:].any() or B.detach()[:, columns:].any():
        return {}
    return {files[id(A)]: blocks[:, :keep].flatten(0, 1), files[id(B)]: B.detach()[:, :columns]}


# ---- compiled models


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Before compiling: scalings become tensors, and factors are zero padded to `target_rank`, the largest rank that
    will be swapped in.

    `config` (one or a dict of them) gets the new rank too.
    """
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        if check_compiled == "error":
            raise ValueError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
        if check_compiled == "warn":
            warnings.warn(
                "prepare_model_for_compiled_hotswap was called with a model that is already compiled, which probably "
                "has to be compiled again. Call the function before compiling the model.",
                stacklevel=2,
            )
        elif check_compiled != "ignore":
            raise ValueError(f"check_compiled should be one of 'error', 'warn', or 'ignore', got {check_compiled!r}.")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, AdapterLayer) and "lora_A" in m.slots}
    if not layers:
        raise ValueError(
            "No adapter layers found on the model, call `prepare_model_for_compiled_hotswap` after loading the first "
            "LoRA and before loading the second."
        )
    rank = target_rank or 0
    padded = {n: m for n, m in layers.items() if target_rank is not None and m.kind.class_name in ("Linear", "Conv2d")}
    for path, layer in padded.items():
        _check_rank(layer, path, rank)
    for layer in layers.values():
        _tensor_scaling(layer)
    for layer in padded.values():
        _pad(layer, rank)
    if config is not None and target_rank is not None:
        for one in config.values() if isinstance(config, dict) else [config]:
            one.r = target_rank
            one.rank_pattern = dict.fromkeys(one.rank_pattern or {}, target_rank)


def _tensor_scaling(layer: Any) -> None:
    device = layer._reference_tensor(layer.get_base_layer()).device
    for name, value in layer.scaling.items():
        if not isinstance(value, torch.Tensor):
            layer.scaling[name] = torch.tensor(float(value), device=device)
    layer._seen = None


def _check_rank(layer: Any, path: str, rank: int) -> None:
    groups = _groups(layer)
    for name, module in layer.lora_A.items():
        own = module.weight.shape[0]
        if own > rank:
            raise ValueError(
                f"Trying to pad the adapter to the target rank {rank}, but the original rank is larger ({own}, adapter "
                f"{name!r}, {path!r}). Pass the largest rank of all adapters."
            )
        if rank % groups or own % groups:
            raise ValueError(
                f"The ranks must be multiples of the {groups} groups of {path!r}, got {own} (adapter {name!r}) and the "
                f"target rank {rank}."
            )


@torch.no_grad()
def _pad(layer: Any, rank: int) -> None:
    groups = _groups(layer)
    for name, A in layer.lora_A.items():
        B = layer.lora_B[name]
        for module, dim, size in ((A, 0, rank), (B, 1, rank // groups)):
            old = module.weight
            if old.shape[dim] != size:
                shape = [*old.shape[:dim], size, *old.shape[dim + 1 :]]
                module.weight = nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad)
                _pad_into(module.weight.data, old.data, groups)
        if isinstance(A, nn.Linear):
            A.out_features = B.in_features = rank
        else:
            A.out_channels = B.in_channels = rank
    layer._seen = None
