# SPDX-License-Identifier: Apache-2.0
"""Old address of `peft.io.to_lora`."""

from ...io.to_lora import convert_to_lora, save_as_lora

__all__ = ["convert_to_lora", "save_as_lora"]
