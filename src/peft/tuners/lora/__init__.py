# SPDX-License-Identifier: Apache-2.0
"""LoRA. Names that need more code than a plain adapter are loaded when they are used."""

from typing import Any

from ...import_utils import require
from ...utils._lazy import lazy_attributes, owners
from . import addresses
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
    "ArrowConfig", "BdLoraConfig", "Conv1d", "Conv2d", "Conv3d", "Embedding", "EvaConfig", "KasaConfig", "Linear",
    "LoftQConfig", "LoraConfig", "LoraGAConfig", "LoraLayer", "LoraModel", "LoraRuntimeConfig", "MontecloraConfig",
    "MultiheadAttention", "ParamWrapper", "VeloraConfig",
]  # fmt: skip

Linear = LoraLayer.by_kind["Linear"]
_HOMES = owners(
    {
        "peft.io.to_lora": "convert_to_lora save_as_lora",
        "peft.tuners.lora.addresses": "EetqLoraLinear GPTQLoraLinear Linear4bit Linear8bitLt",
        "peft.tuners.lora.arrow": "create_arrow_model",
        "peft.tuners.lora.eva": "get_eva_state_dict initialize_lora_eva_weights",
        "peft.tuners.lora.loraga": "preprocess_loraga",
    }
)
_SUBMODULES = (*addresses.ADDRESSES, "arrow", "corda", "dora", "eva", "intruders", "loraga")
# These exist only where their package is installed, which is what code asks for by importing them.
_NEED = {"Linear4bit": "bitsandbytes", "Linear8bitLt": "bitsandbytes", "EetqLoraLinear": "eetq"}
_found, __dir__ = lazy_attributes(__name__, _HOMES, _SUBMODULES)


def __getattr__(name: str) -> Any:
    if name in _NEED:
        require(name, _NEED[name], error=AttributeError)
    return _found(name)
