# SPDX-License-Identifier: Apache-2.0
"""PeftMixedModel: a base model with adapters of several methods, of which several can be active together."""

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from . import loading, status
from .adapter_call import AdapterCall
from .config import PeftConfig, nearest
from .core.aux_modules import as_names
from .core.layer import AdapterLayer
from .core.rollback import unchanged_on_error
from .peft_model import PeftModel, is_checkpointing
from .registry import method_of, name_warning
from .tuners.mixed import MixedModel, check_mixable

_Single: Any = PeftModel


class PeftMixedModel(nn.Module):
    """A base model with adapters of any layer methods; where two methods adapt the same layer, the later one wraps the
    earlier one.

    `base_model` is the tuner; attributes that are not found here are looked up there and then in the user's model.
    """

    base_model: MixedModel

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ):
        super().__init__()
        check_mixable(peft_config)
        self.modules_to_save: set[str] | None = None
        self._adapters_disabled = False
        self.base_model = MixedModel(model, {adapter_name: peft_config}, adapter_name, low_cpu_mem_usage)
        self._cast_adapter(adapter_name, autocast_adapter_dtype)
        self.set_modules_to_save(peft_config, adapter_name)
        self.config = getattr(model, "config", {"model_type": "custom"})
        if is_checkpointing(model):
            _Single.prepare_model_for_gradient_checkpointing(self, model)
        if hasattr(self.config, "pretraining_tp"):
            self.config.pretraining_tp = 1  # type: ignore[union-attr]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_model", "get_base_model"):  # the latter tells a PeftModel apart
                raise
            return getattr(self.base_model, name)

    # ---- as in PeftModel, which this class does not derive from: other code tells the two apart by type
    _is_prompt_learning = False
    print_trainable_parameters = _Single.print_trainable_parameters
    get_layer_status = _Single.get_layer_status
    get_model_status = _Single.get_model_status
    disable_adapter = _Single.disable_adapter  # within it the model computes what the base model computes
    load_adapter = _Single.load_adapter
    _cast_adapter = _Single._cast_adapter
    _layers_off = _Single._layers_off

    # ---- what there is
    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.base_model.peft_config

    @property
    def active_adapter(self) -> list[str]:
        return self.base_model.active_adapters

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable parameters, all parameters)."""
        return status.count_parameters(self, packed=False)

    # ---- adapters
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter of any layer method, frozen and not active. A failing call changes nothing."""
        check_mixable(peft_config)
        if adapter_name in (prefix := method_of(peft_config).prefix):
            warnings.warn(name_warning(adapter_name, prefix), stacklevel=2)
        with unchanged_on_error(None, peft_config):
            self.base_model.add(adapter_name, peft_config, low_cpu_mem_usage)
        self._cast_adapter(adapter_name, autocast_adapter_dtype)
        self.set_modules_to_save(peft_config, adapter_name)

    def set_modules_to_save(self, peft_config: PeftConfig, adapter_name: str) -> None:
        """Note the modules that the adapter trains in full."""
        names = getattr(peft_config, "modules_to_save", None)
        if names:
            self.modules_to_save = (self.modules_to_save or set()) | set(names)

    def _known(self, names: str | list[str]) -> list[str]:
        names, known = as_names(names), sorted(self.peft_config)
        if missing := sorted(set(names) - set(known)):
            raise ValueError(
                f"Adapter(s) {missing} not found, available adapters: "
                f"{known}{nearest(missing[0], known, prefix='. Did you mean ')}"
            )
        return names

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one or several adapters, trainable unless `inference_mode`; all others are frozen."""
        self.base_model.set_adapter(self._known(adapter_name), inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Delete one or several adapters."""
        for name in self._known(adapter_name):
            self.base_model.delete_adapter(name)

    # ---- calls
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the base model with the active adapters, or with `adapter_names`: a name for each sample."""
        with AdapterCall(self, args, kwargs) as (args, kwargs):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the base model with the active adapters."""
        with AdapterCall(self, args, kwargs, generate=True) as (args, kwargs):
            return self.base_model.generate(*args, **kwargs)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Merge the active adapters and take all layers away; returns the base model."""
        return self.base_model.merge_and_unload(*args, **kwargs)

    def unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Take all layers away without merging; returns the base model."""
        return self.base_model.unload(*args, **kwargs)

    # ---- files
    @classmethod
    def _split_kwargs(cls, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return loading.split_kwargs(kwargs)

    def _check_new_adapter_config(self, peft_config: PeftConfig, is_trainable: bool) -> None:
        check_mixable(peft_config)
        loading.check_new_adapter_config(self, peft_config, is_trainable)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> "PeftMixedModel":
        """Put a saved adapter on `model`, to which adapters of other methods can be added."""
        return loading.from_pretrained(cls, model, model_id, adapter_name, is_trainable, config, **kwargs)  # type: ignore[return-value,arg-type]

    def _nested_keys(self, weights: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
        """Keys of a file that was saved from a model of one method: here its layers may be inside others."""
        depth = {}
        for key, module in self.base_model.model.named_modules():
            if isinstance(module, AdapterLayer) and name in module and key.endswith(".base_layer"):
                outer = key
                while outer.endswith(".base_layer"):
                    outer = outer.removesuffix(".base_layer")
                depth[f"base_model.model.{outer}"] = f"base_model.model.{key}"
        if not depth:
            return dict(weights)
        renamed = {}
        for key, value in weights.items():
            path = key
            while "." in path and path not in depth:
                path = path.rpartition(".")[0]
            renamed[depth[path] + key[len(path) :] if path in depth else key] = value
        return renamed

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = False,
        selected_adapters: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        raise NotImplementedError("Saving is not supported for PeftMixedModel (yet).")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("Saving is not supported for PeftMixedModel (yet).")

    def create_or_update_model_card(self, output_dir: str) -> None:
        raise NotImplementedError("Model card creation is not supported for PeftMixedModel (yet).")
