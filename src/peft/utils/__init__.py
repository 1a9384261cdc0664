# SPDX-License-Identifier: Apache-2.0
"""Importable addresses of the helpers. Nothing is imported before it is used."""

from typing import TYPE_CHECKING

from ..core.targets import published_names
from ._lazy import lazy_attributes, owners

if TYPE_CHECKING:
    from ..registry import register_peft_method as register_peft_method

_TABLES = [name for name in published_names() if name.split("_")[3] not in ("HIRA", "OSF")]
_HOMES = owners(
    {
        "peft.utils.constants": (
            "ALLOWED_COMPUTE_DTYPES CONFIG_NAME INCLUDE_LINEAR_LAYERS_SHORTHAND SAFETENSORS_WEIGHTS_NAME UPCAST_DTYPES "
            "WEIGHTS_NAME TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING "
            "bloom_model_postprocess_past_key_value " + " ".join(_TABLES)
        ),
        "peft.utils.error": "NoMatchingPeftModuleError PeftError",
        "peft.utils.warning": "PeftWarning",
        "peft.utils.peft_types": "PeftType TaskType register_peft_method",
        "peft.utils.integrations": "map_cache_to_layer_device_map",
        "peft.utils.loftq_utils": "replace_lora_weights_loftq",
        "peft.utils.quantization_utils": "get_quantization_kwargs quantization_extra_repr resolve_quantization_backend",
        "peft.utils.save_and_load": (
            "get_base_model_state_dict get_peft_model_state_dict load_peft_weights set_base_model_state_dict "
            "set_peft_model_state_dict"
        ),
        "peft.utils.other": (
            "AuxiliaryTrainingWrapper ModulesToSaveWrapper TrainableTokensWrapper _freeze_adapter _get_batch_size "
            "_get_input_embeddings_name _get_submodules _is_valid_match _prepare_prompt_learning_config _set_adapter "
            "_set_trainable cast_mixed_precision_params get_gptqmodel_quant_linear get_quantization_config "
            "id_tensor_storage infer_device prepare_model_for_kbit_training set_additional_trainable_modules "
            "shift_tokens_right transpose"
        ),
    }
)
_SUBMODULES = [
    *("constants", "error", "hotswap", "incremental_pca", "integrations", "loftq_utils", "merge_utils", "other"),
    *("peft_types", "quantization_utils", "save_and_load", "transformers_weight_conversion", "warning"),
]

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_attributes(__name__, _HOMES, _SUBMODULES)
