# SPDX-License-Identifier: Apache-2.0
"""torchao: quantised tensor subclasses inside ordinary linear layers.

Writing quantises again with the configuration that made the weight: the one of the transformers quantiser when there
is one, otherwise one inferred from the tensor's class.
"""

from typing import Any

import torch
from torch import nn

from .base import QuantisedStorage, classes_from


def _inferred(weight: Any) -> Any:
    """The configuration of weight-only formats that can be told from the tensor."""
    from torchao import quantization as q
    from torchao.quantization.granularity import PerAxis, PerGroup

    name, block = type(weight).__name__, getattr(weight, "block_size", None)
    if block is None or getattr(weight, "act_quant_kwargs", None) or getattr(weight, "activation_quantization", None):
        return None
    whole = block[-1] == weight.shape[-1]
    if name == "Int8Tensor":
        return q.Int8WeightOnlyConfig() if whole else q.Int8WeightOnlyConfig(granularity=PerGroup(block[-1]))
    if name == "IntxUnpackedToInt8Tensor":
        granularity = PerAxis(0) if whole else PerGroup(block[-1])
        return q.IntxWeightOnlyConfig(weight_dtype=weight.target_dtype, granularity=granularity)
    if name == "Float8Tensor" and whole:
        return q.Float8WeightOnlyConfig(weight_dtype=weight.qdata.dtype)
    return q.Int4WeightOnlyConfig(group_size=block[-1]) if name.startswith("Int4") else None


class TorchaoStorage(QuantisedStorage):
    label: str | None = "torchao"

    def __init__(self, config: Any = None):
        self.config = config

    def dequantise(self, module: Any, weight: Any) -> torch.Tensor:
        if not hasattr(weight, "dequantize"):
            raise NotImplementedError(
                f"torchao's {type(weight).__name__} has no dequantize(): its weight cannot be read."
            )
        return weight.dequantize()

    def quantise(self, module: Any, value: torch.Tensor, name: str) -> nn.Module:
        from torchao.quantization import quantize_

        old: Any = getattr(module, name)
        config = self.config or _inferred(old)
        if config is None:
            raise TypeError(
                f"Cannot quantise a {type(old).__name__} again: its torchao configuration is not known. Load the "
                "base model through transformers with a TorchAoConfig, or unquantised, to merge."
            )
        holder = nn.Linear(value.shape[1], value.shape[0], bias=False, device="meta")
        holder.weight = nn.Parameter(value.to(getattr(old, "dtype", value.dtype)), requires_grad=False)
        quantize_(holder, config)
        setattr(module, name, nn.Parameter(holder.weight.data, requires_grad=False))
        return module


TORCHAO = TorchaoStorage()


def detect(module: nn.Module) -> TorchaoStorage | None:
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    return TORCHAO if classes_from("torchao", weight) or classes_from("torchao", weight.data) else None


def with_config(model: nn.Module) -> TorchaoStorage:
    """The storage for layers of a model that transformers quantised."""
    quantiser = getattr(model, "hf_quantizer", None)
    config = getattr(getattr(quantiser, "quantization_config", None), "get_apply_tensor_subclass", None)
    return TorchaoStorage(config()) if callable(config) else TORCHAO
