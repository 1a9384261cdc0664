# SPDX-License-Identifier: Apache-2.0
"""Putting the tensors of a file into an adapter: find their places, compare shapes, and only then write."""

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from ..core.offload import is_offloaded, onload_layer, unsharded
from ..core.tuner import TunerModel
from ..registry import method_of
from ..storage.dtensor import gathered
from ..utils.collector import without_collector
from ..utils.peft_types import PeftType
from .files import Tensors
from .keys import (
    COMPILE_INFIX,
    PEFT_PREFIX,
    Entry,
    adapter_entries,
    clean,
    find_tuner,
    resolve,
    state_keys,
)


def _method(config: Any) -> Any:
    try:
        return method_of(config)
    except KeyError as error:
        raise ValueError(f"Unknown PEFT type passed: {config.peft_type}") from error


def tuner_of(model: nn.Module, adapter_name: str, hook: str) -> TunerModel | None:
    """The tuner whose `hook` has a say for this adapter; for an injected plain model one is put together around it."""
    cls = method_of(model.peft_config[adapter_name]).tuner  # type: ignore[index]
    tuner = find_tuner(model)
    if tuner is None or not isinstance(tuner, cls):
        if not issubclass(cls, TunerModel) or getattr(cls, hook) is getattr(TunerModel, hook):
            return None
        base = tuner.model if tuner is not None else model
        tuner = cls.__new__(cls)
        nn.Module.__init__(tuner)
        tuner.model = base
        tuner.peft_config = model.peft_config  # type: ignore[assignment]
        tuner.switch = TunerModel._found_switch(base)
        tuner.forget_layers()
    return tuner


