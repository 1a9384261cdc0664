# SPDX-License-Identifier: Apache-2.0
"""Old address of the state-dict and file functions of `peft.io`."""

import torch
from torch import nn

from ._lazy import lazy_attributes, owners


def _maybe_shard_state_dict_for_tp(model: nn.Module, state_dict: dict[str, torch.Tensor], adapter_name: str) -> None:
    """Does nothing, on purpose: under tensor parallelism adapters are whole on every process, as in their files."""


__getattr__, __dir__ = lazy_attributes(
    __name__,
    owners(
        {
            "peft.io.state_dict": [
                *("get_base_model_state_dict", "get_peft_model_state_dict"),
                *("set_base_model_state_dict", "set_peft_model_state_dict"),
            ],
            "peft.io.files": "check_file_exists_on_hf_hub load_peft_weights torch_load",
            "peft.io.hotswap": "_insert_adapter_name_into_state_dict",
            "peft.core.wrappers": "AuxiliaryTrainingWrapper",
            "peft.mapping": "PEFT_TYPE_TO_TUNER_MAPPING",
            "peft.utils.constants": (
                "EMBEDDING_LAYER_NAMES INCLUDE_LINEAR_LAYERS_SHORTHAND SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME"
            ),
            "peft.utils.integrations": "TpInfo dtensor_from_local_like",
            "peft.utils.other": "infer_device match_target_against_key",
            "peft.utils.peft_types": "PeftType",
            "peft.utils.warning": "PeftWarning",
        }
    ),
)
