# SPDX-License-Identifier: Apache-2.0
"""LoRA. Names that need more code than a plain adapter are loaded when they are used."""

import importlib
from typing import Any

from .config import (
    ArrowConfig as ArrowConfig,
    BdLoraConfig as BdLoraConfig,
    EvaConfig as EvaConfig,
    KasaConfig as KasaConfig,
    LoftQConfig as LoftQConfig,
    LoraConfig as LoraConfig,
    LoraGAConfig as LoraGAConfig,
    LoraRuntimeConfig as LoraRuntimeConfig,
    MontecloraConfig as MontecloraConfig,
    VeloraConfig as VeloraConfig,
)
from .layer import (
    Conv1d as Conv1d,
    Conv2d as Conv2d,
    Conv3d as Conv3d,
    Embedding as Embedding,
    LoraLayer as LoraLayer,
    MultiheadAttention as MultiheadAttention,
    ParamWrapper as ParamWrapper,
)
from .model import LoraModel as LoraModel

Linear = LoraLayer.by_kind["Linear"]
# Name -> module of this package that has it.
_LAZY = {
    "convert_to_lora": "conversion", "save_as_lora": "conversion",
    "get_eva_state_dict": "eva", "initialize_lora_eva_weights": "eva",
    "preprocess_loraga": "loraga", "create_arrow_model": "arrow",
    "GPTQLoraLinear": "gptq", "EetqLoraLinear": "eetq", "Linear4bit": "bnb", "Linear8bitLt": "bnb",
}  # fmt: skip
_ADDRESSES = (
    "aqlm", "arrow", "awq", "bnb", "conversion", "corda", "dora", "eetq", "eva", "gptq", "hqq", "intruders", "loraga", "tp_layer", "variants",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    if name in _ADDRESSES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