@dataclass
class LoadReport:
    """What happened to a file's keys. `missing` are names in memory, the others keys of the file."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    hints: dict[str, str] = field(default_factory=dict)  # unexpected key -> nearest valid one
    touched: set[str] = field(default_factory=set)  # names in memory

    def incompatible(self, model: nn.Module | None = None) -> _IncompatibleKeys:
        """torch's result type. With `model`, the missing keys are all of its state dict that were not loaded, as torch
        lists them.
        """
        missing = self.missing if model is None else [k for k in state_keys(model) if k not in self.touched]
        return _IncompatibleKeys(missing, self.unexpected)


def _some(keys: list[str], limit: int = 8) -> str:
    return str(keys) if len(keys) <= limit else f"{keys[:limit]} and {len(keys) - limit} more"


@dataclass
class _Plan:
    report: LoadReport = field(default_factory=LoadReport)
    copies: list[tuple[Entry, torch.Tensor]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@without_collector()
def load_adapter_state(
    model: Any,
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    *,
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    refuse_nan: bool = False,
    source: str = "",
) -> LoadReport:
    """The work of `set_peft_model_state_dict`, with a full report and without the list of all base-model keys.

    `refuse_nan` raises ValueError for tensors that hold NaN; `source` (a path) goes into error messages.
    """
    model = getattr(model, "_orig_mod", model)
    config = model.peft_config[adapter_name]
    method = _method(config)
    state = _checked(state_dict, source)
    not_finite = _with_nan(state)
    if not_finite and refuse_nan:
        raise ValueError(
            f"The adapter weights{_from(source)} hold NaN in {len(not_finite)} of {len(state)} tensors: "
            f"{_some(not_finite)}. The training run "
            "that wrote them diverged; nothing was loaded."
        )
    if method.is_prompt:
        report = _load_prompt(model, config, adapter_name, state, ignore_mismatched_sizes, low_cpu_mem_usage, source)
    else:
        with unsharded(model, write=True):
            entries = adapter_entries(model, adapter_name, config)
            state = _converted(model, config, adapter_name, state, entries)
            plan = _make_plan(model, adapter_name, config, entries, state, ignore_mismatched_sizes)
            _raise(model, plan, source)
            _assign(plan.copies, adapter_name, low_cpu_mem_usage)
        report = plan.report
    report.not_finite = not_finite
    return report


def _from(source: str) -> str:
    return f" in {source}" if source else ""


def _checked(state_dict: Mapping[str, torch.Tensor], source: str) -> Tensors:
    bad = [f"{k!r} is a {type(v).__name__}" for k, v in state_dict.items() if not isinstance(v, torch.Tensor)]
    if bad:
        raise TypeError(f"Adapter weights{_from(source)} must be tensors, but {_some(bad)}.")
    metadata, flat = getattr(state_dict, "metadata", None), getattr(state_dict, "flat", None)
    return Tensors({clean(k).removeprefix(COMPILE_INFIX): v for k, v in state_dict.items()}, metadata, flat)


_SUMMED = 32_768  # numbers that torch sums up in one thread: waking the others takes longer than the sum


@torch.no_grad()
def _with_nan(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Keys of tensors that hold NaN. Small tensors are summed up many at a time; only when a sum is not finite are
    they looked at one by one.
    """
    flat = getattr(state, "flat", None)
    if flat is not None and torch.isfinite(flat.sum()):
        start, end = flat.data_ptr(), flat.data_ptr() + flat.nbytes
        if all(start <= tensor.data_ptr() < end for tensor in state.values()):  # nothing was put in their place
            return []
    groups: dict[tuple[torch.dtype, torch.device], list[tuple[str, torch.Tensor]]] = {}
    room: dict[tuple[torch.dtype, torch.device], int] = {}
    found: set[str] = set()

    def look(held: list[tuple[str, torch.Tensor]]) -> None:
        if not held:
            return
        flat = [tensor.reshape(-1) for _, tensor in held]
        if not torch.isfinite((flat[0] if len(flat) == 1 else torch.cat(flat)).sum()):
            found.update(key for key, tensor in held if torch.isnan(tensor).any())

    for key, tensor in state.items():
        dtype = tensor.dtype
        if tensor.is_meta or dtype.itemsize == 1 or not (dtype.is_floating_point or dtype.is_complex):
            continue
        kind, size = (dtype, tensor.device), tensor.numel()
        if size > room.get(kind, -1):
            look(groups.pop(kind, []))
            room[kind] = _SUMMED
        room[kind] -= size
        groups.setdefault(kind, []).append((key, tensor))
    for group in groups.values():
        look(group)
    return [key for key in state if key in found]


def _converted(
    model: Any, config: Any, adapter_name: str, state: dict[str, torch.Tensor], entries: list[Entry]
) -> dict[str, torch.Tensor]:
    """Files of other layouts: transformers' re-arranged experts, then whatever the method's own hook knows."""
    if config.peft_type == PeftType.LORA:
        from .convert import convert_weights

        state = convert_weights(model, state, {e.file for e in entries})
    tuner = tuner_of(model, adapter_name, "import_state")
    return state if tuner is None else tuner.import_state(adapter_name, state)


def _load_prompt(
    model: Any, config: Any, name: str, state: dict[str, torch.Tensor], ignore: bool, low_cpu: bool, source: str
) -> LoadReport:
    """Prompt encoders load their own keys; modules trained in full come with them."""
    encoder = model.prompt_encoder[name]
    entries = [e for e in adapter_entries(model, name) if e.role == "wrapper"]
    own = set(encoder.export())
    foreign = {k: v for k, v in state.items() if k not in own}
    plan = _make_plan(model, name, config, entries, foreign, ignore)
    _raise(model, plan, source)
    try:
        encoder.load({k: v for k, v in state.items() if k in own})
    except KeyError as error:
        raise KeyError(f"{error.args[0]} ({source or 'the given weights'})") from error
    except RuntimeError as error:
        raise RuntimeError(
            f"Cannot load the prompt {name!r}{_from(source)}: it was made with another `num_virtual_tokens` or for a "
            f"base model of another width. {error}"
        ) from error
    _assign(plan.copies, name, low_cpu)
    plan.report.loaded += sorted(own & set(state))
    return plan.report


