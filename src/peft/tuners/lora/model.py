# SPDX-License-Identifier: Apache-2.0
"""LoRA on a whole model: patterns, checks before injection, replicated and tied layers, weighted combination."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from ...core import kinds, tied
from ...core.layer import AdapterLayer
from ...core.tuner import TunerModel
from ...registry import register_method
from ...storage.base import resolve
from ..tuners_utils import _check_lora_target_modules_mamba
from . import init
from .config import LoraConfig
from .layer import LoraLayer
from .variants import variant_class


@register_method("lora", config=LoraConfig, mixed=True)
class LoraModel(TunerModel):
    layer_cls = LoraLayer
    supports_parameters = True
    patterned = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
    inexact_gradients = {"lora.substituted.OUT_PROJ_COUNT": 1}

    # ---- before injection
    def layer_config(self, cfg: Any, key: str, module: nn.Module) -> Any:
        cfg = super().layer_config(cfg, key, module)
        if cfg.use_bdlora:
            from .variants.bdlora import blocked_factor

            cfg = cfg.with_values(_bd_factor=blocked_factor(cfg.use_bdlora, key))
        return cfg

    def check_config(self, name: str, cfg: Any) -> None:
        super().check_config(name, cfg)
        variant_class(cfg)
        init.scheme(cfg.init_lora_weights)
        if cfg.megatron_config:
            warnings.warn("megatron_config has no effect: Megatron's parallel layers are not supported.", stacklevel=5)
        others = [c for n, c in self.peft_config.items() if n != name and isinstance(c, LoraConfig)]
        if any(bool(c.kasa_config) != bool(cfg.kasa_config) for c in others):
            raise ValueError(
                "KaSA adapters change the base weights: they cannot be mixed with adapters that do not use KaSA."
            )
        targeted = {frozenset(c.target_parameters) for c in [cfg, *others] if c.target_parameters}
        if cfg.target_parameters and len(targeted) > 1:
            raise ValueError(
                "All adapters of a model that adapt parameters must have the same `target_parameters`, got "
                f"{' and '.join(str(sorted(t)) for t in targeted)}."
            )

    def check_target(self, cfg: Any, key: str, module: nn.Module) -> None:
        base = module.get_base_layer() if isinstance(module, AdapterLayer) else module
        leaf = key.rpartition(".")[2]
        _check_lora_target_modules_mamba(cfg, self.model, key)
        if self._custom_class(base, cfg) is not None:
            return
        kind = kinds.pick(base, self.layer_cls.kinds)
        if kind is None or (cfg.target_parameters and leaf in base._parameters):
            kind = kinds.parameter_kind(leaf)
        own, storage = self.layer_config(cfg, key, module), resolve(base)
        init.check(own, key, kind, base)
        variant = variant_class(cfg, storage.label == "gptq")
        if variant is not None:
            variant.check(own, key, kind, storage, base)

    def only_draws(self, cfg: Any) -> bool:
        return variant_class(cfg, gptq=True) is None and not init.changes_base(cfg.init_lora_weights)

    # ---- layers that the library does not know
    def _custom_class(self, module: nn.Module, cfg: Any) -> type[LoraLayer] | None:
        mapping = getattr(cfg, "_custom_modules", None) or {}
        found = next((c for t, c in mapping.items() if isinstance(module, t)), None)
        if found is not None and not issubclass(found, LoraLayer):
            raise TypeError(
                f"The class {found.__name__} for {type(module).__name__} must be a subclass of lora.LoraLayer."
            )
        return found

    def accepts(self, module: nn.Module, cfg: Any) -> bool:
        return super().accepts(module, cfg) or self._custom_class(module, cfg) is not None

    def make_layer(self, module: nn.Module, kind: type[kinds.LayerKind] | None, cfg: Any, key: str) -> AdapterLayer:
        base = module.get_base_layer() if isinstance(module, AdapterLayer) else module
        custom = self._custom_class(base, cfg) if kind is None else None
        if custom is None:
            return super().make_layer(module, kind, cfg, key)
        return custom(module, kind=kinds.kind_of(base) or kinds.Module, switch=self.switch)

    def prepare_model(self, name: str, cfg: Any, model: nn.Module) -> None:
        if cfg.layer_replication:
            from .replication import replicate_layers

            self._undo.callback(replicate_layers(model, cfg.layer_replication))
            self.forget_layers()

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        with contextlib.ExitStack() as self._undo:
            super().inject_adapter(*args, **kwargs)
            self._undo.pop_all()  # all went well: nothing is to be undone

    def convert_config(self, cfg: Any, model: nn.Module) -> None:
        """Configurations made for the expert layout of older transformers versions."""
        if hasattr(model, "config"):
            from ...io.convert import convert_config

            convert_config(cfg, model)

    def after_inject(self, name: str, cfg: Any, layers: dict[str, AdapterLayer]) -> None:
        if cfg.use_qalora and not any(layer.storage.label == "gptq" for layer in layers.values()):
            warnings.warn("use_qalora has no effect: none of the adapted layers is a GPTQ layer.", stacklevel=6)
        if getattr(cfg, "target_modules_to_tie", None):
            from .tied import tie_layers

            tie_layers(self, name, cfg, layers, self._undo)

    # ---- tied layers
    def _add_targets_to_tie(self, cfg: Any, names: list[str]) -> None:
        tied.add_targets_to_tie(cfg, names, self.model)

    def export_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self._with_tied(name, state, keep=True)

    def import_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self._with_tied(name, state, keep=False)

    def _with_tied(self, name: str, state: dict[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
        """Files hold the factors of tied layers too; in memory these belong to the embedding."""
        if not getattr(self.peft_config.get(name), "target_modules_to_tie", None):
            return state
        from .tied import tied_tensors

        found = tied_tensors(self, name)
        return {**state, **found} if keep else {k: v for k, v in state.items() if k not in found}

    # ---- combination
    def subtract_mutated_init(
        self, output_state_dict: dict[str, torch.Tensor], adapter_name: str, kwargs: dict[str, Any] | None = None
    ) -> dict[str, torch.Tensor]:
        """Tensors (of twice the rank) of a LoRA of the unchanged base: `output_state_dict` of a trained adapter whose
        initialisation changed the base, less adapter `adapter_name`, which holds what it started from.
        """
        from ...io.initial import subtract_initial
        from ...io.state_dict import get_peft_model_state_dict

        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist; there are {sorted(self.peft_config)}.")
        if init.changes_base(self.peft_config[adapter_name].init_lora_weights):
            raise ValueError(
                f"Load adapter {adapter_name} with `init_lora_weights=True`, or its initial factors are computed again."
            )
        gathered = (kwargs or {}).get("state_dict")
        if gathered is not None:
            gathered = {k.removeprefix("base_model."): t for k, t in gathered.items()}
        before = get_peft_model_state_dict(self, gathered, adapter_name)
        return subtract_initial(output_state_dict, {f"base_model.{k}": t for k, t in before.items()}, adapter_name)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Add an adapter that combines others, frozen and inactive; see `weighted.combine`. An existing name is left
        as it is.

        `svd_full_matrices` has no effect: the singular vectors that are cut off are never needed.
        """
        from .weighted import combine

        if adapter_name not in self.peft_config:
            svd = {"clamp": svd_clamp, "driver": svd_driver}
            options = {**svd, "density": density, "majority_sign_method": majority_sign_method}
            combine(self, adapters, weights, adapter_name, combination_type, svd_rank, options)

    # ---- calls
    def call_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        if "alora_offsets" in kwargs or any(
            getattr(c, "alora_invocation_tokens", None) for c in self.peft_config.values()
        ):
            from .variants.alora import open_call

            open_call(self, kwargs)
        return kwargs

    # ---- merging
    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if getattr(self.model, "quantization_method", None) == "gptq":
            raise ValueError("Cannot merge LoRA layers when the model is gptq quantized")
        if any(getattr(c, "layer_replication", None) for c in self.peft_config.values()):
            raise ValueError(
                "Cannot merge LoRA layers when base model layers are replicated: the copies share their weights."
            )

    # ---- losses of variants
    def _held(self, slot: str, adapter_names: str | list[str] | None) -> Iterator[tuple[LoraLayer, str, Any]]:
        """(layer, adapter, what it holds in a variant's slot) for the given adapters, by default the active ones."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names or self.active_adapters
        for layer in self.layers():
            for name in names:
                if isinstance(layer, LoraLayer) and slot in layer.slots and name in getattr(layer, slot):
                    yield layer, name, getattr(layer, slot)[name]

    def _get_kasa_loss(self, adapter_names: str | list[str] | None = None) -> torch.Tensor | float:
        """Regularisation of KaSA over all layers; to be added to the loss by the caller."""
        from .variants.kasa import loss

        configs: dict[str, Any] = self.peft_config
        held = self._held("lora_diag", adapter_names)
        return sum((loss(layer, name, configs[name].kasa_config) for layer, name, _ in held), 0.0)

    def _get_monteclora_loss(self, adapter_names: str | list[str] | None = None) -> torch.Tensor | float:
        """Mean KL loss of the MonteCLoRA samplers; 0.0 in evaluation."""
        samplers = (sampler for _, _, sampler in self._held("lora_monteclora_sampler", adapter_names))
        losses = [sampler.loss() for sampler in samplers if sampler.training]
        return sum(losses) / len(losses) if losses else 0.0
