# SPDX-License-Identifier: Apache-2.0
"""The shadow network: where the blocks of the base model are, and how a small copy of its decoder is made or loaded."""

import copy
import inspect
import json
from typing import Any

import torch
from torch import nn

from ...import_utils import require
from .config import MIRROR

BLOCK_LISTS = ("layers", "h", "single_transformer_blocks", "transformer_blocks")
# Published checkpoints of a shadow network with a projection to the width of a larger model.
WITH_PROJECTION = "causal_lm_with_hidden_projection"


def find_decoder(model: nn.Module) -> Any:
    """The part of the model that holds the blocks."""
    if any(hasattr(model, name) for name in ("single_transformer_blocks", "transformer_blocks")):
        raise NotImplementedError(f"ShadowPEFT of diffusion transformers ({type(model).__name__}) is not supported.")
    found = next(
        (getattr(model, n) for n in ("model", "transformer", "base_model", "decoder") if hasattr(model, n)), model
    )
    return getattr(found, "decoder", found)


def block_list(decoder: nn.Module) -> nn.ModuleList:
    for name in BLOCK_LISTS:
        if isinstance(found := getattr(decoder, name, None), nn.ModuleList):
            return found
    raise AttributeError(
        f"ShadowPEFT finds no transformer blocks in {type(decoder).__name__}, none of {', '.join(BLOCK_LISTS)}. "
        "Name the blocks in `target_modules`."
    )


def width(decoder: Any) -> int:
    return decoder.config.hidden_size


def mirror_config(cfg: Any, config: Any) -> Any:
    """The decoder's configuration with the sizes of the mirror."""
    config, depth = copy.deepcopy(config), cfg.shadow_num_hidden_layers or 1
    config.num_hidden_layers = depth
    for option_name, name in (
        ("shadow_hidden_size", "hidden_size"),
        ("shadow_num_attention_heads", "num_attention_heads"),
        ("shadow_intermediate_size", "n_inner" if hasattr(config, "n_inner") else "intermediate_size"),
    ):
        if (value := getattr(cfg, option_name)) is not None:
            setattr(config, name, value)
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if groups and heads % groups:  # otherwise no query head would find its keys
        config.num_key_value_heads = heads
    if types := getattr(config, "layer_types", None):
        config.layer_types = (types + types[-1:] * depth)[:depth]
    if getattr(config, "max_window_layers", None) is not None:
        config.max_window_layers = min(config.max_window_layers, depth)
    return config


def shares_embeddings(cfg: Any, decoder: Any, backbone: Any) -> bool:
    """Whether the shadow network reads the embeddings of the base model, whose width must be the same."""
    same = cfg.shadow_model == MIRROR and width(backbone) == width(decoder)
    return cfg.share_embeddings and same and "inputs_embeds" in inspect.signature(backbone.forward).parameters


def make_backbone(cfg: Any, decoder: Any) -> tuple[nn.Module, nn.Module]:
    """(shadow network, projection to the base model's width)."""
    projection: nn.Module | None = None
    if cfg.shadow_model == MIRROR:
        with torch.device("cpu"):  # never on meta: files lack its buffers
            backbone: Any = type(decoder)(mirror_config(cfg, decoder.config))
        if shares_embeddings(cfg, decoder, backbone) and hasattr(backbone, "embed_tokens"):
            del backbone.embed_tokens
    else:
        backbone, projection = load_backbone(cfg.shadow_model)
    narrow, wide = width(backbone), width(decoder)
    if projection is None:
        with torch.device("cpu"):
            projection = nn.Identity() if narrow == wide else nn.Linear(narrow, wide, bias=False)
    elif tuple(projection.weight.shape) != (wide, narrow):  # type: ignore[arg-type]
        raise ValueError(
            f"The projection of shadow model {cfg.shadow_model!r} has shape {tuple(projection.weight.shape)}, "  # type: ignore[arg-type]
            f"the base model needs {(wide, narrow)}."
        )
    return backbone, projection


def trained_parameters(cfg: Any, backbone: Any) -> list[nn.Parameter]:
    """The embeddings of a pretrained shadow network stay frozen."""
    kept = set() if cfg.shadow_model == MIRROR else set(map(id, backbone.get_input_embeddings().parameters()))
    return [p for p in backbone.parameters() if id(p) not in kept]


# ---- pretrained networks


def load_backbone(name: str) -> tuple[nn.Module, nn.Linear | None]:
    """A pretrained shadow network, with its trained projection if it has one."""
    require("A pretrained shadow model", "transformers")
    from transformers import AutoConfig, AutoModel, PretrainedConfig

    values = PretrainedConfig.get_config_dict(name)[0]
    if values.get("model_type") != WITH_PROJECTION:
        return AutoModel.from_pretrained(name), None
    backbone = AutoModel.from_config(AutoConfig.for_model(**values["shadow_model_config"]))
    state, own = read_weights(name), {}
    for key, value in state.items():
        if key.startswith("shadow_model."):
            own[key.removeprefix("shadow_model.").removeprefix(backbone.base_model_prefix + ".")] = value
    missing = backbone.load_state_dict(own, strict=False).missing_keys
    projection = state.get("shadow_hidden_projection.weight")
    if missing or projection is None:
        lacks = missing or ["shadow_hidden_projection.weight"]
        raise ValueError(f"Shadow model {name!r} lacks the weights {lacks[:4]}{' and more' if len(lacks) > 4 else ''}.")
    linear = nn.Linear(projection.shape[1], projection.shape[0], bias=False)
    linear.weight = nn.Parameter(projection)
    return backbone, linear


def read_weights(name: str) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder or repository, sharded or not."""
    from safetensors.torch import load_file
    from transformers.utils.hub import cached_file

    found: dict[str, torch.Tensor] = {}
    index = cached_file(name, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    files = ["model.safetensors"]
    if index is not None:
        with open(index, encoding="utf-8") as file:
            files = sorted(set(json.load(file)["weight_map"].values()))
    for part in files:
        found.update(load_file(str(cached_file(name, part))))
    return found
