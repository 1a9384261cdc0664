# SPDX-License-Identifier: Apache-2.0
"""Where the public names live. Names of methods follow from the names of their modules; only exceptions are listed.

A new method `tuners/foo.py` with FooConfig and FooModel is importable as `peft.FooConfig` without an entry here.
"""

import functools
import pkgutil
from collections.abc import Callable
from pathlib import Path

from .utils._lazy import lazy_attributes, owners


def words(text: str) -> list[str]:
    return text.split()


# Public names of methods that do not follow from a module name.
_IRREGULAR = owners(
    {
        "peft.tuners.lora.config": (
            "LoraConfig ArrowConfig BdLoraConfig EvaConfig KasaConfig LoftQConfig LoraGAConfig LoraRuntimeConfig "
            "MontecloraConfig VeloraConfig"
        ),
        "peft.tuners.lora": (
            "convert_to_lora create_arrow_model get_eva_state_dict initialize_lora_eva_weights preprocess_loraga "
            "save_as_lora"
        ),
        "peft.tuners.multitask_prompt_tuning": "MultitaskPromptTuningInit MultitaskPromptEmbedding",
        "peft.tuners.p_tuning": "PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType",
        "peft.tuners.prefix_tuning": "PrefixEncoder",
        "peft.tuners.prompt_tuning": "PromptEmbedding PromptTuningInit",
        "peft.tuners.mixed": "MixedModel",
    }
)
# Methods whose public classes are the pair <Name>Config, <Name>Model.
_LAYER_METHODS = words(
    "AdaLora Adamss AdaptionPrompt BOFT Beft C3A Deft Delora FourierFT Frod Glora Gralora HRA Hira IA3 LNTuning Lily "
    "LoHa LoKr Lora Miss OFT OSF Peanut Poly Psoft Pvera RandLora Road Shadow Shira Supertuning TinyLora "
    "TrainableTokens UniLora VBLoRA Vera WaveFT XLora"
)
_PROMPT_NAMES = words(
    "CPTConfig CPTEmbedding CartridgeConfig CartridgeEncoder MultitaskPromptTuningConfig PrefixTuningConfig "
    "PromptTuningConfig"
)

TUNER_NAMES = sorted({*_IRREGULAR, *_PROMPT_NAMES, *(m + kind for m in _LAYER_METHODS for kind in ("Config", "Model"))})
_CORE = owners(
    {
        "peft.auto": (
            "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction "
            "AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM "
            "AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification"
        ),
        "peft.config": "PeftConfig PromptLearningConfig",
        "peft.helpers": "find_kappa_target_modules",
        "peft.mapping": (
            "MODEL_TYPE_TO_PEFT_MODEL_MAPPING PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING "
            "PEFT_TYPE_TO_TUNER_MAPPING get_peft_config get_peft_model inject_adapter_in_model"
        ),
        "peft.mixed_model": "PeftMixedModel",
        "peft.peft_model": "PeftModel",
        "peft.status": "get_layer_status get_model_status",
        "peft.task_models": (
            "PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering PeftModelForSeq2SeqLM "
            "PeftModelForSequenceClassification PeftModelForTokenClassification"
        ),
        "peft.tuners.cartridge": (
            "compose_cartridge_adapters initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text "
            "prompt_embeddings_from_past_key_values"
        ),
        "peft.utils": (
            "NoMatchingPeftModuleError PeftError PeftType PeftWarning TaskType "
            "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING bloom_model_postprocess_past_key_value "
            "cast_mixed_precision_params get_base_model_state_dict get_peft_model_state_dict load_peft_weights "
            "prepare_model_for_kbit_training replace_lora_weights_loftq set_base_model_state_dict "
            "set_peft_model_state_dict shift_tokens_right"
        ),
    }
)


@functools.cache
def tuner_modules() -> dict[str, str]:
    """{name without underscores: name} of the modules of `peft.tuners`."""
    folder = str(Path(__file__).parent / "tuners")
    return {info.name.replace("_", ""): info.name for info in pkgutil.iter_modules([folder])}


def home(name: str) -> str | None:
    """The module that defines the public name `name`, None if there is no such name."""
    if listed := _CORE.get(name) or _IRREGULAR.get(name):
        return listed
    for kind in ("Config", "Model", "Embedding", "Encoder"):
        if name.endswith(kind):
            module = tuner_modules().get(name.removesuffix(kind).lower())
            return f"peft.tuners.{module}" if module else None
    return None


PUBLIC_NAMES = sorted({*_CORE, *TUNER_NAMES} - {"MixedModel", "MultitaskPromptEmbedding"})


class _Homes(dict):
    """Name -> module, computed where it is not listed."""

    def get(self, name: str, default: str | None = None) -> str | None:  # type: ignore[override]
        return home(name) or default


def public_attributes(module_name: str, names: list[str], submodules: list[str]) -> tuple[Callable, Callable]:
    """`__getattr__` and `__dir__` of `peft` and `peft.tuners`."""
    return lazy_attributes(module_name, _Homes.fromkeys(names, ""), submodules)
