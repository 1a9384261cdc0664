# SPDX-License-Identifier: Apache-2.0
"""LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685).

y = W x + b + s·(B A dropout(x) + bias_B),  s = alpha / r  (rsLoRA, arXiv 2312.03732: alpha / sqrt(r)).
"""

import math
import warnings
from typing import Any

import torch
from torch import nn

from ...core import kinds
from ...core.layer import AdapterLayer, dropout
from ...core.merge import check_adapters_to_merge as check_adapters_to_merge
from ...core.scaling import Rescaling
from ...core.slots import Aux, BareTrainable, RareTrainable, Slot, Trainable
from ...ops import low_rank
from ...ops.low_rank import Factors
from ...utils.warning import PeftWarning
from . import init
from .init import ALLOWED_COMPUTE_DTYPES as ALLOWED_COMPUTE_DTYPES
from .variants import PLAIN, LoraVariant, variant_class


class LoraLayer(Rescaling, AdapterLayer):
    """Low-rank delta on linear layers; the other kinds are subclasses in this file and in `substituted.py`."""

    lora_A: Trainable[nn.ModuleDict]  # weight [r, in] (convolutions: [r, in, *kernel])
    lora_B: Trainable[nn.ModuleDict]  # weight [out, r] (convolutions: [out, r / groups, 1...])
    lora_embedding_A: RareTrainable[nn.ParameterDict]  # [r, num_embeddings]
    lora_embedding_B: RareTrainable[nn.ParameterDict]  # [dim, r]
    lora_magnitude_vector: BareTrainable[nn.ModuleDict]  # DoRA
    in_features: int
    out_features: int
    r: Aux[dict]
    lora_alpha: Aux[dict]
    scaling: Aux[dict]
    lora_dropout: Aux[nn.ModuleDict]
    use_dora: Aux[dict]
    use_rslora: Aux[dict]
    lora_bias: Aux[dict]
    lora_variant: Aux[dict]  # LoraVariant; nothing for plain LoRA
    kinds = (
        kinds.Linear, kinds.Conv1D, kinds.Conv2d, kinds.Conv3d, kinds.Conv1d, kinds.Embedding, kinds.MultiheadAttention,
    )  # fmt: skip

    # ---- making an adapter
    def create(self, name: str, cfg: Any) -> None:
        r = cfg.r
        if r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {r}")
        d = self.__dict__
        d["r"][name], d["lora_alpha"][name] = r, cfg.lora_alpha
        d["use_rslora"][name], d["lora_bias"][name], d["use_dora"][name] = cfg.use_rslora, cfg.lora_bias, cfg.use_dora
        d["scaling"][name] = self._initial_scaling(name)
        self._modules["lora_dropout"]._modules[name] = dropout(cfg.lora_dropout)  # type: ignore[union-attr]
        made = variant_class(cfg, self.storage.label == "gptq")
        if made is not None:
            self.add_slots(made.slots)
            d["lora_variant"][name] = made(cfg)
        self.allocate(name, cfg)
        if cfg.lora_bias and self.kind.bias(self.get_base_layer()) is None:
            warnings.warn(
                f"`lora_bias=True` was passed but the targeted {type(self.get_base_layer()).__name__} has no bias: "
                "merging LoRA weights won't be possible.",
                PeftWarning,
                stacklevel=4,
            )
        init.initialise(self, name, cfg)
        if made is not None:
            with torch.no_grad():
                self.variant_of(name).create(self, name, cfg)
            for parameter in self.parameters_of(name):
                parameter.requires_grad_(self._may_train(name, parameter))

    def variant_of(self, name: str) -> LoraVariant:
        return self.lora_variant.get(name, PLAIN)

    def allocate(self, name: str, cfg: Any) -> None:
        """Make the factors by torch's own initialisation: A, then B."""
        A, B = self.kind.low_rank(self.get_base_layer(), cfg.r, cfg.lora_bias)
        self._modules["lora_A"]._modules[name] = A  # type: ignore[union-attr]
        self._modules["lora_B"]._modules[name] = B  # type: ignore[union-attr]

    def add_slots(self, slots: tuple[Slot, ...]) -> None:
        """Containers that a variant needs on this layer beside the published ones."""
        for slot in slots:
            if slot.name not in self.slots:
                self.__dict__["slots"] = {**self.slots, slot.name: slot}
                setattr(self, slot.name, slot.container())
                self.__dict__["module_slots"] = (*self.module_slots, slot.name)
                if slot.role == "trainable":
                    self.__dict__["adapter_layer_names"] = (*self.adapter_layer_names, slot.name)

    def trainable_slots(self, name: str) -> tuple[str, ...]:
        frozen = self.variant_of(name).frozen
        return tuple(s for s in self.adapter_layer_names if s not in frozen) if frozen else self.adapter_layer_names

    # ---- factors
    def factor_tensors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The parameters A and B."""
        return self.lora_A[name].weight, self.lora_B[name].weight  # type: ignore[return-value]

    def set_factors(self, name: str, A: torch.Tensor, B: torch.Tensor) -> None:
        """New values for A and B; factors on meta get theirs from a file and stay."""
        for parameter, value in zip(self.factor_tensors(name), (A, B), strict=True):
            if parameter.device.type != "meta":
                parameter.data = value.detach().to(parameter).reshape(parameter.shape).contiguous()

    def plain_factors(self, name: str) -> Factors:
        modules: Any = self._modules  # on the hot path: past nn.Module's __getattr__
        drop = modules["lora_dropout"]._modules[name]
        p = drop.p if type(drop) is nn.Dropout and drop.training else 0.0
        return Factors(
            modules["lora_A"]._modules[name].weight, modules["lora_B"]._modules[name].weight, self.scaling[name], p
        )

    def factors(self, name: str) -> Factors:
        return self.variant_of(name).factors(self, name)

    def factors_of(self, names: tuple[str, ...]) -> list[Factors]:
        """Of many adapters in evaluation mode, at a third of the time that one after another takes."""
        if self.lora_variant:
            return super().factors_of(names)
        A, B, scaling = self.lora_A._modules, self.lora_B._modules, self.scaling
        return [Factors(A[n].weight, B[n].weight, scaling[n]) for n in names]  # type: ignore

    def static_factors(self, name: str) -> Factors:
        """Factors without what training adds at random."""
        return self.variant_of(name).static_factors(self, name)

    def product(self, f: Factors) -> torch.Tensor:
        """s·B A as a canonical weight; half precision on the CPU is multiplied in float32."""
        A, B, s = f.A, f.B, f.scale
        dtype = A.dtype
        if dtype in (torch.float16, torch.bfloat16) and A.device.type == "cpu":
            A, B = A.float(), B.float()
        weight = (B * s) @ A if isinstance(s, torch.Tensor) else (B @ A) * s
        return weight.to(dtype)

    # ---- forward
    def _choose_path(self, names: tuple[str, ...]) -> str:
        if self.kind.substituted:
            return "substitution"
        if len(names) == 1 and self.variant_of(names[0]).fuses(self):
            return "fused"
        return "factored" if all(self._is_factored(n) for n in names) else "activation"

    def _is_factored(self, name: str) -> bool:
        """Whether only the factors matter: no bias, no variant that needs activations, A and B plain modules
        without hooks.
        """
        variant = self.variant_of(name)
        if not self.kind.is_linear or self.lora_bias[name] or not variant.factored:
            return False
        return variant.replaces_factors or all(
            type(m) is nn.Linear and not m._forward_hooks and not m._forward_pre_hooks
            for m in (self.lora_A[name], self.lora_B[name])
        )

    def fused(self, names: tuple[str, ...], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One variant alone: base product and adapter in one operator."""
        base = self.base_layer
        if args or kwargs or not (self.cast_input_dtype_enabled and self._base_is_plain(base)):
            return self._adapt_activations(names, x, *args, **kwargs)
        return self.lora_variant[names[0]].fused(self, names[0], x)

    def advance(self, name: str, x: torch.Tensor, y: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        return self.variant_of(name).advance(self, name, x, y, base)

    def delta(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self._is_factored(name):
            return low_rank.delta(x, self.factors(name), self.training)
        return self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]

    # ---- weights
    def delta_weight(self, name: str) -> torch.Tensor:
        return self.variant_of(name).delta_weight(self, name)

    def delta_bias(self, name: str) -> torch.Tensor | None:
        return self.lora_B[name].bias * self.scaling[name] if self.lora_bias[name] else None  # type: ignore[operator]

    def map_weight(self, name: str, w: torch.Tensor) -> torch.Tensor:
        return self.variant_of(name).map_weight(self, name, w)

    def unmap_weight(self, name: str, w: torch.Tensor) -> torch.Tensor:
        if not self.additive(name):
            raise RuntimeError(f"{self.lora_variant[name].name} adapters merged with keep=False cannot be unmerged.")
        return w

    def additive(self, name: str) -> bool:
        return self.variant_of(name).additive

    def check_merge(self, name: str) -> None:
        super().check_merge(name)
        self.variant_of(name).check_merge(self, name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.kind.is_linear and self.variant_of(adapter_name).standalone and self.storage.label is None

    # ---- scaling
    def _initial_scaling(self, name: str) -> float:
        r = self.r[name]
        return self.lora_alpha[name] / (math.sqrt(r) if self.use_rslora[name] else r)

    def train(self, mode: bool = True):
        if mode:
            self.__dict__.pop("_norm_cache", None)
        return super().train(mode)


class _Conv(LoraLayer, _of_kind=True):
    """A is a convolution like the base, with r output channels; B a pointwise one, in the groups of the base."""

    def allocate(self, name: str, cfg: Any) -> None:
        groups = self.get_base_layer().groups
        if cfg.r % groups:  # type: ignore[operator]
            raise ValueError(
                f"Targeting a layer with {groups} groups and rank {cfg.r}: set the rank to a multiple of the groups."
            )
        super().allocate(name, cfg)

    def product(self, f: Factors) -> torch.Tensor:
        if self.get_base_layer().groups != 1:  # type: ignore[operator]
            raise NotImplementedError(
                "The LoRA delta of a grouped convolution mixes all groups: it has no weight of the base's shape."
            )
        return super().product(Factors(f.A.flatten(1), f.B.flatten(1), f.scale)).view(f.B.shape[0], *f.A.shape[1:])

    def check_merge(self, name: str) -> None:
        super().check_merge(name)
        if self.get_base_layer().groups != 1:  # type: ignore[operator]
            raise NotImplementedError("Merging is not supported for grouped convolutions: the delta mixes all groups.")


class Conv1d(_Conv, _of_kind=True):
    pass


class Conv2d(_Conv, _of_kind=True):
    pass


class Conv3d(_Conv, _of_kind=True):
    pass


class Embedding(LoraLayer, _of_kind=True):
    """Factors are raw parameters, A [r, num_embeddings], B [dim, r]. No dropout: the input is ids."""

    def allocate(self, name: str, cfg: Any) -> None:
        self.lora_embedding_A[name] = nn.Parameter(torch.randn(cfg.r, self.in_features))
        self.lora_embedding_B[name] = nn.Parameter(torch.randn(self.out_features, cfg.r))

    def factor_tensors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    def plain_factors(self, name: str) -> Factors:
        return Factors(self.lora_embedding_A[name], self.lora_embedding_B[name], self.scaling[name])

    def delta(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        A, B, s, _ = self.factors(name)
        base = self.get_base_layer()
        rows = self.kind.look_up(base, x, A.T) @ B.T  # type: ignore[attr-defined]
        scale = self.kind.scale(base)  # type: ignore[attr-defined]
        if scale is not None:
            s = s * (scale.to(rows) if isinstance(scale, torch.Tensor) else scale)
        return rows * s

    def delta_bias(self, name: str) -> torch.Tensor | None:
        return None


for _cls in (Conv1d, Conv2d, Conv3d, Embedding):
    LoraLayer.by_kind[_cls.__name__] = _cls

from .substituted import MultiheadAttention as MultiheadAttention  # noqa: E402
from .substituted import ParamWrapper as ParamWrapper  # noqa: E402
from .substituted import _LoraParameterProxy as _LoraParameterProxy  # noqa: E402


def transpose(weight: torch.Tensor, fan_in_fan_out: bool) -> torch.Tensor:
    """The transposed weight if `fan_in_fan_out` (published helper; layer kinds know their orientation)."""
    return weight.T if fan_in_fan_out else weight
