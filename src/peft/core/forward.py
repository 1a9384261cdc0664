# SPDX-License-Identifier: Apache-2.0
"""Forward paths of an adapter layer; the choice is made here, by predicate, never in a method.

- activation path: call the base layer, add deltas, apply maps. Always valid, keeps quantised kernels and hooks.
- factored path: low-rank deltas, fused with a plain dense base into one operator (`ops/low_rank.py`).
- weight path: one product with the changed weight, for dense deltas and for methods that only map weights.
- substitution path: call the base module with replaced tensors, for attention modules and raw parameters.
- replacement: another module instead of the base layer.
"""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import low_rank, mixed
from ..ops.dropout import drop
from ..storage.dtensor import Split, is_sharded
from . import kinds
from .modules import dropout_p
from .offload import loaded


class ForwardPaths:
    """The forward half of AdapterLayer."""

    _rows_path: tuple[tuple[str, ...], str] | None = None
    _split: Split | None = None  # tensor parallelism: how the activations of this layer are spread over processes

    def _replan(self: Any, key: tuple[tuple[str, ...], bool]) -> None:
        self._plan = self._active_here(key)
        self._path = self._choose_path(self._plan)
        self._seen, self._rows_path = key, None
        self._find_split()

    def _find_split(self: Any) -> None:
        weight = getattr(self.get_base_layer(), self.kind.weight_name, None) if self.kind.is_linear else None
        split = Split(weight, self.in_features, self.out_features) if is_sharded(weight) else None
        if split is not self._split:  # torch.compile guards on an attribute that appears
            self._split = split

    def _active_here(self: Any, key: tuple[tuple[str, ...], bool]) -> tuple[str, ...]:
        """Active adapters that this layer holds."""
        names, disabled = key
        plan = () if disabled or self.merged_adapters else tuple(n for n in names if n in self._names)
        if (self.one_active or "replace" in self.hooks) and len(plan) > 1:
            raise ValueError(f"{self.method_name} supports only one active adapter per layer, got {list(plan)}.")
        self.check_together(plan)
        return plan

    def _planned(self: Any) -> tuple[str, ...]:
        """The plan for the current setting. torch.compile works it out while tracing and guards on what that reads, so
        that switching back finds the old graph; what a layer remembers would be one more thing to guard on.
        """
        key = self._local or self.switch.key
        if torch.compiler.is_compiling():
            if self._split is None:  # compiled before the first run
                self._find_split()
            return self._active_here(key)
        if key != self._seen:
            self._replan(key)
        return self._plan

    def _path_of(self: Any, names: tuple[str, ...]) -> str:
        return self._choose_path(names) if torch.compiler.is_compiling() else self._path

    def _path_of_rows(self: Any, names: tuple[str, ...]) -> str:
        """The path of a mixed batch, remembered until the layer changes or other adapters come."""
        if torch.compiler.is_compiling():
            return self._choose_path(names)
        if self._rows_path is None or self._rows_path[0] != names:
            self._rows_path = (names, self._choose_path(names))
        return self._rows_path[1]

    def _choose_path(self: Any, names: tuple[str, ...]) -> str:
        if "replace" in self.hooks:
            return "replace"
        if self.kind.substituted:
            return "substitution"
        activation_hooks = {"delta", "map_input", "map_output"}
        if "map_weight" in self.hooks and (
            not self.hooks & activation_hooks or (self.conv_by_weight and self.kind.is_conv)
        ):
            return "weight"
        if self.factored and not self.hooks & activation_hooks:
            return "factored"
        return "prefer_weight" if self.prefer_weight_path else "activation"

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        plan, call = self._planned(), self.switch.call
        # of merged adapters: rows of a call before, since `check_adapter_names` refuses new ones
        rows = call.adapter_names is not None and not self._key[1] and not self.merged_adapters
        if self._split is not None and not self._split.inside and (plan or rows):
            return self._forward_split(plan, x, rows, *args, **kwargs)
        if rows:
            return self._forward_rows(x, *args, **kwargs)
        if plan:
            if call.gates is not None:
                return call.gates.forward(self, plan, x, *args, **kwargs)
            return self._adapt(plan, x, *args, **kwargs)
        if self.merged_adapters and self._key[1]:
            self.unmerge()
        return self.base_layer(x, *args, **kwargs)

    def _forward_split(
        self: Any, plan: tuple[str, ...], x: torch.Tensor, rows: bool, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Adapters get whole activations and give whole ones, the layers around this one get parts. Low-rank deltas do
        with less: only what is as wide as the rank crosses processes.
        """
        split = self._split
        if rows or self.switch.call.gates is not None or self._path_of(plan) != "factored":
            x = split.take(x)
            split.learn(self.base_layer, x)
            with split.entered():
                return split.give(self.forward(x, *args, **kwargs))
        y = out = self.storage.guard(self.base_layer(x, *args, **kwargs))
        parts_in, parts_out = x.shape[-1] != self.in_features, y.shape[-1] != self.out_features
        for A, B, scale, p in (self.factors(n) for n in plan):
            h = drop(x.to(A.dtype), p if self.training else 0.0)
            z = split.summed(F.linear(h, split.part(A, 1))) if parts_in else F.linear(h, A)
            z = z * scale
            out = out + (F.linear(split.shared(z), split.part(B, 0)) if parts_out else F.linear(z, B))
        return out.to(y.dtype)

    def _base_output(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the base layer makes of `x`, safe to add to; whole also where its activations come in parts."""
        split = self._split
        base = self.base_layer
        y = base(x, *args, **kwargs) if split is None else split.call(base, x, *args, **kwargs)
        return self.storage.guard(y)

    def _adapt(self: Any, names: tuple[str, ...], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        path = self._path_of(names)
        if path == "factored":
            return self._adapt_factored(names, x, *args, **kwargs)
        if path == "activation":
            return self._adapt_activations(names, x, *args, **kwargs)
        if path == "fused":
            return self.fused(names, x, *args, **kwargs)
        if path == "replace":
            return self.replace(names[0])(x, *args, **kwargs)  # type: ignore[misc]
        if path == "substitution":
            return self._adapt_substituted(names, x, *args, **kwargs)
        if path == "weight" or self._weight_path_pays(names):
            return self._adapt_weight(names, x)
        return self._adapt_activations(names, x, *args, **kwargs)

    def _adapt_factored(self: Any, names: tuple[str, ...], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Low-rank deltas: one fused operator over a plain dense base, otherwise accumulated onto the base output."""
        factors = (self.factors(names[0]),) if len(names) == 1 else tuple(self.factors(n) for n in names)
        base = self._modules["base_layer"]
        if self.kind is kinds.Linear and self._base_is_plain(base) and self.cast_input_dtype_enabled:
            return low_rank.linear(x, base.weight, base.bias, factors, self.training)  # type: ignore[arg-type]
        y = self._base_output(x, *args, **kwargs)
        return low_rank.accumulate(y, x, factors, self.training)

    def _adapt_activations(
        self: Any, names: tuple[str, ...], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        hooks, h = self.hooks, x
        if "map_input" in hooks:
            for n in reversed(names):
                h = self.map_input(n, self._cast_input(n, h))
            h = h.to(x.dtype) if h.is_floating_point() else h
        y = base = self._base_output(h, *args, **kwargs)
        if hooks & {"delta", "delta_weight", "factors", "delta_bias"}:
            for n in names:
                y = self.advance(n, self._cast_input(n, h), y, base)
        if "map_output" in hooks:
            for n in names:
                y = self.map_output(n, y, x)
        return y.to(base.dtype)

    def _adapt_weight(self: Any, names: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
        base = self.get_base_layer()
        weight, bias = self.base_weight(), self.base_bias()
        dtype = weight.dtype
        for n in names:
            weight, bias = self._applied(n, weight, bias)
        return self.kind.call(base, x, weight.to(dtype), None if bias is None else bias.to(dtype))

    def _adapt_substituted(self: Any, names: tuple[str, ...], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        base = self.get_base_layer()
        with loaded(base):
            return torch.func.functional_call(base, self.replaced_tensors(names), (x, *args), kwargs)

    def replaced_tensors(self: Any, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Tensors (by name in the base module) to call it with."""
        weight = self.base_weight()
        for n in names:
            weight, _ = self._applied(n, weight, None)
        weight = self._to_storage(weight).to(self.kind.parameter(self.get_base_layer()).dtype)
        return {self.kind.weight_name: weight}

    def fused(self: Any, names: tuple[str, ...], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Base product and adapters in one operator of the method's own, chosen by `_choose_path`."""
        raise NotImplementedError(f"{type(self).__name__} has no fused path")

    def _base_is_plain(self: Any, base: nn.Module) -> bool:
        """Exact type, unhooked, with ordinary parameters: then calling the module and using its weight are the same."""
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        if type(base) not in self.kind.plain_types or hooked or "forward" in base.__dict__:
            return False
        return type(self.kind.parameter(base)) in (nn.Parameter, torch.Tensor)

    def _weight_path_pays(self: Any, names: tuple[str, ...]) -> bool:
        """Only in full precision: rounding W + delta to half precision would lose small deltas."""
        if not self._base_is_plain(self.base_layer):
            return False
        weight = self.kind.parameter(self.base_layer)
        exact = weight.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(weight.device.type)
        return exact and self.weight_path_allowed(names)

    def weight_path_allowed(self: Any, names: tuple[str, ...]) -> bool:
        """False while the method must see activations: dropout in training, or what a method adds."""
        live = [self._modules[s] for s in self.dropout_slots] if self.training else ()
        return not any(dropout_p(held[n]) > 0 for held in live for n in names if n in held)

    def adapter_dtype(self: Any, name: str) -> torch.dtype | None:
        for parameter in self.parameters_of(name):  # not next(): torch 2.6 cannot trace it
            return parameter.dtype
        return None

    def _cast_input(self: Any, name: str, x: torch.Tensor) -> torch.Tensor:
        if not (self.casts_input and self.cast_input_dtype_enabled and self.kind.float_input):
            return x
        dtype = self.adapter_dtype(name)
        return x if dtype is None or x.dtype == dtype else x.to(dtype)

    def _forward_rows(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Mixed batch: rows use different adapters ("__base__": none); base rows are computed once where possible."""
        call = self.switch.call
        if len(call.adapter_names or ()) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(call.adapter_names or ())} and {len(x)} respectively."
            )
        rows = {n: i for n, i in call.row_index(x.device).items() if n in self._names}
        y = self._base_output(x, *args, **kwargs)
        if not rows:
            return y
        path = self._path_of_rows(tuple(rows))
        if path == "factored" and not self.training:
            factors = self.factors_of(tuple(rows))
            if mixed.pays(x, y, factors):
                return self._gathered_rows(y, x, rows, factors)
        if path in ("factored", "fused") or (
            path in ("activation", "prefer_weight") and not self.hooks & {"map_input", "map_output"}
        ):
            put, y = (torch.Tensor.index_copy, y) if torch.is_grad_enabled() else (torch.Tensor.index_copy_, y.clone())
            try:
                for name, index in rows.items():
                    call.part, base = index, y[index]
                    part = self.advance(name, self._cast_input(name, x[index]), base, base)
                    y = put(y, 0, index, part.to(y.dtype))
            finally:
                call.part = None
            return y
        if not isinstance(y, torch.Tensor):
            raise TypeError(
                f"Mixed batches are not possible on {type(self.get_base_layer()).__name__} layers, whose output is "
                "not a tensor."
            )
        nested = isinstance(self.base_layer, ForwardPaths)
        for name, index in rows.items():
            with call.only(name, len(index)) if nested else contextlib.nullcontext():
                y = y.index_copy(0, index, self._adapt((name,), x[index], *args, **kwargs))
        return y

    def factors_of(self: Any, names: tuple[str, ...]) -> list[low_rank.Factors]:
        return [self.factors(n) for n in names]

    def _gathered_rows(
        self: Any, y: torch.Tensor, x: torch.Tensor, rows: dict[str, torch.Tensor], factors: list[low_rank.Factors]
    ) -> torch.Tensor:
        """Low-rank adapters of all rows at once."""
        own, names = dict(zip(rows, factors, strict=True)), self.switch.call.adapter_names
        if all(n in own for n in names):
            return mixed.accumulate(y, x, [own[n] for n in names])
        every = [own[n] for n, index in rows.items() for _ in range(len(index))]
        return mixed.accumulate(y, x, every, torch.cat(list(rows.values())))
