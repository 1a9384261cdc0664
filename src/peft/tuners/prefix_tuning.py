# SPDX-License-Identifier: Apache-2.0
"""Prefix tuning: Prefix-Tuning: Optimizing Continuous Prompts for Generation, arXiv 2101.00190.

Keys and values of nv virtual tokens in every layer: row = [layer][k|v][head][dim], [nv, 2 L d]; optionally they are
MLP(E') with E' [nv, d].
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..config import PromptLearningConfig, option
from ..core.prompt import BasePromptEncoder, prompt_rows, sizes
from ..registry import register_method


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Options of prefix tuning."""

    init_weights: Literal["zero"] | None = option(
        None, "'zero': keys and values start at zero; otherwise normal noise."
    )
    encoder_hidden_size: int | None = option(None, "Hidden width of the projection (default: token_dim).")
    prefix_projection: bool = option(False, "Train the prefix through a two-layer MLP, which is not stored.")
    _choices = ("init_weights",)
    _positive = ("encoder_hidden_size",)


@register_method("prefix_tuning", config=PrefixTuningConfig)
class PrefixEncoder(BasePromptEncoder):
    """`embedding` [nv, 2 L d], or `embedding` [nv, d] and `transform` with the projection in training."""

    produces = "kv"

    def __init__(self, config: PrefixTuningConfig):
        super().__init__()
        self.prefix_projection = config.prefix_projection
        size = sizes(config)
        d, h, width = size.width, config.encoder_hidden_size or size.width, 2 * size.layers * size.width
        if self.prefix_projection and not config.inference_mode:
            self.embedding = nn.Embedding(size.tokens, d)
            self.transform = nn.Sequential(nn.Linear(d, h), nn.Tanh(), nn.Linear(h, width))
            start = self.transform[2]
        else:
            self.embedding = start = nn.Embedding(size.tokens, width)
        if config.init_weights == "zero":
            for parameter in start.parameters():
                nn.init.zeros_(parameter)

    def forward(self, indices: torch.Tensor, task_ids: Any = None) -> torch.Tensor:
        rows = self.embedding(indices)
        return self.transform(rows) if "transform" in self._modules else rows

    def load_prompt_embeddings(self, prompt_embeddings: torch.Tensor) -> None:
        """Copy rows [nv, 2 L d] into the prefix."""
        if "transform" in self._modules:
            raise ValueError(
                "Can't load rows into a prefix with prefix_projection=True: they are the output of its MLP."
            )
        weight = self.embedding.weight
        if prompt_embeddings.shape != weight.shape:
            raise ValueError(
                f"The prefix has shape {list(weight.shape)}, prompt_embeddings has {list(prompt_embeddings.shape)}."
            )
        with torch.no_grad():
            weight.copy_(prompt_embeddings)

    def load(self, state_dict: dict[str, torch.Tensor]) -> None:
        if "transform" in self._modules:
            self.load_prompt_embeddings(prompt_rows(state_dict))
        super().load(state_dict)
