# SPDX-License-Identifier: Apache-2.0
"""The library's adapter layers around single weights of a model folder: what `peft merge` computes with."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .adapter_files import PREFIX, Adapter
from .errors import CliError
from .tensor_files import Base, Pieces

_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
ADVICE = "load the model and use `merge_and_unload`, if the method merges at all"
# Options of the adapter that are settled by its file, or handled here.
_SETTLED: dict[str, Any] = {
    "task_type": None, "modules_to_save": None, "trainable_token_indices": None, "bias": "none",
    "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "fan_in_fan_out": False,
    "ensure_weight_tying": False,
}  # fmt: skip


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
        self.whole = record.name in ("lora", "ia3") or record.tuner.uses_shared_state or bool(record.layer.shared_slots)

    @functools.cached_property
    def _skeleton(self) -> nn.Module:
        return self._load({module: self._bare(module) for module in self.entries})

    def layer(self, module: str) -> Any:
        root = self._skeleton if self.whole else self._load({module: self._bare(module, self._read(module))})
        return root.get_submodule(module)

    def _read(self, module: str) -> torch.Tensor:
        """The weight, canonical [out, in] for linear layers, in the type that merging computes in."""
        entry = self.entries[module]
        value = entry.tensor().to(entry.work_dtype)
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
            weight = torch.zeros((), dtype=entry.work_dtype).expand(shape)
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
        tensors = {
            key: tensor
            for key, tensor in self.adapter.tensors.items()
            if self.plan.owners.get(key) in modules or key.removeprefix(PREFIX).startswith("base_model.")
        }
        with self._explained(next(iter(modules))), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            on_meta = self.adapter.method == "lora"  # all of it is in the file: nothing has to be drawn or computed
            model = PeftModel(root, config, low_cpu_mem_usage=on_meta).eval()
            report = load_adapter_state(model, tensors, "default", low_cpu_mem_usage=on_meta)
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
            yield
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            text = " ".join(str(error).split())
            hint = "shapes that do not fit; is this the right base model?" if "size mismatch" in text else ADVICE
            raise CliError(f"{self.adapter.folder}: {module}: {text} ({hint})") from error

    @torch.no_grad()
    def whole_weight(self, module: str) -> torch.Tensor:
        """The merged weight as it is stored, in the type of the computation; the new bias is kept for later."""
        layer = self.layer(module)
        base = layer.get_base_layer()
        if self.whole:
            base.weight.data = self._read(module)
        with self._explained(module), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.merge(keep=False)
        merged = layer.get_base_layer()
        weight, bias = merged.weight.detach(), getattr(merged, "bias", None)
        if bias is not None:
            self.biases[module] = bias.detach().clone()
        if self.whole:  # back to a stand-in
            merged.weight.data = weight.new_zeros(()).expand(weight.shape)
        return weight.T if self._transposed(module) else weight

    def new_bias(self, module: str) -> torch.Tensor:
        if module not in self.biases:
            self._rows(module)
        if module not in self.biases:
            self.whole_weight(module)
        return self.biases[module]

    def pieces(self, module: str) -> Pieces:
        """The merged weight as row blocks."""
        entry = self.entries[module]
        dtype, blocks = entry.dtype, entry.spans()

        def pieces() -> Iterable[torch.Tensor]:
            rows = self._rows(module)
            if rows is None:
                yield self.whole_weight(module).to(dtype)
            else:
                yield from (rows(*block).to(dtype) for block in blocks)

        return pieces

    @torch.no_grad()
    def _rows(self, module: str) -> Callable[[int, int], torch.Tensor] | None:
        """Rows [begin, end) of the merged weight, as it is stored; None where they cannot be had alone. A bias that
        changes with them is kept for later.
        """
        entry = self.entries[module]
        if self.adapter.method == "ia3":
            layer, bias = self.layer(module), self._bias(module)
            scale = layer.weight_scale("default", layer.get_base_layer().weight)
            scale = scale.T if self._transposed(module) else scale
            if bias is not None:
                self.biases[module] = layer.map_bias("default", bias)
            return lambda begin, end: (
                entry.rows(begin, end).to(scale.dtype) * (scale[begin:end] if len(scale) > 1 else scale)
            )
        factors = self._plain_factors(module)
        if factors is None:
            return None
        left, right, m = factors

        def changed(begin: int, end: int) -> torch.Tensor:
            return entry.rows(begin, end).to(left.dtype).flatten(1).addmm_(left[begin:end], right)

        if m is None:
            return changed
        if self._transposed(module):  # DoRA: m (W + s B A) / |W + s B A|, norms over the inputs
            squares = sum(changed(*block).double().square().sum(0) for block in entry.spans())
            scale = (m / squares.sqrt()).to(left.dtype)  # type: ignore[union-attr]
            return lambda begin, end: changed(begin, end) * scale

        def scaled(begin: int, end: int) -> torch.Tensor:
            rows = changed(begin, end)
            return rows * (m[begin:end] / rows.norm(dim=1))[:, None]

        return scaled

    @torch.no_grad()
    def _plain_factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        """L [rows, r] and R [r, columns] whose product is added to the stored weight, and DoRA's magnitudes [out];
        None where the change is not of that form.
        """
        if not self.whole:
            return None
        layer = self.layer(module)
        dora = self.adapter.config.get("use_dora") and layer.kind.is_linear
        if "factors" not in layer.hooks or not (dora or layer.additive("default")):
            return None
        bias, old = layer.delta_bias("default"), self._bias(module)
        with self._explained(module):
            layer.check_merge("default")
            layer._check_bias(layer.get_base_layer(), bias)
        factors = layer.plain_factors("default") if dora else layer.factors("default")
        if factors is None:
            return None
        work = self.entries[module].work_dtype
        A, B = factors.A.to(work).flatten(1), factors.B.to(work).flatten(1) * factors.scale
        if B.shape[1] != A.shape[0]:
            return None
        if bias is not None and old is not None:
            self.biases[module] = old + bias
        m = layer.lora_magnitude_vector["default"].weight.to(work).flatten() if dora else None
        return (A.T, B.T, m) if layer.kind.transposed or self._transposed(module) else (B, A, m)
