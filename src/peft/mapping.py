# SPDX-License-Identifier: Apache-2.0
"""`get_peft_model`, `inject_adapter_in_model`, and the published lookup tables, which are views on the registry."""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .config import PeftConfig
from .core.layer import AdapterLayer
from .core.modules import tree
from .core.rollback import unchanged_on_error
from .peft_model import PeftModel
from .registry import RecordView, method_of, name_warning
from .utils._lazy import lazy_attributes

if TYPE_CHECKING:
    from .mixed_model import PeftMixedModel

PEFT_TYPE_TO_CONFIG_MAPPING = RecordView(lambda m: m.config)
PEFT_TYPE_TO_TUNER_MAPPING = RecordView(lambda m: m.tuner)
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = RecordView(lambda m: m.tuner, keep=lambda m: m.mixed)
PEFT_TYPE_TO_PREFIX_MAPPING = RecordView(lambda m: m.prefix)
__getattr__, __dir__ = lazy_attributes(__name__, {"MODEL_TYPE_TO_PEFT_MODEL_MAPPING": "peft.task_models"})


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """A configuration object from a dict, which must hold `peft_type`."""
    return PEFT_TYPE_TO_CONFIG_MAPPING[config_dict["peft_type"]](**config_dict)


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> "PeftModel | PeftMixedModel":
    """Wrap `model` for training with the method of `peft_config`. The model is changed in place; a failing call changes
    nothing.

    `mixed` allows adapters of different methods in one model. `autocast_adapter_dtype` keeps float16 and bfloat16
    adapter weights in float32. `revision` of the base model is written to the configuration. `low_cpu_mem_usage`
    creates the adapter on the meta device.
    """
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config must be a PeftConfig, got {type(peft_config).__name__}: {peft_config!r}.")
    record = method_of(peft_config)
    with unchanged_on_error(model, peft_config):
        _note_base_model(model, peft_config, revision)
        if getattr(peft_config, "init_lora_weights", None) == "eva" and not low_cpu_mem_usage:
            warnings.warn(
                "lora with eva initialization used with low_cpu_mem_usage=False. Setting low_cpu_mem_usage=True can "
                "improve the maximum batch size possible for eva initialization.",
                stacklevel=2,
            )
        if adapter_name in record.prefix:
            warnings.warn(name_warning(adapter_name, record.prefix), stacklevel=2)
        if mixed:
            from .mixed_model import PeftMixedModel as cls
        else:
            cls = peft_model_class(peft_config)
        options = {"autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
        return cls(model, peft_config, adapter_name, **options)


def peft_model_class(config: PeftConfig, default: type | None = None) -> type[PeftModel]:
    """The PeftModel class for the task of `config`; prompt methods only exist with a task."""
    if config.task_type is None and (default is not None or not config.is_prompt_learning):
        return default or PeftModel
    from .task_models import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    if config.task_type not in MODEL_TYPE_TO_PEFT_MODEL_MAPPING:
        valid = ", ".join(MODEL_TYPE_TO_PEFT_MODEL_MAPPING)
        raise KeyError(f"{type(config).__name__} needs a task_type (one of {valid}), got {config.task_type!r}.")
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING[config.task_type]


def _note_base_model(model: nn.Module, config: PeftConfig, revision: str | None) -> None:
    """Write name and revision of the base model to the configuration, and say what is surprising about the model."""
    # Only what the model itself was given: class attributes and attributes forwarded to inner modules do not name it.
    old, new = config.base_model_name_or_path, model.__dict__.get("name_or_path") or None
    config.base_model_name_or_path = new
    if any(isinstance(module, AdapterLayer) for module in tree(model)):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
            "different config, make sure to call `.unload()` before.",
            stacklevel=3,
        )
    if old is not None and old != new:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{old}' to '{new}'. Please ensure that the "
            "correct base model is loaded when loading this checkpoint.",
            stacklevel=3,
        )
    if revision is not None:
        if config.revision is not None and config.revision != revision:
            warnings.warn(
                f"peft config has already set base model revision to {config.revision}, overwriting with revision "
                f"{revision}",
                stacklevel=3,
            )
        config.revision = revision


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Inject adapter layers and return the same model, not wrapped. Keys of a `state_dict` say which modules."""
    if peft_config.is_prompt_learning or peft_config.is_adaption_prompt:
        raise ValueError(
            "`inject_adapter_in_model` does not work with prompt learning or adaption prompts; use `get_peft_model`."
        )
    try:
        tuner = method_of(peft_config).tuner
    except KeyError as error:
        raise ValueError(
            f"`inject_adapter_in_model` needs the configuration of a registered method. {error.args[0]}"
        ) from error
    if tuner.uses_shared_state:
        raise ValueError(
            f"`inject_adapter_in_model` does not work with {tuner.__name__}, whose state is shared between layers; use "
            "`get_peft_model`."
        )
    with unchanged_on_error(model, peft_config):
        tuner(model, peft_config, adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
    return model
