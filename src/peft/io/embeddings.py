# SPDX-License-Identifier: Apache-2.0
"""When and under which keys the embeddings of the base model are stored with an adapter (`save_embedding_layers`)."""

import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ..core.layer import AdapterLayer
from ..core.match import ALL_LINEAR
from ..core.wrappers import AuxiliaryTrainingWrapper
from ..utils.constants import EMBEDDING_LAYER_NAMES
from ..utils.peft_types import PeftType
from .keys import Entry, _join, _tensors_below, clean, resolve, walk


def embedding_entries(model: nn.Module, name: str, config: Any, option: bool | str) -> list[Entry]:
    """Tensors of the input and output embeddings that go into the file, beside what the adapter itself holds there."""
    targeted = _is_targeted(model, config)
    if option == "auto":
        option = _decide(model, config, targeted)
    if not option:
        return []
    if not hasattr(model, "get_input_embeddings"):
        warnings.warn(
            "Could not identify embedding layer(s) because the model is not a 🤗 transformers model.", stacklevel=4
        )
        return []
    layers = [m for m in (_call(model, "get_input_embeddings"), _call(model, "get_output_embeddings")) if m is not None]
    wanted = {id(m) for m in layers}
    found: list[Entry] = []
    for path, module in walk(model):
        if id(module) in wanted:
            found += _entries(path, module, name, targeted)
    return found


def _call(model: Any, method: str) -> nn.Module | None:
    function = getattr(model, method, None)
    if not callable(function):
        return None
    try:
        found = function()
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None


def _entries(path: str, module: nn.Module, name: str, targeted: bool) -> Iterator[Entry]:
    if isinstance(module, AdapterLayer):
        base: nn.Module = module
        while isinstance(base, AdapterLayer):
            path, base = _join(path, "base_layer"), base.base_layer
        module = base
    elif targeted:
        return
    elif isinstance(module, AuxiliaryTrainingWrapper):
        # A copy trained by this adapter is stored under the plain name already.
        inside = "token_adapter.base_layer" if "token_adapter" in module._modules else "original_module"
        if inside == "original_module" and name in module.adapter_names:
            return
        held = resolve(module, f"{inside}.weight")
        if held is None:
            return
        path, module = _join(path, inside), held[0]
    for rest, owner, attr in _tensors_below(module):
        key = clean(_join(path, rest))
        yield Entry(key, key, owner, attr, None, "base")


def _is_targeted(model: nn.Module, config: Any) -> bool:
    """Whether the adapter sits on an embedding: `embed_tokens` or `lm_head` literally listed, or matched by the
    regex.
    """
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            return False
        pattern = re.compile(targets)
        names = (path for path, _ in walk(model))
        tails = (n for n in names if n.rpartition(".")[2] in EMBEDDING_LAYER_NAMES)
        return any(pattern.fullmatch(n) or pattern.fullmatch(_in_base(n)) for n in tails)
    return targets is not None and any(n in targets for n in EMBEDDING_LAYER_NAMES)


def _in_base(path: str) -> str:
    return path.removeprefix("base_model.model.")


def _decide(model: nn.Module, config: Any, targeted: bool) -> bool:
    tokens = (
        config.peft_type == PeftType.TRAINABLE_TOKENS or getattr(config, "trainable_token_indices", None) is not None
    )
    if targeted and not tokens:
        warnings.warn(
            "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.", stacklevel=5
        )
        return True
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    origin = getattr(config, "base_model_name_or_path", None)
    if not origin or size is None:
        return False
    original = _vocab_size(origin, getattr(config, "revision", None))
    if original is None:
        warnings.warn(
            f"Could not find a config file in {origin} - will assume that the vocabulary was not modified.",
            stacklevel=5,
        )
        return False
    if original != size:
        warnings.warn(
            "Setting `save_embedding_layers` to `True` as the embedding layer has been resized during finetuning.",
            stacklevel=5,
        )
        return True
    return False


def _vocab_size(origin: str, revision: str | None) -> int | None:
    """Size of the vocabulary that the base model was published with; None when that cannot be found out."""
    path = Path(origin, "config.json")
    if not path.is_file():
        if os.path.isdir(origin):
            return None
        try:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(origin, "config.json", revision=revision))
        except Exception:  # offline, gated, no such repository, not a repository name ...: undeterminable all the same
            return None
    values = json.loads(path.read_text(encoding="utf-8"))
    if "vocab_size" in values:
        return values["vocab_size"]
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(path.parent), "vocab_size", None)
