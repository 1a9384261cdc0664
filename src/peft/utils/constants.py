# SPDX-License-Identifier: Apache-2.0
"""File names, special values, and the published names of the default-target tables, which `core/targets.py` owns."""

from typing import Any

import torch

from ..config import CONFIG_NAME as CONFIG_NAME
from ..core import match
from ..core.targets import published_names, target_table

WEIGHTS_NAME = "adapter_model.bin"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

INCLUDE_LINEAR_LAYERS_SHORTHAND = match.ALL_LINEAR
DUMMY_TARGET_MODULES = match.DUMMY_TARGET_MODULES
MIN_TARGET_MODULES_FOR_OPTIMIZATION = match.MIN_TARGET_MODULES_FOR_OPTIMIZATION

# Last parts of names: of input and output embeddings, of the heads of classifiers.
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
DUMMY_MODEL_CONFIG = {"model_type": "custom"}

ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Names, since not every torch version has all of them.
UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")


def bloom_model_postprocess_past_key_value(
    past_key_values: tuple[torch.Tensor, ...],
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Prefix keys and values in the cache layout of old Bloom models.

    `past_key_values`: a [layers, batch, heads, virtual tokens, head dim] tensor per chunk. Returned per layer: keys
    [batch * heads, head dim, virtual tokens], values [batch * heads, virtual tokens, head dim].
    """
    stacked = torch.cat(past_key_values)
    layers, batch, heads, tokens, head_dim = stacked.shape
    half = layers // 2
    # Published prefixes were trained with this reading order of the keys (heads and tokens swapped before the reshape).
    keys = stacked[:half].transpose(2, 3).reshape(half, batch * heads, head_dim, tokens)
    values = stacked[half:].reshape(half, batch * heads, tokens, head_dim)
    return tuple(zip(keys, values, strict=True))


def starcoder_model_postprocess_past_key_value(past_key_values: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Prefix keys and values in the cache layout of old multi-query models: one head, keys and values side by side."""
    result = []
    for k in past_key_values:
        first = k[:, :, 0].permute(1, 2, 0, 3)
        result.append(first.reshape(*first.shape[:-2], -1))
    return tuple(result)


# Model types whose cache layout needs one of the functions above: none with the supported transformers versions.
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}

_TABLES = published_names()


def __getattr__(name: str) -> Any:
    if name in _TABLES:
        return target_table(_TABLES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_TABLES})
