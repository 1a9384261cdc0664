# SPDX-License-Identifier: Apache-2.0
"""Key/value prefixes and the caches of transformers: layout of the rows, choice of the class, writing into any cache.

Row of the prefix: [layer][k|v][head][dim], [nv, 2 L d].
"""

import warnings
from typing import Any

import torch

from .import_utils import require

# Families whose layers differ in width or share keys and values: their cache is built from the configuration.
_PER_LAYER_FAMILIES = ("gemma2", "gemma3_text", "gemma4")
_PLAIN_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


def _text_config(base: Any) -> Any:
    config = base.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def cache_length(cache: Any) -> int:
    """Number of cached tokens; 0 for no cache."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return cache[0][0].shape[-2] if len(cache) else 0  # tuples of (key, value)


def new_cache(base: Any, config: Any, max_cache_len: int | None = None) -> Any:
    """An empty cache for the base model."""
    if not torch.compiler.is_compiling():  # older compilers break the graph at the search for the package
        require("A key-value cache", "transformers")
    from transformers import DynamicCache, EncoderDecoderCache, StaticCache

    text = _text_config(base)
    if max_cache_len is not None and max_cache_len > 0:
        cache: Any = StaticCache(config=text, max_cache_len=max_cache_len)
    elif _is_per_layer(text):
        cache = DynamicCache(config=text)
    else:
        cache = DynamicCache()
    return EncoderDecoderCache(cache, DynamicCache()) if config.num_transformer_submodules == 2 else cache


def _is_per_layer(text: Any) -> bool:
    model_type, types = getattr(text, "model_type", None) or "", getattr(text, "layer_types", None) or ()
    return any(family in model_type for family in _PER_LAYER_FAMILIES) or not set(types) <= set(_PLAIN_LAYERS)


def with_room(cache: Any, n: int, base: Any) -> Any:
    """A static cache that `generate` made for the text alone, with room for n more tokens; any other cache as it is."""
    from transformers import EncoderDecoderCache, StaticCache

    if getattr(cache, "_is_user_defined", False):
        return cache
    if isinstance(cache, EncoderDecoderCache):
        own = with_room(cache.self_attention_cache, n, base)
        return cache if own is cache.self_attention_cache else EncoderDecoderCache(own, cache.cross_attention_cache)
    if not isinstance(cache, StaticCache):
        return cache
    longest = max(getattr(layer, "max_cache_len", 0) for layer in cache.layers)
    offload = getattr(cache, "offloading", False)
    return StaticCache(config=_text_config(base), max_cache_len=longest + n, offloading=offload)


def _layers(rows: torch.Tensor, config: Any) -> list[torch.Tensor]:
    """Rows [b, nv, 2 L d] as one tensor [2, b, heads, nv, head_dim] (key, value) for each layer; views."""
    b, nv, _ = rows.shape
    heads, slots = config.num_attention_heads, 2 * config.num_layers
    slotted = rows.view(b, nv, slots, heads, config.token_dim // heads).permute(2, 0, 3, 1, 4)
    if config.num_transformer_submodules == 2:
        # Files of encoder-decoders depend on it: layer l uses slots 4 l and 4 l + 1 modulo 2 L, no others are used.
        return [torch.stack((slotted[4 * i % slots], slotted[(4 * i + 1) % slots])) for i in range(config.num_layers)]
    return [slotted[2 * i : 2 * i + 2] for i in range(config.num_layers)]


def write_prefix(cache: Any, rows: torch.Tensor, config: Any, base: Any, batch: int) -> Any:
    """Put the prefix, rows [1 or b, nv, 2 L d], into an empty cache; returns the cache."""
    from .utils.constants import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING as own_formats

    layers = _layers(rows, config)
    model_type = getattr(base.config, "model_type", None)
    if model_type in own_formats:
        return own_formats[model_type](tuple(kv.expand(-1, batch, -1, -1, -1) for kv in layers))
    target = getattr(cache, "self_attention_cache", cache)
    text, devices, skipped = _text_config(base), _devices(base), []
    per_layer, shape = _is_per_layer(text), (config.num_attention_heads, rows.shape[-1])
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        shape = (1, shape[1])  # one head for all queries: the first of the file's
    for index, kv in enumerate(layers):
        if per_layer:
            shape = _layer_shape(text, index, kv.shape[2], kv.shape[4])
        if shape is None or not _holds_keys(target, index):
            skipped.append(index)
            continue
        # Caches copy what they get, so views expanded over the batch are enough.
        kv = kv[:, :, : shape[0], :, : shape[1]].expand(-1, batch, -1, -1, -1)
        if index in devices:
            kv = kv.to(devices[index])
        target.update(kv[0], kv[1], index)
    if len(skipped) == len(layers):
        raise ValueError(f"No layer of {type(base).__name__} can take the prefix (head_dim or shared keys and values).")
    if skipped:
        used = [i for i in range(len(layers)) if i not in skipped]
        warnings.warn(
            f"The prefix goes into the layers {used}; the layers {skipped} cannot take it and are skipped.",
            stacklevel=2,
        )
    return cache


def _holds_keys(cache: Any, index: int) -> bool:
    """False for layers that keep a state instead of keys and values, or share those of another layer."""
    layers = getattr(cache, "layers", ())
    return index >= len(layers) or hasattr(layers[index], "get_seq_length")


def _layer_shape(text: Any, index: int, heads: int, head_dim: int) -> tuple[int, int] | None:
    """(heads, head_dim) of the cache of one layer; None if it has none of its own or needs more than the prefix has."""
    if index >= text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", None) or 0):
        return None
    layer = text
    overrides = getattr(text, "per_layer_config", None)
    if isinstance(overrides, dict):
        layer = overrides.get(index, overrides.get(str(index), text))
    elif overrides is not None and index < len(overrides):
        layer = overrides[index]
    types, wide = getattr(text, "layer_types", None), getattr(text, "global_head_dim", None)
    own_dim, own_heads = _value(layer, "head_dim"), _value(layer, "num_key_value_heads")
    if layer is text and wide is not None and types and types[index] == "full_attention":
        own_dim = wide
        own_heads = getattr(text, "num_global_key_value_heads", None) or own_heads
    own_dim, own_heads = own_dim or head_dim, own_heads or heads
    return (own_heads, own_dim) if own_dim <= head_dim and own_heads <= heads else None


def _value(layer: Any, name: str) -> int | None:
    return layer.get(name) if isinstance(layer, dict) else getattr(layer, name, None)


def _devices(base: Any) -> dict[int, Any]:
    """Device of each decoder layer of a model spread over devices; empty for one device."""
    device_map = getattr(base, "hf_device_map", None)
    if not device_map or len(set(device_map.values())) < 2:
        return {}
    from .utils.integrations import get_layer_device_map

    return get_layer_device_map(base)
