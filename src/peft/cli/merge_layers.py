# SPDX-License-Identifier: Apache-2.0
"""The library's adapter layers around single weights of a model folder: what `peft merge` computes with."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .adapter_files import PREFIX, Adapter
from .errors import CliError
from .tensor_files import BLOCK_ELEMENTS, Base, Pieces

_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
ADVICE = "load the model and use `merge_and_unload`, if the method merges at all"
# Options of the adapter that are settled by its file, or handled here.
_SETTLED: dict[str, Any] = {
    "task_type": None, "modules_to_save": None, "trainable_token_indices": None, "bias": "none",
    "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "fan_in_fan_out": False,
    "ensure_weight_tying": False,
}  # fmt: skip
# Methods whose `map_weight` treats each row alone.
_ROWS_APART = ("hra", "oft")

Rows = Callable[[int, int], torch.Tensor]


@dataclass
class Plan:
    """What happens to which tensor of the base; `merged` and `biases` name the module that the adapter changes."""

    owners: dict[str, str] = field(default_factory=dict)  # tensor of the adapter -> module
    merged: dict[str, str] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    added: dict[str, torch.Tensor] = field(default_factory=dict)
    token_rows: dict[str, tuple[list[int], torch.Tensor]] = field(default_factory=dict)


def is_embedding(module: str, adapter: Adapter) -> bool:
    named = f"{PREFIX}{module}.lora_embedding_A" in adapter.tensors
    return named or bool(re.search(r"(embed\w*|wte|wpe|shared)$", module))


class Merger:
    """The adapter's layers on modules made from the shapes of the base's weights."""

    def __init__(self, adapter: Adapter, base: Base, plan: Plan):
        self.adapter, self.base, self.plan = adapter, base, plan
        self.entries = {module: base.places[weight] for weight, module in plan.merged.items()}
        self.biases: dict[str, torch.Tensor] = {}
        record = adapter.record
        # These read no base weight when they are made: one skeleton of weights without memory serves all modules.
        self.whole = not record.layer.weight_need or record.tuner.uses_shared_state or bool(record.layer.shared_slots)

    @functools.cached_property
    def _skeleton(self) -> nn.Module:
        return self._load({module: self._bare(module) for module in self.entries})

    def layer(self, module: str) -> Any:
        root = self._skeleton if self.whole else self._load({module: self._bare(module, self._read(module))})
        return root.get_submodule(module)

    def _read(self, module: str) -> torch.Tensor:
        """The weight, canonical [out, in] for linear layers, in the type that merging computes in."""
        entry = self.entries[module]
        value = torch.empty(entry.shape, dtype=entry.work_dtype)
        for begin, end in entry.spans():
            value[begin:end] = entry.rows(begin, end)
        return value.T if self._transposed(module) else value

    def _transposed(self, module: str) -> bool:
        """Linear weights stored [in, out] (Conv1D): LoRA's shapes say so, else the configurations."""
        shape, adapter = self.entries[module].shape, self.adapter
        if len(shape) != 2 or is_embedding(module, adapter):
            return False
        A, B = (adapter.tensors.get(f"{PREFIX}{module}.lora_{x}.weight") for x in "AB")
        if A is not None and B is not None and (B.shape[0], A.shape[-1]) != shape:
            return (A.shape[-1], B.shape[0]) == shape
        return bool(adapter.config.get("fan_in_fan_out")) or self.base.config.get("model_type") in _CONV1D_MODELS

    def _bare(self, module: str, weight: torch.Tensor | None = None) -> nn.Module:
        entry = self.entries[module]
        if weight is None:
            shape = entry.shape[::-1] if self._transposed(module) else entry.shape
            weight = torch.tensor(math.nan, dtype=entry.work_dtype).expand(shape)
        bias, (out, *rest) = self._bias(module), weight.shape
        has_bias = bias is not None
        with torch.device("meta"):
            if not rest:
                made: nn.Module = nn.LayerNorm(out, bias=has_bias)
            elif len(rest) > 1:
                conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(rest) - 2]
                made = conv(rest[0], out, tuple(rest[1:]), bias=has_bias)  # type: ignore[arg-type]
            elif is_embedding(module, self.adapter):
                made = nn.Embedding(out, rest[0])
            else:
                made = nn.Linear(rest[0], out, bias=has_bias)
        made.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            made.bias = nn.Parameter(bias, requires_grad=False)
        return made

    def _bias(self, module: str) -> torch.Tensor | None:
        name = self.base.find(module + ".bias")
        if name is None:
            return None
        value = self.plan.replaced.get(name)
        return (self.base.places[name].tensor() if value is None else value).to(self.entries[module].work_dtype)

    def _load(self, modules: dict[str, nn.Module]) -> nn.Module:
        from peft import PeftModel
        from peft.io.files import Tensors
        from peft.io.state_dict import load_adapter_state

        root = nn.Module()
        for name, module in modules.items():
            parent: Any = root
            *path, leaf = name.split(".")
            for part in path:
                parent = parent._modules.setdefault(part, nn.Module())
            parent.add_module(leaf, module)
        config = copy.copy(self.adapter.peft_config)
        for option, value in (_SETTLED | {"target_modules": set(modules)}).items():
            if hasattr(config, option):
                setattr(config, option, value)
        kept = {
            key: tensor
            for key, tensor in self.adapter.tensors.items()
            if self.plan.owners.get(key) in modules or key.removeprefix(PREFIX).startswith("base_model.")
        }
        tensors = Tensors(kept, self.adapter.tensors.metadata)
        with self._explained(next(iter(modules))):
            model = PeftModel(root, config, low_cpu_mem_usage=True).eval()  # what is in the file need not be drawn
            report = load_adapter_state(model, tensors, "default", low_cpu_mem_usage=True)
        shared = getattr(model.base_model, "shared_containers", dict)()
        missing = [k for k in report.missing if not any(f"{s}.default" in k for s in shared)]
        if missing:
            raise CliError(f"{self.adapter.folder}: the file lacks {missing[0].replace('.default', '')}")
        if report.unexpected:
            raise CliError(f"{self.adapter.folder}: its configuration has no place for {report.unexpected[0]}")
        return root

    @contextlib.contextmanager
    def _explained(self, module: str) -> Iterator[None]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            text = " ".join(str(error).split())
            hint = "shapes that do not fit; is this the right base model?" if "size mismatch" in text else ADVICE
            raise CliError(f"{self.adapter.folder}: {module}: {text} ({hint})") from error

    def new_bias(self, module: str) -> torch.Tensor:
        if module not in self.biases:
            with self._explained(module):
                self._rows(module)
        return self.biases[module]

    def pieces(self, module: str) -> Pieces:
        """The merged weight as row blocks."""
        entry = self.entries[module]

        @torch.no_grad()
        def pieces() -> Iterable[torch.Tensor]:
            with self._explained(module):
                rows = self._rows(module)
            yield from (rows(*block).to(entry.dtype) for block in entry.spans())

        return pieces

    @torch.no_grad()
    def _rows(self, module: str) -> Rows:
        """Rows [begin, end) of the merged weight, as it is stored. A bias that changes with them is kept for later."""
        entry, layer, transposed = self.entries[module], self.layer(module), self._transposed(module)

        def read(begin: int, end: int) -> torch.Tensor:
            return entry.rows(begin, end).to(entry.work_dtype)

        if self.adapter.method == "ia3":
            scale = layer.weight_scale("default", layer.get_base_layer().weight)
            scale = scale.T if transposed else scale
            if (bias := self._bias(module)) is not None:
                self.biases[module] = layer.map_bias("default", bias)
            return lambda begin, end: read(begin, end) * (scale[begin:end] if len(scale) > 1 else scale)
        if self.adapter.method in _ROWS_APART and not transposed:
            swap = layer.kind.stored  # as stored <-> canonical
            return lambda begin, end: swap(layer.map_weight("default", swap(read(begin, end))))
        rows = self._added(module, layer, read)
        if rows is None:
            whole = self._whole(module, layer)
            return lambda begin, end: whole[begin:end]
        return rows

    def _added(self, module: str, layer: Any, read: Rows) -> Rows | None:
        """The rows where merging adds to the weight, or scales it after that (DoRA); None elsewhere."""
        dora = bool(self.adapter.config.get("use_dora")) and layer.kind.is_linear
        if not (dora or layer.additive("default")) or "replace" in layer.hooks:
            return None
        bias, old = layer.delta_bias("default"), self._bias(module)
        layer.check_merge("default")
        layer._check_bias(layer.get_base_layer(), bias)
        if bias is not None and old is not None:
            self.biases[module] = old + bias
        factors = self._factors(module, layer, dora)
        if factors is None:
            return None if dora else self._plus_delta(module, layer, read)
        left, right = factors

        def changed(begin: int, end: int) -> torch.Tensor:
            return read(begin, end).flatten(1).addmm_(left[begin:end], right)

        if not dora:
            return changed
        m = layer.lora_magnitude_vector["default"].weight.to(left.dtype).flatten()
        if self._transposed(module):  # m (W + s B A) / |W + s B A|, norms over the inputs
            squares = sum(changed(*block).double().square().sum(0) for block in self.entries[module].spans())
            scale = (m / squares.sqrt()).to(left.dtype)  # type: ignore[union-attr]
            return lambda begin, end: changed(begin, end) * scale

        def scaled(begin: int, end: int) -> torch.Tensor:
            rows = changed(begin, end)
            return rows * (m[begin:end] / rows.norm(dim=1))[:, None]

        return scaled

    def _factors(self, module: str, layer: Any, plain: bool) -> tuple[torch.Tensor, torch.Tensor] | None:
        """L [rows, r] and R [r, columns] whose product is added to the stored weight; None where it is no product."""
        if not (layer.factored or self.adapter.method == "lora"):
            return None
        A, B, scale, _ = layer.plain_factors("default") if plain else layer.factors("default")
        entry = self.entries[module]
        A, B = A.to(entry.work_dtype).flatten(1), B.to(entry.work_dtype).flatten(1) * scale
        left, right = (A.T, B.T) if layer.kind.transposed or self._transposed(module) else (B, A)
        fits = B.shape[1] == len(A) and len(B) * A.shape[1] == math.prod(entry.shape)
        return (left, right) if fits and self._real(left, right) else None

    def _plus_delta(self, module: str, layer: Any, read: Rows) -> Rows | None:
        delta = layer._weight_delta("default")
        if delta is None:
            return read
        if not self._real(delta):
            return None
        delta = layer.kind.stored(delta)
        delta = delta.T if self._transposed(module) else delta
        return lambda begin, end: read(begin, end) + delta[begin:end]

    def _real(self, *tensors: torch.Tensor) -> bool:
        """Whether they were computed without the stand-in for the weight, which is not a number."""
        return not self.whole or all(bool(tensor.sum().isfinite()) for tensor in tensors)

    def _whole(self, module: str, layer: Any) -> torch.Tensor:
        """The merged weight as it is stored, in the type of the computation; the new bias is kept for later."""
        base, bias = layer.get_base_layer(), self._bias(module)
        stand_in = base.weight.data
        if self.whole:
            base.weight.data = self._read(module)
        layer.check_merge("default")
        if "replace" in layer.hooks:
            replaced: Any = layer.replace("default")
            weight, bias = replaced.weight, getattr(replaced, "bias", None)
        elif self.adapter.method == "road":  # it treats each column alone
            weight, bias = base.weight.detach(), None if bias is None else layer.map_bias("default", bias)
            for part in weight.split(max(1, BLOCK_ELEMENTS // len(weight)), 1):
                part.copy_(layer.map_weight("default", part))
        else:
            weight, bias = layer._applied("default", layer.kind.canonical(base.weight), bias)
            weight = layer.kind.stored(weight)
        if bias is not None:
            self.biases[module] = bias
        base.weight.data = stand_in
        return weight.T if self._transposed(module) else weight
