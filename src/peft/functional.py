# SPDX-License-Identifier: Apache-2.0
"""Functions for libraries that add adapters to their own models, without a PeftModel around them."""

from .core.trainable import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from .io.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from .mapping import inject_adapter_in_model

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]
