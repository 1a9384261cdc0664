# SPDX-License-Identifier: Apache-2.0
"""AutoPeftModel*: load base model and adapter from the folder of the adapter."""

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from .config import PeftConfig, hub_parameters
from .import_utils import require
from .peft_model import PeftModel
from .utils.constants import TOKENIZER_CONFIG_NAME

# `parent_library` comes from the adapter's file, and importing a module runs code: only these are imported unasked.
_IMPORTABLE = ("diffusers", "lerobot", "megatron-core", "transformers")


class _ClassProperty:
    """Keeps the published class attributes without importing what they stand for before they are used."""

    def __init__(self, get: Callable[[Any], Any]):
        self.get = get

    def __get__(self, instance: Any, owner: type) -> Any:
        return self.get(owner)


class _BaseAutoPeftModel:
    """`_target` names the transformers class of the base model, `_target_peft` the wrapper."""

    _target: ClassVar[str | None] = None
    _target_peft: ClassVar[str] = "PeftModel"

    @_ClassProperty
    def _target_class(cls: Any) -> Any:
        if cls._target is None:
            return None
        require(cls.__name__, "transformers")
        return getattr(importlib.import_module("transformers"), cls._target)

    @_ClassProperty
    def _target_peft_class(cls: Any) -> Any:
        if cls._target_peft == "PeftModel":
            return PeftModel
        from . import task_models

        return getattr(task_models, cls._target_peft)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(
            f"{name} is designed to be instantiated using the `{name}.from_pretrained(pretrained_model_name_or_path)` "
            f"or `{name}.from_config(config)` methods."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that the adapter's configuration names, then the adapter.

        `revision` is the adapter's; the base model's stands in the configuration. `kwargs` go to all loaders (dtype,
        device_map, token, subfolder ...). `import_allowlist` are further libraries that the class of a base model
        without a task may come from.
        """
        found: Any = PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision, **kwargs)
        target = cls._base_class(found, import_allowlist)
        base = target.from_pretrained(found.base_model_name_or_path, revision=found.revision, **kwargs)
        _fit_vocabulary(base, pretrained_model_name_or_path, revision, kwargs)
        return cls._target_peft_class.from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            revision=revision,
            **kwargs,
        )

    @classmethod
    def _base_class(cls, config: PeftConfig, allowed: Sequence[str] | None) -> Any:
        task = getattr(config.task_type, "value", config.task_type)
        if task is None:
            return _mapped_class(config, allowed)
        from .task_models import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

        expected = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task].__name__
        if cls._target is None:
            raise ValueError(
                f"{cls.__name__} cannot load an adapter with a task type: this one is for {task}, use Auto{expected}."
            )
        if expected != cls._target_peft:
            raise ValueError(
                f"Expected target PEFT class: {expected}, but you have asked for: {cls._target_peft}. Make sure that "
                f"you are loading the correct model for your task type {task}: use Auto{expected}."
            )
        return cls._target_class


def _mapped_class(config: PeftConfig, allowed: Sequence[str] | None) -> Any:
    """The class that `auto_mapping` names, if its library may be imported."""
    mapping = config.auto_mapping
    if mapping is None:
        raise ValueError(
            "Cannot infer the auto class from the config, please make sure that you are loading the correct model for "
            "your task type: the configuration has neither task_type nor auto_mapping."
        )
    library, name = mapping["parent_library"], mapping["base_model_class"]
    entries = [*_IMPORTABLE, *(allowed or ())]
    if not any(library == entry or library.startswith(entry + ".") for entry in entries):
        raise ValueError(
            f"The configuration asks to import {name} from {library!r}, which is not one of {entries}. If you trust "
            f"it, pass import_allowlist=[{library.split('.')[0]!r}]."
        )
    return getattr(importlib.import_module(library), name)


def _fit_vocabulary(base: Any, path: str | os.PathLike, revision: str | None, kwargs: dict[str, Any]) -> None:
    """Grow the embeddings to the tokenizer that was saved with the adapter."""
    if not hasattr(base, "get_input_embeddings") or not _has_tokenizer(path, revision, kwargs):
        return
    from transformers import AutoTokenizer

    hub = {k: kwargs[k] for k in ("subfolder", "token", "cache_dir", "local_files_only") if k in kwargs}
    tokenizer = AutoTokenizer.from_pretrained(
        path, trust_remote_code=kwargs.get("trust_remote_code", False), revision=revision, **hub
    )
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))


def _has_tokenizer(path: str | os.PathLike, revision: str | None, kwargs: dict[str, Any]) -> bool:
    folder = Path(path, kwargs.get("subfolder") or "")
    if Path(path).is_dir():
        return (folder / TOKENIZER_CONFIG_NAME).is_file()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    hub = {k: v for k, v in kwargs.items() if k in hub_parameters()}
    try:
        hf_hub_download(str(path), TOKENIZER_CONFIG_NAME, revision=revision, **hub)
    except EntryNotFoundError:  # or not in the cache, when offline
        return False
    return True


class AutoPeftModel(_BaseAutoPeftModel):
    """For adapters without a task; the class of the base model comes from the configuration."""


class AutoPeftModelForCausalLM(_BaseAutoPeftModel):
    """For adapters of causal language models."""

    _target, _target_peft = "AutoModelForCausalLM", "PeftModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(_BaseAutoPeftModel):
    """For adapters of encoder-decoder language models."""

    _target, _target_peft = "AutoModelForSeq2SeqLM", "PeftModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(_BaseAutoPeftModel):
    """For adapters of sequence classifiers."""

    _target, _target_peft = "AutoModelForSequenceClassification", "PeftModelForSequenceClassification"


class AutoPeftModelForTokenClassification(_BaseAutoPeftModel):
    """For adapters of token classifiers."""

    _target, _target_peft = "AutoModelForTokenClassification", "PeftModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(_BaseAutoPeftModel):
    """For adapters of extractive question answering models."""

    _target, _target_peft = "AutoModelForQuestionAnswering", "PeftModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(_BaseAutoPeftModel):
    """For adapters of models without a head."""

    _target, _target_peft = "AutoModel", "PeftModelForFeatureExtraction"
