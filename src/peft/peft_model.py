# SPDX-License-Identifier: Apache-2.0
"""PeftModel: a base model with its adapters. Life cycle of adapters, forward and generate, saving and loading,
status.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .adapter_call import SPECIAL_ARGUMENTS, AdapterCall
from .config import PeftConfig, nearest
from .core.rollback import unchanged_on_error
from .core.tuner import TunerModel
from .core.wrappers import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    _set_adapter,
    set_additional_trainable_modules,
)
from .registry import method_of, name_warning
from .utils._lazy import lazy_attributes, lazy_module, owners
from .utils.collector import without_collector

if TYPE_CHECKING:
    from . import loading, model_card, prompt_inputs, status
    from .core import prompt
else:  # read on first use: `import peft` and injection do without them
    loading, model_card, prompt_inputs, status, prompt = map(
        lazy_module, ("peft.loading", "peft.model_card", "peft.prompt_inputs", "peft.status", "peft.core.prompt")
    )

# Published here too.
__getattr__, __dir__ = lazy_attributes(
    __name__,
    owners(
        {
            "peft.task_models": (
                "PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering "
                "PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification"
            ),
            "peft.status": "TunerLayerStatus TunerModelStatus get_layer_status get_model_status",
            "peft.utils.save_and_load": "get_peft_model_state_dict load_peft_weights set_peft_model_state_dict",
        }
    ),
)


def is_checkpointing(model: nn.Module) -> bool:
    """Whether activations are recomputed in backward; models that do not say are taken to do so."""
    found = getattr(model, "is_activation_checkpointing", None)  # transformers >= 5.23, where the other name warns
    return getattr(model, "is_gradient_checkpointing", True) if found is None else found


class PeftModel(nn.Module):
    """A base model with adapters of one method.

    `base_model` is the tuner, which holds the user's model as `base_model.model`; for prompt methods it is the user's
    model itself. Attributes that are not found here are looked up in the tuner and then in the user's model.
    """

    base_model: Any

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ):
        super().__init__()
        self.active_adapter: Any = adapter_name
        self.peft_type = peft_config.peft_type
        self.special_peft_forward_args = set(SPECIAL_ARGUMENTS)
        self._is_prompt_learning = peft_config.is_prompt_learning
        self._adapters_disabled = False
        self._peft_config: dict[str, PeftConfig] | None = {} if self._is_prompt_learning else None
        if self._is_prompt_learning:
            self.base_model = model
            self.add_adapter(adapter_name, peft_config, low_cpu_mem_usage=low_cpu_mem_usage)
        else:
            tuner = method_of(peft_config).tuner
            configs = {adapter_name: peft_config}
            self.base_model = tuner(model, configs, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
            self._cast_adapter(adapter_name, autocast_adapter_dtype)
        if is_checkpointing(model):
            self.prepare_model_for_gradient_checkpointing(model)
        if hasattr(getattr(model, "config", None), "pretraining_tp"):
            model.config.pretraining_tp = 1  # type: ignore[union-attr]  # the split matmuls would go past the adapter layers

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # while unpickling
                raise
            if self.__dict__.get("_is_prompt_learning") and "merge" in name and hasattr(TunerModel, name):
                raise AttributeError(
                    f"No {name!r} here: {method_of(self.active_peft_config).name} adapters are prompts, which cannot "
                    "be merged into weights. Keep the PeftModel, or take the base model from `get_base_model()`."
                ) from None
            return getattr(self.base_model, name)

    # ---- what there is
    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.base_model.peft_config if self._peft_config is None else self._peft_config

    @peft_config.setter
    def peft_config(self, value: dict[str, PeftConfig]) -> None:
        if self._peft_config is None:
            self.base_model.peft_config = value
        else:
            self._peft_config = value

    @property
    def active_adapters(self) -> list[str]:
        if not self._is_prompt_learning:
            return self.base_model.active_adapters
        return [self.active_adapter] if isinstance(self.active_adapter, str) else list(self.active_adapter)

    @property
    def active_peft_config(self) -> PeftConfig:
        name = self.active_adapter
        if not isinstance(name, str) or name not in self.peft_config:
            raise KeyError(
                f"There is no active adapter (active_adapter={name!r}, adapters: {sorted(self.peft_config)})."
            )
        return self.peft_config[name]

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that some adapter trains in full."""
        found = {n for config in self.peft_config.values() for n in getattr(config, "modules_to_save", None) or ()}
        return found or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self.base_model, "dtype", None)

    @property
    def has_active_enabled_adapter(self) -> bool:
        return not self._adapters_disabled or not (self._is_prompt_learning or self.active_adapters)

    def get_base_model(self) -> nn.Module:
        """The user's model, with adapter layers in it."""
        return self.base_model if self._is_prompt_learning else self.base_model.model

    def _get_base_model_class(self, is_prompt_tuning: bool = False) -> type[nn.Module]:
        return type(self.get_base_model())

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable parameters, all parameters)."""
        return status.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        print(status.trainable_line(self.get_nb_trainable_parameters()))

    def get_layer_status(self) -> "list[status.TunerLayerStatus]":
        """The state of each adapter layer."""
        return status.get_layer_status(self)

    def get_model_status(self) -> "status.TunerModelStatus":
        """The state of the model as a whole."""
        return status.get_model_status(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter's delta weights can be approximated by a LoRA."""
        return not self._is_prompt_learning and self.base_model.supports_lora_conversion(adapter_name)

    # ---- adapters
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter, frozen and not active (unless the model has none). A failing call changes nothing."""
        self._check_new_adapter(adapter_name, peft_config)
        alone = not self.peft_config
        with unchanged_on_error(None, peft_config):
            self.peft_config[adapter_name] = peft_config
            try:
                self._create_adapter(adapter_name, peft_config, low_cpu_mem_usage)
            except BaseException:
                self.peft_config.pop(adapter_name, None)
                raise
        self._cast_adapter(adapter_name, autocast_adapter_dtype)
        if alone and self.active_adapter != adapter_name:
            self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)

    def _create_adapter(self, name: str, config: PeftConfig, low_cpu_mem_usage: bool) -> None:
        if not self._is_prompt_learning:
            self.base_model.inject_adapter(self.base_model.model, name, low_cpu_mem_usage=low_cpu_mem_usage)
            return
        if not name or "." in name:
            raise KeyError(
                f"Adapter name {name!r} can't be empty or contain a dot: it becomes part of parameter names."
            )
        prompt.setup_prompt_encoder(self, name, config)  # type: ignore[arg-type]
        model_config = TunerModel.get_model_config(self.base_model)
        set_additional_trainable_modules(self.base_model, config, model_config, name, name == self.active_adapter)

    def _check_new_adapter(self, name: str, config: PeftConfig) -> None:
        if name in self.peft_config:
            raise ValueError(f"Adapter with name '{name}' already exists. Use another name, or delete that one first.")
        if config.peft_type != self.peft_type:
            raise ValueError(
                f"Cannot combine adapters with different peft types. Found {self.peft_type} and {config.peft_type}; "
                "use `get_peft_model(..., mixed=True)` for adapters of several methods."
            )
        if name in (prefix := method_of(config).prefix):
            warnings.warn(name_warning(name, prefix), stacklevel=3)

    def _cast_adapter(self, name: str, autocast: bool) -> None:
        if isinstance(self.base_model, TunerModel):
            self.base_model._cast_adapter_dtype(name, autocast)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make one adapter active and trainable (not with `inference_mode`). Several: `base_model.set_adapter`."""
        self._known(adapter_name)
        if self._is_prompt_learning:
            if self._aux_wrappers():
                _set_adapter(self.base_model, adapter_name, inference_mode)
        else:
            self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)
            self.base_model.switch.call.clear()
        self.active_adapter = adapter_name

    def _known(self, name: str) -> None:
        if name not in self.peft_config:
            known = sorted(self.peft_config)
            raise ValueError(f"Adapter {name} not found. Available adapters: {known}.{nearest(name, known)}")

    def _aux_wrappers(self) -> list[AuxiliaryTrainingWrapper]:
        return [m for m in self.base_model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was active, another active one stays or the first remaining one becomes active."""
        self._known(adapter_name)
        if not self._is_prompt_learning:
            self.base_model.delete_adapter(adapter_name)
            active = self.base_model.active_adapters
            if not active or self.active_adapter not in active:
                self.active_adapter = active[0] if active else []
            return
        prompt.delete_prompt_adapter(self, adapter_name)
        for wrapper in self._aux_wrappers():
            wrapper.delete_adapter(adapter_name, self.active_adapters)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Turn the gradients of adapters on or off; unknown names are ignored."""
        if self._is_prompt_learning:
            raise TypeError("Setting `requires_grad` is not supported for prompt learning methods.")
        self.base_model.set_requires_grad(adapter_names, requires_grad=requires_grad)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model computes what the base model computes."""
        before, self._adapters_disabled = self._adapters_disabled, True
        try:
            with self._prompt_off() if self._is_prompt_learning else self._layers_off():
                yield
        finally:
            self._adapters_disabled = before

    @contextlib.contextmanager
    def _layers_off(self) -> Iterator[None]:
        tuner = self.base_model
        states = {layer.disable_adapters for layer in tuner.layers()}
        if len(states) > 1:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled. This is most "
                "likely unintentional. After exiting the disable_adapter context, all adapters will be enabled",
                stacklevel=5,
            )
        all_off = tuner.switch.disabled if not states else states == {True}
        tuner.disable_adapter_layers()
        tuner.switch.call.clear()
        try:
            yield
        finally:
            if not all_off:
                tuner.enable_adapter_layers()

    @contextlib.contextmanager
    def _prompt_off(self) -> Iterator[None]:
        wrappers = [w for w in self._aux_wrappers() if isinstance(w, ModulesToSaveWrapper)]
        before = [w._local for w in wrappers]
        for wrapper in wrappers:
            wrapper._override((wrapper._key[0], True))
        try:
            yield
        finally:
            for wrapper, key in zip(wrappers, before, strict=True):
                wrapper._local = key

    # ---- calls
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        return AdapterCall(self, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the base model with the active adapters, or with `adapter_names`: a name for each sample."""
        with AdapterCall(self, args, kwargs) as (args, kwargs):
            return self.get_base_model()(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the base model with the active adapters, or with `adapter_names`."""
        with AdapterCall(self, args, kwargs, generate=True) as (args, kwargs):
            return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> Any:
        """Make inputs need gradients: before the first adapter nothing does, so checkpointed blocks would get none."""
        quantised = ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")
        if any(getattr(model, name, False) for name in quantised):
            return model
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        elif hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))
        return model

    _prepare_model_for_gradient_checkpointing = prepare_model_for_gradient_checkpointing

    # ---- prompts
    def _setup_prompt_encoder(self, adapter_name: str) -> None:
        prompt.setup_prompt_encoder(self, adapter_name, self.peft_config[adapter_name])  # type: ignore[arg-type]

    def get_prompt(
        self, batch_size: int, task_ids: torch.Tensor | None = None, max_cache_len: int | None = None
    ) -> torch.Tensor:
        """The active prompt for a batch: rows for the embeddings, or a cache of keys and values."""
        return prompt_inputs.get_prompt(self, batch_size, task_ids, max_cache_len)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> torch.Tensor:
        """The prompt as it is stored in the file."""
        return self.prompt_encoder[adapter_name].export()[prompt.PROMPT_KEY]  # type: ignore[union-attr]

    # ---- files
    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> "PeftModel":
        """Put the adapter in folder or hub repository `model_id` on `model`. A failing call changes nothing."""
        given = {"autocast_adapter_dtype": autocast_adapter_dtype, "ephemeral_gpu_offload": ephemeral_gpu_offload}
        given |= {"low_cpu_mem_usage": low_cpu_mem_usage, "key_mapping": key_mapping, **kwargs}
        return loading.from_pretrained(cls, model, model_id, adapter_name, is_trainable, config, **given)  # type: ignore[arg-type]

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a further adapter, not activated; for a name that exists only the weights are replaced.

        Returns what torch's `load_state_dict` does, with the missing keys of this adapter alone. A failing call changes
        nothing.
        """
        given = {"autocast_adapter_dtype": autocast_adapter_dtype, "ephemeral_gpu_offload": ephemeral_gpu_offload}
        given |= {"low_cpu_mem_usage": low_cpu_mem_usage, "key_mapping": key_mapping, **kwargs}
        with without_collector():
            return loading.load_adapter(self, model_id, adapter_name, is_trainable, torch_device, **given)  # type: ignore[arg-type]

    @classmethod
    def _split_kwargs(cls, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return loading.split_kwargs(kwargs)

    def _check_new_adapter_config(self, peft_config: PeftConfig, is_trainable: bool) -> None:
        loading.check_new_adapter_config(self, peft_config, is_trainable)

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters: "default" into `save_directory`, others into sub-folders with their names."""
        given = {"safe_serialization": safe_serialization, "selected_adapters": selected_adapters}
        given |= {"save_embedding_layers": save_embedding_layers, "is_main_process": is_main_process, **kwargs}
        given["path_initial_model_for_weight_conversion"] = path_initial_model_for_weight_conversion
        loading.save_pretrained(self, save_directory, **given)  # type: ignore[arg-type]

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload what `save_pretrained` writes to a hub repository."""
        from .io.files import push_folder

        return push_folder(self.save_pretrained, repo_id, **kwargs)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write README.md into `output_dir`, or bring an existing one up to date."""
        model_card.create_or_update_model_card(self, output_dir)

    def _get_peft_specific_model_tags(self) -> list[str]:
        return model_card.specific_tags(self)
