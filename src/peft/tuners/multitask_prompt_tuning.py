# SPDX-License-Identifier: Apache-2.0
"""Multitask prompt tuning: Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning, arXiv 2303.02861.

P_t = P * (u_t v_t): one shared prompt P [n, d] and low-rank factors u_t [n, r], v_t [r, d] of each task.
"""

import enum
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import option
from ..core.prompt import PROMPT_KEY, sizes
from ..registry import register_method
from ..storage.dtensor import whole
from .prompt_tuning import PromptEmbedding, PromptTuningConfig, PromptTuningInit


class MultitaskPromptTuningInit(str, enum.Enum):
    """TEXT and RANDOM as in prompt tuning; the others start from a trained source checkpoint."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Options of multitask prompt tuning."""

    prompt_tuning_init: PromptTuningInit | MultitaskPromptTuningInit | str = option(
        MultitaskPromptTuningInit.RANDOM,
        "How the prompt starts: RANDOM, SAMPLE_VOCAB, TEXT, or from a source checkpoint with AVERAGE_SOURCE_TASKS, "
        "EXACT_SOURCE_TASK, ONLY_SOURCE_SHARED.",
    )
    prompt_tuning_init_state_dict_path: str | None = option(None, "Source checkpoint of the SOURCE initialisations.")
    prompt_tuning_init_task: int | None = option(0, "Task of the source checkpoint, with EXACT_SOURCE_TASK.")
    num_ranks: int = option(1, "Rank of the task factors.")
    num_tasks: int = option(1, "Number of tasks.")
    _positive = ("num_ranks", "num_tasks")


_SOURCE_INITS = (
    MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS,
    MultitaskPromptTuningInit.EXACT_SOURCE_TASK,
    MultitaskPromptTuningInit.ONLY_SOURCE_SHARED,
)
_FACTORS = ("prefix_task_cols", "prefix_task_rows")


@register_method("multitask_prompt_tuning", config=MultitaskPromptTuningConfig)
class MultitaskPromptEmbedding(PromptEmbedding):
    """`embedding` [n, d], `prefix_task_cols` [tasks, n, r], `prefix_task_rows` [tasks, r, d], float32."""

    prefix = "multitask_prompt_tuning_"
    feeds_decoder = True

    def __init__(self, config: MultitaskPromptTuningConfig, word_embeddings: nn.Module):
        super().__init__(config, word_embeddings)
        self.num_tasks, self.num_ranks = config.num_tasks, config.num_ranks
        self.prefix_task_cols = nn.Parameter(torch.normal(0.0, 0.02, (self.num_tasks, self.rows, self.num_ranks)))
        self.prefix_task_rows = nn.Parameter(
            torch.normal(0.0, 0.02, (self.num_tasks, self.num_ranks, sizes(config).width))
        )
        # A saved adapter is complete: its source need not exist any more.
        if config.prompt_tuning_init in _SOURCE_INITS and not config.inference_mode:
            self._start_from_source(config)

    def _start_from_source(self, config: MultitaskPromptTuningConfig) -> None:
        path, init = config.prompt_tuning_init_state_dict_path, config.prompt_tuning_init
        if path is None:
            raise ValueError(
                f"prompt_tuning_init={str(init)!r} needs prompt_tuning_init_state_dict_path, the source checkpoint."
            )
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            source = load_file(path)
        else:
            source = torch.load(path, weights_only=True, map_location="cpu")
        values = {"embedding.weight": source[PROMPT_KEY]}
        for name in _FACTORS:
            if init == MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS:
                values[name] = source[name].mean(dim=0, keepdim=True)
            elif init == MultitaskPromptTuningInit.EXACT_SOURCE_TASK:
                values[name] = source[name][config.prompt_tuning_init_task].unsqueeze(0)
        # Strict when the factors come from the source; their shapes only fit num_tasks=1.
        self.load_state_dict(values, strict=init != MultitaskPromptTuningInit.ONLY_SOURCE_SHARED)

    def forward(self, indices: torch.Tensor, task_ids: torch.Tensor | None = None) -> torch.Tensor:
        if task_ids is None:
            raise ValueError("task_ids cannot be None: multitask prompt tuning needs the task of each sample.")
        task_ids = torch.as_tensor(task_ids, device=indices.device).reshape(-1)
        return self.embedding(indices) * torch.matmul(self.prefix_task_cols[task_ids], self.prefix_task_rows[task_ids])

    def export(self) -> dict[str, torch.Tensor]:
        tensors = {name: getattr(self, name) for name in _FACTORS} | {PROMPT_KEY: self.embedding.weight}
        return {name: whole(tensor.detach()).cpu() for name, tensor in tensors.items()}

    def load(self, state_dict: dict[str, Any]) -> None:
        super().load(state_dict)
        lost = [name for name in _FACTORS if name not in state_dict]
        if lost:
            raise KeyError(f"The adapter weights lack {lost}: not a file of multitask prompt tuning?")
        self.load_state_dict({name: state_dict[name] for name in _FACTORS}, strict=False)
