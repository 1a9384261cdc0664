# SPDX-License-Identifier: Apache-2.0
"""Published address of `get_peft_model`."""

from .mapping import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING  # pyright: ignore[reportAttributeAccessIssue]
from .mapping import get_peft_model as get_peft_model

__all__ = ["get_peft_model"]
