# SPDX-License-Identifier: Apache-2.0
"""Published address of LoRA over Megatron's parallel linear layers; see `bnb.py`."""

from typing import Any

from .bnb import Over
from .layer import LoraLayer

_PARALLEL = ("ColumnParallelLinear", "RowParallelLinear")


class _OverParallel(Over):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, LoraLayer) and type(instance.get_base_layer()).__name__ in _PARALLEL


class LoraParallelLinear(metaclass=_OverParallel):
    """Stands for LoRA over a `ColumnParallelLinear` or `RowParallelLinear`."""

    def __new__(cls, *args: Any, **kwargs: Any):
        return LoraLayer.by_kind["Linear"](*args, **kwargs)
