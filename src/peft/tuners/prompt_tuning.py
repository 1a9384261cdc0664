# SPDX-License-Identifier: Apache-2.0
"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv 2104.08691.

Input embeddings [P; E(x)] with P [n, d] trained.
"""

import enum
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import PromptLearningConfig, option
from ..core.prompt import BasePromptEncoder, sizes, word_vectors
from ..import_utils import require
from ..registry import register_method


class PromptTuningInit(str, enum.Enum):
    """TEXT: the embeddings of a text. SAMPLE_VOCAB: those of random tokens. RANDOM: normal noise."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Options of prompt tuning."""

    prompt_tuning_init: PromptTuningInit | str = option(
        PromptTuningInit.RANDOM,
        "How the prompt starts: RANDOM, SAMPLE_VOCAB (random tokens) or TEXT (prompt_tuning_init_text).",
    )
    prompt_tuning_init_text: str | None = option(None, "Text whose embeddings the prompt starts from, with TEXT.")
    tokenizer_name_or_path: str | None = option(None, "Tokenizer of that text.")
    tokenizer_kwargs: dict | None = option(None, "Further arguments of AutoTokenizer.from_pretrained, with TEXT.")
    _choices = ("prompt_tuning_init",)

    def __post_init__(self) -> None:
        super().__post_init__()
        is_text = self.prompt_tuning_init == PromptTuningInit.TEXT
        if is_text and not self.tokenizer_name_or_path:
            raise ValueError("With prompt_tuning_init='TEXT', tokenizer_name_or_path can't be None.")
        if is_text and self.prompt_tuning_init_text is None:
            raise ValueError("With prompt_tuning_init='TEXT', prompt_tuning_init_text can't be None.")
        if self.tokenizer_kwargs and not is_text:
            raise ValueError(
                f"tokenizer_kwargs only applies to prompt_tuning_init='TEXT', not to {self.prompt_tuning_init!r}."
            )


def text_token_ids(config: PromptTuningConfig, n: int) -> torch.Tensor:
    """The first n token ids of the text, repeated from the start if there are fewer."""
    require("prompt_tuning_init='TEXT'", "transformers")
    from transformers import AutoTokenizer

    # A checkpoint's config must not be able to run code: the flag is never taken from it.
    kwargs = {k: v for k, v in (config.tokenizer_kwargs or {}).items() if k != "trust_remote_code"}
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **kwargs)
    ids: list[int] = list(tokenizer(config.prompt_tuning_init_text)["input_ids"])
    if not ids:
        raise ValueError(
            f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no tokens: give a longer text."
        )
    return torch.tensor((ids * math.ceil(n / len(ids)))[:n], dtype=torch.long)


@register_method("prompt_tuning", config=PromptTuningConfig)
class PromptEmbedding(BasePromptEncoder):
    """The prompt as an embedding [n, d], float32."""

    uses_word_embeddings = True

    def __init__(self, config: PromptTuningConfig, word_embeddings: Any):
        super().__init__()
        n, width = sizes(config).rows, sizes(config).width
        self.embedding = nn.Embedding(n, width)
        if config.inference_mode:  # the file's rows follow
            return
        if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
            ids = torch.randint(0, word_embeddings.weight.shape[0], (n,))
        elif config.prompt_tuning_init == PromptTuningInit.TEXT:
            ids = text_token_ids(config, n)
        else:
            return
        self.embedding.weight = nn.Parameter(word_vectors(word_embeddings, ids))

    def forward(self, indices: torch.Tensor, task_ids: Any = None) -> torch.Tensor:
        return self.embedding(indices)
