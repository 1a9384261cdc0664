# SPDX-License-Identifier: Apache-2.0
"""Published addresses of the LoRA layers over quantised linear layers: bitsandbytes, EETQ, GPTQ, Megatron.

The one `Linear` class serves them: how the weight is held is the storage's business (`peft.storage`). `isinstance`
with these names asks what kind of weight is below.
"""

from typing import Any

from torch import nn

from .layer import LoraLayer


class Over(type):
    """isinstance: a LoRA linear layer whose storage has one of the labels."""

    labels: tuple[str, ...]

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, LoraLayer) and instance.kind.is_linear and instance.storage.label in cls.labels


class Linear8bitLt(metaclass=Over):
    """Stands for LoRA over `bitsandbytes.nn.Linear8bitLt`; calling it makes a `lora.Linear`."""

    labels = ("bnb 8bit",)

    def __new__(cls, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any):
        return LoraLayer.by_kind["Linear"](base_layer, adapter_name, config, **kwargs)


class Linear4bit(Linear8bitLt):
    """Stands for LoRA over `bitsandbytes.nn.Linear4bit`."""

    labels = ("bnb 4bit",)