def _make_plan(
    model: nn.Module, name: str, config: Any, entries: list[Entry], state: dict[str, torch.Tensor], ignore: bool
) -> _Plan:
    """Find the place of each tensor and compare shapes; nothing is changed."""
    plan, places = _Plan(), Places(model, name, entries)
    report = plan.report
    for key, value in state.items():
        entry = places.find(key)
        if entry is None:
            report.unexpected.append(key)
            continue
        held = entry.tensor
        want = held.shape if held.shape == value.shape else tuple(getattr(held, "ds_shape", held.shape))
        if want == value.shape or (ignore and _same_packed(value.shape, want)):
            plan.copies.append((entry, value))
            report.loaded.append(key)
            report.touched.add(entry.memory)
        elif ignore:
            report.mismatched.append(
                f"{entry.memory}: found shape {value.shape} in the checkpoint and {entry.tensor.shape} in the model "
                "instantiated"
            )
        else:
            plan.errors.append(_size_error(entry, value, want))
    report.missing = [e.memory for e in entries if e.role != "bias" and e.memory not in report.touched]
    if report.unexpected:
        lacking = [e for e in entries if e.memory not in report.touched]
        report.hints = _hints(report.unexpected, lacking or entries)
    if report.mismatched:
        listed = "\n- ".join(report.mismatched)
        warnings.warn(
            f"Some weights of {type(model).__name__} were not initialized from the model checkpoint and are being "
            "ignored because you "
            f"passed `ignore_mismatched_sizes=True`: - {listed}.",
            stacklevel=5,
        )
    return plan


def _same_packed(found: torch.Size, want: tuple[int, ...]) -> bool:
    """4-bit weights are packed two to a byte into one column."""
    return len(want) == 2 and want[-1] == 1 and found.numel() == 2 * want[0]


def _size_error(entry: Entry, value: torch.Tensor, want: tuple[int, ...]) -> str:
    return (
        f"size mismatch for {entry.memory}: copying a param with shape {value.shape} from checkpoint (key "
        f"{entry.file!r}), the shape in "
        f"current model is {torch.Size(want)}."
    )


def _raise(model: nn.Module, plan: _Plan, source: str) -> None:
    if not plan.errors:
        return
    shown = "\n\t".join(plan.errors[:20]) + (
        f"\n\t... and {len(plan.errors) - 20} more" if len(plan.errors) > 20 else ""
    )
    raise RuntimeError(
        f"Error(s) in loading state_dict for {type(model).__name__}{_from(source)}:\n\t{shown}\n\tNothing was loaded. "
        "The adapter was made "
        "with another rank or for a base model of another shape; `ignore_mismatched_sizes=True` skips such tensors."
    )


class Places:
    """Where the tensors named in a file live."""

    def __init__(self, model: nn.Module, name: str, entries: list[Entry]):
        self.model, self.name = model, name
        self.by_file = {e.file: e for e in entries}
        self.by_memory = {e.memory: e for e in entries}
        self.plain = find_tuner(model) is None and "prompt_encoder" not in model._modules
        self.by_alias: dict[str, Entry] | None = None

    def find(self, key: str) -> Entry | None:
        found = self.by_file.get(key) or self.by_memory.get(key)
        if found is None and self.plain and key.startswith(PEFT_PREFIX):
            key = key.removeprefix(PEFT_PREFIX)
            found = self.by_file.get(key) or self.by_memory.get(key)
        return found or self._alias(key) or self._base(key)

    def _alias(self, key: str) -> Entry | None:
        """Keys that contain the name of the adapter they were saved from, and modules whose only tensor has a bare
        key.
        """
        if self.by_alias is None:
            self.by_alias = {}
            for e in self.by_file.values():
                if e.role == "slot" and f".{self.name}." in e.file:
                    head, _, tail = e.file.rpartition(f".{self.name}.")
                    self.by_alias[f"{head}.*.{tail}"] = e
                elif e.role == "slot" and e.memory.endswith(f".{self.name}.weight") and not e.file.endswith(".weight"):
                    self.by_alias[f"{e.file}.weight"] = e
        if not self.by_alias:
            return None
        if key in self.by_alias:
            return self.by_alias[key]
        parts = key.split(".")
        shapes = (".".join([*parts[:i], "*", *parts[i + 1 :]]) for i in range(len(parts) - 2, 0, -1))
        return next((self.by_alias[s] for s in shapes if s in self.by_alias), None)

    def _base(self, key: str) -> Entry | None:
        """Tensors of the base model: biases and embeddings, and whatever else was stored on purpose. Never those of
        another adapter.
        """
        held = resolve(self.model, key)
        if held is None or self._foreign(key):
            return None
        return Entry(key, key, held[0], held[1], None, "base")

    def _foreign(self, key: str) -> bool:
        others = set(getattr(self.model, "peft_config", ())) - {self.name}
        return any(part in others for part in key.split("."))


