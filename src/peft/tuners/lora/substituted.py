# SPDX-License-Identifier: Apache-2.0
"""LoRA on layers that are called with replaced tensors: attention modules and raw parameters."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.stateless import _reparametrize_module

from ...core import kinds
from ...core.context import Switch
from ...core.kinds import LayerKind
from ...core.offload import loaded
from ...ops import experts
from ...ops.low_rank import Factors
from .layer import LoraLayer

# Published adapters for nn.MultiheadAttention were trained (and are merged) with the delta of out_proj added this
# often, while gradients count it once.
OUT_PROJ_COUNT = 2


class OutProjection(LoraLayer.by_kind["Linear"], _of_kind=True):
    """out_proj of an attention module. It is never called: the attention module reads its weight."""

    def delta_weight(self, name: str) -> torch.Tensor:
        delta = super().delta_weight(name)
        return delta + (OUT_PROJ_COUNT - 1) * delta.detach()

    def _get_name(self) -> str:
        return f"{self.method_name}.Linear"


class MultiheadAttention(LoraLayer, _of_kind=True):
    """The packed in_proj as weight; out_proj becomes a LoRA layer inside the base layer."""

    def create(self, name: str, cfg: Any) -> None:
        inner = self._inner()
        if inner is None:
            base = self.get_base_layer()
            inner = OutProjection(base.out_proj, kind=kinds.Linear, switch=self.switch)  # type: ignore[arg-type]
            base.out_proj = inner  # type: ignore[assignment]
            inner.update_layer(name, cfg)  # these draws are made again below; they belong to the published sequence
        inner.__class__ = OutProjection  # type: ignore  # it may have been adapted as a plain linear layer before
        super().create(name, cfg)
        inner.update_layer(name, cfg)

    def _inner(self) -> LoraLayer | None:
        inner = self.get_base_layer().out_proj
        return inner if isinstance(inner, LoraLayer) else None

    def drop(self, name: str) -> None:
        super().drop(name)
        inner = self._inner()
        if inner is not None and name in inner:
            inner.drop(name)

    def replaced_tensors(self, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        found = super().replaced_tensors(names)
        inner = self._inner()
        active = () if inner is None else inner._active_here((names, False))
        if inner is not None and active:
            weight = inner.base_weight()
            dtype = weight.dtype
            for n in active:
                weight = weight + inner.delta_weight(n)
            found["out_proj.base_layer.weight"] = weight.to(dtype)
            bias = total = inner.base_bias()
            for n in active:
                added = inner.delta_bias(n)
                if total is not None and added is not None:
                    total = total + added
            if bias is not None and total is not None:
                found["out_proj.base_layer.bias"] = total.to(bias.dtype)
        return found

    def delta_bias(self, name: str) -> torch.Tensor | None:
        return None


class ParamWrapper(LoraLayer, _of_kind=True):
    """A raw parameter of a module: W [out, in], or experts [E, out, in] ([E, in, out] when the module says
    `is_transposed`).

    Experts: A [E·r, in] with the expert as the slow index, B [out, r·E] with it as the fast one. Dropout acts on the
    input of A, with one mask for all tokens, since the module's own forward multiplies them with the weight.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str | None = None,
        parameter_name: str | None = None,
        config: Any = None,
        *,
        kind: type[LayerKind] | None = None,
        switch: Switch | None = None,
        **overrides: Any,
    ):
        if kind is None:
            kind = kinds.parameter_kind(parameter_name or "weight")
        super().__init__(base_layer, adapter_name, config, kind=kind, switch=switch, **overrides)

    @property
    def parameter_name(self) -> str:
        return self.kind.weight_name

    def get_param(self) -> nn.Parameter:
        return self.kind.parameter(self.get_base_layer())  # type: ignore[return-value]

    @property
    def num_experts(self) -> int:
        shape = self.kind.shape(self.get_base_layer())
        return shape[0] if len(shape) == 3 else 1

    def allocate(self, name: str, cfg: Any) -> None:
        r = cfg.r * self.num_experts
        self.lora_A[name] = kinds.linear(self.in_features, r)
        self.lora_B[name] = kinds.linear(r, self.out_features, cfg.lora_bias)

    def product(self, f: Factors) -> torch.Tensor:
        """s·B A in the orientation of the parameter."""
        shape = self.kind.shape(self.get_base_layer())
        if len(shape) == 2:
            return super().product(f)
        A, B = f.A, f.B
        E, n_out, n_in = shape
        half = A.dtype in (torch.float16, torch.bfloat16) and A.device.type == "cpu"
        dtype = A.dtype
        A, B = (A.float(), B.float()) if half else (A, B)
        A, B = A.reshape(E, -1, n_in), B.reshape(n_out, -1, E).permute(2, 0, 1)  # [E, r, in], [E, out, r]
        A = A * f.scale
        weight = A.transpose(1, 2) @ B.transpose(1, 2) if self.kind.swapped(self.get_base_layer()) else B @ A  # type: ignore[attr-defined]
        return weight.to(dtype)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What the adapter adds to the parameter, differentiable. Forward and merging add what a replacement of this
        method gives.
        """
        return self.delta_weight(adapter)

    def _weight_delta(self, name: str) -> torch.Tensor:
        return self.get_delta_weight(name)

    def substituted_weight(self, names: tuple[str, ...]) -> torch.Tensor:
        """The parameter with adapters: dense, or with low-rank additions where the module can use those."""
        base, weight = self.get_base_layer(), self.base_weight()
        dtype = weight.dtype
        if getattr(self.get_delta_weight, "__func__", None) is _DELTA:
            factors = [self._masked(self.factors(n)) for n in names]
            if factors and dtype.itemsize > 1 and experts.allowed(base, weight, *(t for f in factors for t in f[:2])):
                E, swapped = self.num_experts, self.kind.swapped(base)  # type: ignore[attr-defined]
                return experts.LowRankWeight(weight, [experts.added(*f[:3], E, swapped) for f in factors])
            deltas = map(self.product, factors)
        else:
            deltas = map(self.get_delta_weight, names)
        for delta in deltas:
            weight = (weight.to(delta.dtype) if dtype.itemsize == 1 else weight) + delta  # float8 has no arithmetic
        if dtype.itemsize == 1:
            weight = weight.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
        return weight.to(dtype)

    def _masked(self, f: Factors) -> Factors:
        """Dropout on the input of A, the same for all tokens."""
        return f._replace(A=f.A * nn.functional.dropout(torch.ones_like(f.A[0]), f.dropout)) if f.dropout > 0.0 else f

    def _current_weight(self) -> torch.Tensor:
        found = self.get_param()
        return super()._current_weight() if found is self.kind.parameter(self.get_base_layer()) else found

    def delta_bias(self, name: str) -> torch.Tensor | None:
        return None

    def _adapt_substituted(self, names: tuple[str, ...], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with self._activate_lora(names):
            return self.base_layer(x, *args, **kwargs)

    @contextlib.contextmanager
    def _activate_lora(self, active_adapters: Iterable[str]) -> Iterator[None]:
        """The module below computes with these adapters."""
        base = self.get_base_layer()
        with loaded(base):
            weight = self.substituted_weight(tuple([n for n in active_adapters if n in self._names]))
            with _reparametrize_module(base, {self.parameter_name: weight}):
                yield


_DELTA = ParamWrapper.get_delta_weight


class _LoraParameterProxy(nn.Module):
    """For `torch.nn.utils.parametrize`: W -> W + delta_weight.

    The library itself does not parametrise; others build on it.
    """

    def __init__(self, delta_weight: torch.Tensor):
        super().__init__()
        self.delta_weight = delta_weight

    def forward(self, W: torch.Tensor) -> torch.Tensor:
        return W + self.delta_weight


LoraLayer.by_kind["MultiheadAttention"] = MultiheadAttention
LoraLayer.by_kind["ParamWrapper"] = ParamWrapper
