# SPDX-License-Identifier: Apache-2.0
"""LoRA."""

from .config import LoraConfig as LoraConfig
from .layer import LoraLayer as LoraLayer
from .model import LoraModel as LoraModel
