# SPDX-License-Identifier: Apache-2.0
"""When and under which keys the embeddings of the base model are stored with an adapter (`save_embedding_layers`)."""

import contextlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ..core.layer import AdapterLayer
from ..utils.constants import EMBEDDING_LAYER_NAMES
from ..utils.peft_types import PeftType
from .base_state import inside
from .keys import PEFT_PREFIX, Entry, _join, _tensors_below, clean, walk


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
    wanted = set()
    for method in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(NotImplementedError):
            wanted.add(id(getattr(model, method, lambda: None)()))
    found: list[Entry] = []
    for path, module in walk(model):
        if id(module) in wanted:
            found += _entries(path, module, name, targeted)
    return found


def _entries(path: str, module: nn.Module, name: str, targeted: bool) -> Iterator[Entry]:
    if targeted and not isinstance(module, AdapterLayer):
        return
    inner = inside(module)
    if inner == "original_module" and name in module.adapter_names:  # type: ignore[operator]
        return  # a copy trained by this adapter is stored under the plain name already
    while inner:
        path, module = _join(path, inner), module.get_submodule(inner)
        inner = inside(module)
    for rest, owner, attr in _tensors_below(module):
        key = clean(_join(path, rest))
        yield Entry(key, key, owner, attr, None, "base")


def _is_targeted(model: nn.Module, config: Any) -> bool:
    """Whether the adapter sits on an embedding: `embed_tokens` or `lm_head` literally listed, or matched by the
    regex.
    """
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str):
        pattern = re.compile(targets)
        names = (path for path, _ in walk(model))
        tails = (n for n in names if n.rpartition(".")[2] in EMBEDDING_LAYER_NAMES)
        return any(pattern.fullmatch(n) or pattern.fullmatch(n.removeprefix(PEFT_PREFIX)) for n in tails)
    return targets is not None and any(n in targets for n in EMBEDDING_LAYER_NAMES)


def _decide(model: nn.Module, config: Any, targeted: bool) -> bool:
    tokens = getattr(config, "trainable_token_indices", None) is not None
    tokens = tokens or config.peft_type == PeftType.TRAINABLE_TOKENS
    size, origin = getattr(getattr(model, "config", None), "vocab_size", None), config.base_model_name_or_path
    why = ""
    if targeted and not tokens:
        why = "embedding layers found in `target_modules`"
    elif origin and size is not None:
        original = _vocab_size(origin, config.revision)
        if original is None:
            text = f"Could not find a config file in {origin} - will assume that the vocabulary was not modified."
            warnings.warn(text, stacklevel=5)
        elif original != size:
            why = "the embedding layer has been resized during finetuning"
    if why:
        warnings.warn(f"Setting `save_embedding_layers` to `True` as {why}.", stacklevel=5)
    return bool(why)


def _vocab_size(origin: str, revision: str | None) -> int | None:
    """Size of the vocabulary that the base model was published with; None when that cannot be found out."""
    path = Path(origin, "config.json")
    if os.path.isdir(origin) and not path.is_file():
        return None
    try:
        if not path.is_file():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(origin, "config.json", revision=revision))
        values = json.loads(path.read_text(encoding="utf-8"))
        if "vocab_size" in values:
            return values["vocab_size"]
        from transformers import AutoConfig

        return getattr(AutoConfig.from_pretrained(path.parent, trust_remote_code=False), "vocab_size", None)
    except Exception:  # offline, gated, no such repository, code of its own ...: undeterminable all the same
        return None
