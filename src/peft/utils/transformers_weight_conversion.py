# SPDX-License-Identifier: Apache-2.0
"""Address that transformers imports from: renaming and conversion of adapter weights while a model is loaded."""

from ._lazy import lazy_attributes, owners

__getattr__, __dir__ = lazy_attributes(
    __name__,
    owners(
        {
            "peft.io.convert": (
                "FlattenDims PeftConcatenate PermuteDims build_peft_weight_mapping "
                "convert_peft_adapter_state_dict_for_transformers convert_peft_config_for_transformers"
            ),
            "transformers.conversion_mapping": "get_checkpoint_conversion_mapping get_model_conversion_mapping",
            "transformers.core_model_loading": "Concatenate MergeModulelist Transpose WeightConverter WeightRenaming",
        }
    ),
)