def _hints(unexpected: list[str], entries: list[Entry], limit: int = 3) -> dict[str, str]:
    """Nearest valid keys of the first few unexpected ones; candidates are narrowed down first, comparing is slow."""
    hints: dict[str, str] = {}
    valid = {e.file.lower(): e.file for e in reversed(entries)}
    for key in unexpected[:limit]:
        tail = {part for part in key.lower().split(".")[-3:] if not part.isdigit() and part != "weight"}
        near = [v for v in valid if any(part in v for part in tail)][:200] or list(valid)[:200]
        if found := difflib.get_close_matches(key.lower(), near, n=1, cutoff=0.6):
            hints[key] = valid[found[0]]
    return hints


# ---- writing


@torch.no_grad()
def _assign(copies: list[tuple[Entry, torch.Tensor]], name: str, low_cpu: bool) -> None:
    replaced: dict[int, torch.Tensor] = {}
    homes: dict[int, torch.device | None] = {}  # by layer
    lost: list[str] = []
    for entry, value in copies:
        tensor = entry.owner._parameters.get(entry.attr)
        if tensor is None:
            tensor = entry.owner._buffers[entry.attr]
        assert tensor is not None
        if tensor.device.type != "meta":
            _copy(tensor, value)
        elif entry.layer is None and is_offloaded(entry.owner):
            with onload_layer(entry.owner):
                _copy(entry.owner.get_parameter(entry.attr), value)
        elif low_cpu:
            layer = entry.layer
            if layer is not None and id(layer) not in homes:
                homes[id(layer)] = layer.home()
                layer.__dict__["_seen"] = None  # its plan may depend on devices and dtypes
            new = replaced.get(id(tensor))
            if new is None:
                new = replaced[id(tensor)] = _materialise(tensor, value, homes.get(id(layer)))
            held = entry.owner._parameters if entry.attr in entry.owner._parameters else entry.owner._buffers
            held[entry.attr] = new  # type: ignore[assignment]
        else:
            lost.append(entry.memory)
    if lost:
        warnings.warn(
            f"Adapter weights on the meta device were not loaded, they have no storage: {_some(lost, 3)}. Pass "
            "`low_cpu_mem_usage=True` to "
            "replace them by the loaded tensors.",
            stacklevel=5,
        )


def _copy(tensor: torch.Tensor, value: torch.Tensor) -> None:
    if hasattr(tensor, "device_mesh") and not hasattr(value, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]
    if hasattr(tensor, "ds_id"):
        with gathered([tensor]):
            tensor.data.copy_(value)
        return
    tensor.copy_(value)


def _materialise(tensor: torch.Tensor, value: torch.Tensor, home: torch.device | None) -> torch.Tensor:
    """A real tensor in place of one on meta, in the dtype the parameter was made with."""
    new = value.detach()
    device = new.device if home is None or home.type == "meta" else home
    if tensor.dtype != new.dtype or device != new.device:
        new = new.to(device, tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(new, requires_grad=tensor.requires_grad)
    return new
