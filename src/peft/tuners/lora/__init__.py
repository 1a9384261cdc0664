# SPDX-License-Identifier: Apache-2.0
"""LoRA."""

from ...utils._lazy import lazy_attributes, owners
from .config import LoraConfig as LoraConfig
from .layer import LoraLayer as LoraLayer
from .model import LoraModel as LoraModel

__getattr__, __dir__ = lazy_attributes(__name__, owners({"peft.tuners.lora.conversion": "convert_to_lora save_as_lora"}))
