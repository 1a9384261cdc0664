# SPDX-License-Identifier: Apache-2.0
"""LoRA. Names that need more code than a plain adapter are loaded when they are used."""

import importlib
from typing import Any

from ...import_utils import require
from .config import (
    ArrowConfig,
    BdLoraConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from .layer import Conv1d, Conv2d, Conv3d, Embedding, LoraLayer, MultiheadAttention, ParamWrapper
from .model import LoraModel

__all__ = [
    "ArrowConfig",
    "BdLoraConfig",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "EvaConfig",
    "KasaConfig",
    "Linear",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "MultiheadAttention",
    "ParamWrapper",
    "VeloraConfig",
]

Linear = LoraLayer.by_kind["Linear"]
# Name -> module of this package that has it.
_LAZY = {
    "convert_to_lora": "conversion", "save_as_lora": "conversion",
    "get_eva_state_dict": "eva", "initialize_lora_eva_weights": "eva",
    "preprocess_loraga": "loraga", "create_arrow_model": "arrow",
    "GPTQLoraLinear": "gptq", "EetqLoraLinear": "eetq", "Linear4bit": "bnb", "Linear8bitLt": "bnb",
}  # fmt: skip
_ADDRESSES = (
    "aqlm", "arrow", "awq", "bnb", "conversion", "corda", "dora", "eetq", "eva", "gptq", "hqq", "intruders",
    "loraga", "tp_layer", "variants",
)  # fmt: skip


# These exist only where their package is installed, which is what code asks for by importing them.
_NEED = {"Linear4bit": "bitsandbytes", "Linear8bitLt": "bitsandbytes", "EetqLoraLinear": "eetq"}


def __getattr__(name: str) -> Any:
    if name in _NEED:
        require(name, _NEED[name], error=AttributeError)
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    if name in _ADDRESSES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
