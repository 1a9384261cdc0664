# SPDX-License-Identifier: Apache-2.0
"""Cartridges: Lightweight and general-purpose long context representations via self-study, arXiv 2506.06266.

A trained key/value cache of nv tokens, rows as in prefix tuning: [layer][k|v][head][dim], [nv, 2 L d]. The first rows
stay frozen (attention sink). It starts from the cache of real text, and saved cartridges can be concatenated.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig, PromptLearningConfig, option, positive
from ..core.prompt import PROMPT_KEY, BasePromptEncoder, prompt_rows, sizes
from ..registry import register_method
from ..storage.dtensor import whole
from ..utils.peft_types import PeftType


@dataclass
class CartridgeConfig(PromptLearningConfig):
    """Options of cartridges."""

    num_frozen_tokens: int = option(1, "Number of first virtual tokens that are not trained.")
    _not_negative = ("num_frozen_tokens",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_frozen(self)


def _check_frozen(config: CartridgeConfig) -> None:
    frozen, nv = config.num_frozen_tokens, config.num_virtual_tokens
    if nv is not None and frozen > nv:
        raise ValueError(f"num_frozen_tokens={frozen} must not be larger than num_virtual_tokens={nv}.")


@register_method("cartridge", config=CartridgeConfig)
class CartridgeEncoder(BasePromptEncoder):
    """`frozen_embedding` [f, 2 L d] or None, `trainable_embedding` [nv - f, 2 L d], float32."""

    produces = "kv"

    def __init__(self, config: CartridgeConfig):
        super().__init__()
        _check_frozen(config)
        size = sizes(config)
        width = 2 * size.layers * size.width
        self.num_frozen_tokens = config.num_frozen_tokens
        self.num_trainable_tokens = size.tokens - config.num_frozen_tokens
        frozen = torch.randn(self.num_frozen_tokens, width)
        self.frozen_embedding = nn.Parameter(frozen, requires_grad=False) if len(frozen) else None
        trained = torch.randn(self.num_trainable_tokens, width)
        self.trainable_embedding = nn.Parameter(trained, requires_grad=not config.inference_mode)

    @property
    def rows(self) -> int:
        return self.num_frozen_tokens + self.num_trainable_tokens

    @property
    def weight(self) -> torch.Tensor:
        """All rows, [nv, 2 L d]."""
        if self.frozen_embedding is None:
            return self.trainable_embedding
        return torch.cat([self.frozen_embedding, self.trainable_embedding])

    @property
    def embedding(self) -> Any:  # type: ignore[override]
        """Looks like the embedding of a prefix encoder: an object with `weight`."""
        return SimpleNamespace(weight=self.weight)

    def forward(self, indices: torch.Tensor | None = None, task_ids: Any = None) -> torch.Tensor:
        rows = self.weight.unsqueeze(0)
        return rows if indices is None else rows.expand(indices.shape[0], -1, -1)

    def export(self) -> dict[str, torch.Tensor]:
        return {PROMPT_KEY: whole(self.weight.detach()).clone().cpu()}

    def load_prompt_embeddings(self, prompt_embeddings: torch.Tensor) -> None:
        """Copy rows [nv, 2 L d] into the frozen and the trained part."""
        expected = (self.rows, self.trainable_embedding.shape[1])
        if tuple(prompt_embeddings.shape) != expected:
            raise ValueError(
                f"The cartridge has shape {list(expected)}, prompt_embeddings has {list(prompt_embeddings.shape)}."
            )
        with torch.no_grad():
            if self.frozen_embedding is not None:
                self.frozen_embedding.copy_(prompt_embeddings[: self.num_frozen_tokens])
            self.trainable_embedding.copy_(prompt_embeddings[self.num_frozen_tokens :])

    def load(self, state_dict: dict[str, torch.Tensor]) -> None:
        self.load_prompt_embeddings(prompt_rows(state_dict))


# ---- starting from a real cache


def _cached_layers(past_key_values: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    try:
        layers: Any = [tuple(layer)[:2] for layer in past_key_values]
    except TypeError:
        layers = [()]
    if any([isinstance(t, torch.Tensor) for t in layer] != [True, True] for layer in layers):
        raise TypeError(
            f"past_key_values of type {type(past_key_values).__name__} is not supported: "
            "give a transformers cache or a sequence of (key, value)."
        )
    return layers


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> torch.Tensor:
    """The first tokens of a cache of one sample as prefix rows [num_virtual_tokens, 2 L heads head_dim]."""
    positive("num_virtual_tokens", num_virtual_tokens)
    layers = _cached_layers(past_key_values)
    if not layers:
        raise ValueError("past_key_values is empty.")
    shape = layers[0][0].shape
    rows = []
    for index, layer in enumerate(layers):
        for tensor in layer:
            if tensor.ndim != 4:
                raise ValueError(f"Layer {index}: expected [batch, heads, tokens, head_dim], got {list(tensor.shape)}.")
            if tensor.shape[0] != 1:
                raise ValueError(f"Layer {index}: expected one sample, got a batch of {tensor.shape[0]}.")
            if tensor.shape[2] < num_virtual_tokens:
                raise ValueError(
                    f"Layer {index}: num_virtual_tokens={num_virtual_tokens}, but only {tensor.shape[2]} cached tokens."
                )
            if (tensor.shape[1], tensor.shape[3]) != (shape[1], shape[3]):
                raise ValueError(
                    f"Layer {index}: heads and head_dim differ from layer 0: {list(tensor.shape)}, {list(shape)}."
                )
            rows.append(tensor[0, :, :num_virtual_tokens].to(layers[0][0].device).transpose(0, 1).flatten(1))
    return torch.cat(rows, dim=1).contiguous()


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> torch.Tensor:
    """Start a cartridge or prefix (without projection) from a cache; returns the rows."""
    name, nv = _kv_prefix(model, adapter_name, num_virtual_tokens)
    rows = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=nv)
    model.prompt_encoder[name].load_prompt_embeddings(rows)
    return rows


def _kv_prefix(model: Any, adapter_name: str | None, num_virtual_tokens: int | None) -> tuple[str, int]:
    """The adapter and its number of virtual tokens, if it can start from a cache."""
    name = model.active_adapter if adapter_name is None else adapter_name
    if name not in model.peft_config:
        raise ValueError(f"Adapter {name!r} does not exist. Known adapters: {sorted(model.peft_config)}.")
    config = model.peft_config[name]
    if config.peft_type not in (PeftType.CARTRIDGE, PeftType.PREFIX_TUNING):
        raise ValueError(
            f"Adapter {name!r} is of type {config.peft_type}: only CARTRIDGE and PREFIX_TUNING start from a cache."
        )
    if getattr(config, "prefix_projection", False):
        raise ValueError(
            f"Adapter {name!r} has prefix_projection=True: its rows are the output of an MLP and cannot be set."
        )
    return name, sizes(config).tokens if num_virtual_tokens is None else num_virtual_tokens


def _text_ids(tokenizer: Any, text: str, use_chat_template: bool, max_length: int | None) -> torch.Tensor:
    """Token ids [1, T] of the text as one system message, or as plain text where there is no (usable) chat template."""
    ids = None
    if use_chat_template and hasattr(tokenizer, "apply_chat_template"):
        with contextlib.suppress(TypeError, ValueError):
            ids = tokenizer.apply_chat_template(
                [{"role": "system", "content": text}],
                tokenize=True,
                add_generation_prompt=False,
                return_dict=False,
                return_tensors="pt",
            )
    if ids is None:
        cut = {"truncation": max_length is not None, "max_length": max_length}
        ids = tokenizer(text, return_tensors="pt", **cut)["input_ids"]
    return ids if max_length is None else ids[:, :max_length]


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> torch.Tensor:
    """Start a cartridge or prefix from the base model's cache of `text`; returns the rows."""
    name, nv = _kv_prefix(model, adapter_name, num_virtual_tokens)
    ids = _text_ids(tokenizer, text, use_chat_template, max_length)
    if ids.shape[1] < nv:
        raise ValueError(f"The text has {ids.shape[1]} tokens, fewer than num_virtual_tokens={nv}: give a longer text.")
    base = model.get_base_model()
    training = base.training
    base.eval()
    try:
        with model.disable_adapter():
            # Only the first tokens are needed, and with causal attention they do not see the rest.
            output = model(input_ids=ids[:, :nv].to(base.device), use_cache=True)
    finally:
        base.train(training)
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=name, past_key_values=output.past_key_values, num_virtual_tokens=nv
    )


# ---- composition of files


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | Path], *, output_path: str | Path, safe_serialization: bool = True
) -> None:
    """Concatenate saved cartridges, in order, into one adapter folder."""
    if len(adapter_paths) < 2:
        raise ValueError(f"Composing needs at least two cartridges, got {len(adapter_paths)}.")
    from ..io.files import load_peft_weights, save_adapter

    configs: list[Any] = [PeftConfig.from_pretrained(str(path)) for path in adapter_paths]
    for path, config in zip(adapter_paths, configs, strict=True):
        if config.peft_type != PeftType.CARTRIDGE:
            raise ValueError(f"{path} is of type {config.peft_type}, not CARTRIDGE.")
        for field in ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"):
            if getattr(config, field) != getattr(configs[0], field):
                raise ValueError(
                    f"{path} does not fit {adapter_paths[0]}: {field} is {getattr(config, field)!r}, "
                    f"not {getattr(configs[0], field)!r}."
                )
    rows = torch.cat([prompt_rows(load_peft_weights(str(path), device="cpu")) for path in adapter_paths])
    configs[0].num_virtual_tokens = rows.shape[0]
    save_adapter(output_path, {PROMPT_KEY: rows}, configs[0], safe_serialization=safe_serialization)
