# SPDX-License-Identifier: Apache-2.0
"""torchao: quantised tensor subclasses inside ordinary linear layers.

Writing quantises again with the configuration that made the weight: the one of the transformers quantiser when there
is one, otherwise
one inferred from the tensor's class.
"""

from typing import Any

import torch
from torch import nn


def _inferred(weight: Any) -> Any:
    """The configuration of weight-only formats that can be told from the tensor."""
    from torchao import quantization

    name = type(weight).__name__
    if name == "Int8Tensor" and getattr(weight, "act_quant_kwargs", None) is None:
        return quantization.Int8WeightOnlyConfig()
    if name == "Int4Tensor" or name.startswith("Int4"):
        block = getattr(weight, "block_size", None)
        return quantization.Int4WeightOnlyConfig(group_size=block[-1]) if block else None
    return None


class TorchaoStorage:
    label: str | None = "torchao"
    readable = True
    writable = True

    def __init__(self, config: Any = None):
        self.config = config

    def read(self, module: nn.Module, name: str = "weight") -> torch.Tensor:
        weight: Any = getattr(module, name)
        if not hasattr(weight, "dequantize"):
            raise NotImplementedError(
                f"torchao's {type(weight).__name__} has no dequantize(): its weight cannot be read."
            )
        return weight.dequantize()

    def write(self, module: nn.Module, value: torch.Tensor, name: str = "weight") -> nn.Module:
        from torchao.quantization import quantize_

        old: Any = getattr(module, name)
        config = self.config or _inferred(old)
        if config is None:
            raise TypeError(
                f"Cannot quantise a {type(old).__name__} again: its torchao configuration is not known. Load the "
                "base model through "
                "transformers with a TorchAoConfig, or unquantised, to merge."
            )
        holder = nn.Linear(value.shape[1], value.shape[0], bias=False, device="meta")
        holder.weight = nn.Parameter(value.detach().to(getattr(old, "dtype", value.dtype)), requires_grad=False)
        quantize_(holder, config)
        setattr(
            module,
            name,
            nn.Parameter(holder.weight.data, requires_grad=False)
            if not isinstance(holder.weight, nn.Parameter)
            else holder.weight,
        )
        return module

    def add_(self, module: nn.Module, delta: torch.Tensor, name: str = "weight") -> nn.Module:
        return self.write(module, self.read(module, name) + delta, name)

    def snapshot(self, module: nn.Module, name: str = "weight") -> Any:
        return getattr(module, name)

    def restore(self, module: nn.Module, saved: Any, name: str = "weight") -> nn.Module:
        setattr(module, name, saved)
        return module

    def thaw(self, saved: Any, module: nn.Module) -> torch.Tensor:
        return saved.dequantize()

    def guard(self, y: torch.Tensor) -> torch.Tensor:
        return y


TORCHAO = TorchaoStorage()


def detect(module: nn.Module) -> TorchaoStorage | None:
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    found = any(c.__module__.startswith("torchao.") for c in (*type(weight).__mro__, *type(weight.data).__mro__))
    return TORCHAO if found else None


def with_config(model: nn.Module) -> TorchaoStorage:
    """The storage for layers of a model that transformers quantised."""
    quantiser = getattr(model, "hf_quantizer", None)
    config = getattr(getattr(quantiser, "quantization_config", None), "get_apply_tensor_subclass", None)
    return TorchaoStorage(config()) if callable(config) else TORCHAO
