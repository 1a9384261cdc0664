# SPDX-License-Identifier: Apache-2.0
"""The published addresses `peft.tuners.lora.{aqlm, awq, bnb, conversion, eetq, gptq, hqq, tp_layer}`: all this module.

One class, `Linear`, is the LoRA of every linear layer: how the weight is held is the storage's business
(`peft.storage`). Its published names by storage only ask: `isinstance` says what kind of base layer is below.
"""

import sys
from typing import Any

from torch import nn

from ...utils._lazy import lazy_attributes, owners
from .layer import LoraLayer


class Over(type):
    """Type of a name that stands for LoRA over certain base layers; calling it makes a `lora.Linear`."""

    below: tuple[str, ...]  # labels of storages, or classes of base layers

    def __instancecheck__(cls, instance: Any) -> bool:
        if not isinstance(instance, LoraLayer) or instance.kind.substituted:
            return False
        return instance.storage.label in cls.below or type(instance.get_base_layer()).__name__ in cls.below

    def __call__(cls, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        return LoraLayer.by_kind["Linear"](base_layer, adapter_name, config, **kwargs)


# Name -> (address, what is below).
_NAMES = {
    "AqlmLoraLinear": ("aqlm", "aqlm"),
    "AwqLoraLinear": ("awq", "awq"),
    "EetqLoraLinear": ("eetq", "eetq"),
    "GPTQLoraLinear": ("gptq", "gptq"),
    "HqqLoraLinear": ("hqq", "hqq"),
    "Linear4bit": ("bnb", "bnb 4bit"),
    "Linear8bitLt": ("bnb", "bnb 8bit"),
    "LoraParallelLinear": ("tp_layer", "ColumnParallelLinear", "RowParallelLinear"),
}
ADDRESSES = {"conversion", *(address for address, *_ in _NAMES.values())}

for _name, (_, *_below) in _NAMES.items():
    globals()[_name] = Over(_name, (), {"__module__": __name__, "below": tuple(_below)})
for _name in ADDRESSES:
    sys.modules[f"{__package__}.{_name}"] = sys.modules[__name__]
__getattr__, __dir__ = lazy_attributes(__name__, owners({"peft.io.to_lora": "convert_to_lora save_as_lora"}))
