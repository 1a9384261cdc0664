# SPDX-License-Identifier: Apache-2.0
"""Old address of the state-dict and file functions of `peft.io`."""

from typing import Any

import torch

from ._lazy import lazy_attributes, owners


def torch_load(*args: Any, weights_only: bool = True, **kwargs: Any) -> Any:
    """`torch.load` that unpickles nothing but tensors unless asked to."""
    return torch.load(*args, weights_only=weights_only, **kwargs)


def _insert_adapter_name_into_state_dict(
    state_dict: dict[str, torch.Tensor], adapter_name: str, parameter_prefix: str
) -> dict[str, torch.Tensor]:
    """File keys -> memory keys: the adapter's name follows the last part that starts with the prefix of the method."""
    renamed = {}
    for key, value in state_dict.items():
        parts = key.split(".")
        at = max((i for i, part in enumerate(parts) if part.startswith(parameter_prefix)), default=None)
        if at is not None:
            parts.insert(at + 1, adapter_name)
        renamed[".".join(parts)] = value
    return renamed


_HOMES = owners(
    {
        "peft.io.state_dict": (
            "get_base_model_state_dict get_peft_model_state_dict set_base_model_state_dict set_peft_model_state_dict"
        ),
        "peft.io.files": "check_file_exists_on_hf_hub load_peft_weights",
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
)

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
