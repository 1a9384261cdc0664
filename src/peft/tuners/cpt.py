# SPDX-License-Identifier: Apache-2.0
"""CPT: Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods, arXiv 2410.17222.

Prompt = E(in-context examples) + delta, each row of delta kept within a ball: ||delta_i|| <= eps_i sqrt(d / 2048).
A token's role is code mod 4: 1 input template, 2 input, 3 output template, 0 label (if code > 0); code // 4 numbers the
example; code 0 is no role.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..config import PromptLearningConfig, option
from ..core.offload import unsharded
from ..core.prompt import BasePromptEncoder, sizes, word_vectors
from ..registry import register_method
from ..storage.dtensor import rewrite
from ..utils.peft_types import TaskType


@dataclass
class CPTConfig(PromptLearningConfig):
    """Options of context-aware prompt tuning; num_virtual_tokens is the number of cpt_token_ids."""

    cpt_token_ids: list[int] | None = option(None, "Token ids of the in-context examples; they become the prompt.")
    cpt_mask: list[int] | None = option(None, "Mask of these tokens (only its length is used).")
    cpt_tokens_type_mask: list[int] | None = option(
        None, "Role of each token: code mod 4 is 1 input template, 2 input, 3 output template, 0 label."
    )
    opt_weighted_loss_type: Literal["none", "decay"] | None = option(
        "none", "'decay': labels of earlier examples count less in the loss."
    )
    opt_loss_decay_factor: float = option(
        1.0, "Factor of the weight from one example to the one before it, with 'decay'."
    )
    opt_projection_epsilon: float = option(0.1, "Radius of the ball for input tokens.")
    opt_projection_format_epsilon: float = option(0.1, "Radius of the ball for template tokens.")
    tokenizer_name_or_path: str | None = option(None, "Tokenizer of the examples (not used).")

    _choices = ("opt_weighted_loss_type",)
    _not_negative = ("opt_projection_epsilon", "opt_projection_format_epsilon")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_type != TaskType.CAUSAL_LM:
            raise ValueError(f"CPT only works with task_type='CAUSAL_LM', got {self.task_type!r}.")
        if self.cpt_token_ids is None:
            self.cpt_token_ids = [0]
        self.num_layers = self.token_dim = self.num_attention_heads = None
        self.num_transformer_submodules = 1
        self.num_virtual_tokens = n = len(self.cpt_token_ids)
        if self.cpt_mask is None:
            self.cpt_mask = [1] * n
        if self.cpt_tokens_type_mask is None:
            self.cpt_tokens_type_mask = [1] * n
        lengths = {name: len(getattr(self, name)) for name in ("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask")}
        if len(set(lengths.values())) != 1:
            raise ValueError(
                f"cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length, got {lengths}."
            )


def label_weights(codes: torch.Tensor, factor: float) -> torch.Tensor:
    """Weight of each label position: 1 for the row's last example, times `factor` for each distinct example after it.

    `codes` [b, T]: role code of label positions, 0 elsewhere. Weight: factor ** (number of distinct larger codes).
    """
    ordered, place = codes.sort(dim=1, descending=True)
    new = torch.zeros_like(ordered)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    later = torch.zeros_like(codes).scatter(1, place, new.cumsum(1))
    return torch.full(codes.shape, factor, device=codes.device) ** later


@register_method("cpt", config=CPTConfig)
class CPTEmbedding(BasePromptEncoder):
    """`embedding` [nv, d] frozen, `delta_embedding` [nv, d] trained (not for labels or without a role), float32."""

    type_codes: torch.Tensor
    token_ids: torch.Tensor
    moves: torch.Tensor
    epsilon: torch.Tensor

    uses_word_embeddings = True
    loss_arguments = ("input_type_mask",)

    def __init__(self, config: CPTConfig, word_embeddings: nn.Module):
        super().__init__()
        self.config = config
        size = sizes(config)
        self.embedding = nn.Embedding(size.tokens, size.width)
        self.delta_embedding = nn.Embedding(size.tokens, size.width)
        nn.init.zeros_(self.delta_embedding.weight)
        if not config.inference_mode:
            ids = torch.tensor(config.cpt_token_ids, dtype=torch.long)
            self.embedding.weight = nn.Parameter(word_vectors(word_embeddings, ids))
        self.embedding.requires_grad_(False)
        codes = torch.tensor(config.cpt_tokens_type_mask, dtype=torch.long)
        self.register_buffer("type_codes", codes, persistent=False)  # [nv]
        self.register_buffer("token_ids", torch.tensor(config.cpt_token_ids, dtype=torch.long), persistent=False)
        roles = codes.clamp(min=0) % 4
        self.register_buffer("moves", (roles != 0).unsqueeze(1), persistent=False)  # [nv, 1]
        scale = math.sqrt(size.width / 2048)
        given, template = config.opt_projection_epsilon * scale, config.opt_projection_format_epsilon * scale
        radii = torch.tensor([1e-10, template, given, template])  # by role
        self.register_buffer("epsilon", radii[roles], persistent=False)  # [nv]

    def get_epsilon(self) -> torch.Tensor:
        """Radius of the ball of each row of delta, [nv]."""
        return self.epsilon

    def get_projection(self) -> torch.Tensor:
        """Delta with every row projected into its ball, [nv, d]."""
        return self._projected(self.delta_embedding.weight.detach())

    @torch.no_grad()
    def _projected(self, delta: torch.Tensor) -> torch.Tensor:
        norm = delta.norm(dim=1)
        scale = torch.where(norm > 0, self.epsilon / norm.clamp(min=self.epsilon), torch.ones_like(norm))
        return delta * scale.unsqueeze(1)

    def settle(self, unit: nn.Module) -> None:
        """Project delta where the optimiser sees it, if that is not where `forward` does."""
        if self.training and torch.distributed.is_initialized():
            with unsharded(unit, write=True):
                rewrite(self.delta_embedding.weight, self._projected)

    def forward(self, indices: torch.Tensor, task_ids: Any = None) -> torch.Tensor:
        delta = self.delta_embedding.weight
        with torch.no_grad():
            delta.data.copy_(self.get_projection())  # .data: for FSDP1 it is a view that must not change
        delta = torch.where(self.moves, delta, delta.detach())
        return self.embedding(indices) + F.embedding(indices, delta)

    def load(self, state_dict: dict[str, torch.Tensor]) -> None:
        super().load(state_dict)
        with torch.no_grad():  # the rows in the file are embedding + delta
            self.delta_embedding.weight.zero_()

    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, input_type_mask: torch.Tensor | None = None, **arguments: Any
    ) -> torch.Tensor:
        """Cross entropy over the label tokens of prompt and text; labels and input_type_mask [b, T]."""
        batch, device = labels.shape[0], logits.device
        if input_type_mask is None:
            input_type_mask = torch.full_like(labels, 4)
        labels = torch.cat([self.token_ids.to(device).expand(batch, -1), labels.to(device)], dim=1)
        codes = self.type_codes.to(device)
        own = input_type_mask.to(device)
        codes = torch.cat([codes.expand(batch, -1), torch.where(own > 0, own + codes.max(), own)], dim=1)
        is_label = (codes > 0) & (codes % 4 == 0)
        labels = labels.masked_fill(~is_label, -100)[:, 1:]
        counted = labels != -100
        losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, reduction="none")
        if self.config.opt_weighted_loss_type == "decay":
            weights = label_weights(codes.masked_fill(~is_label, 0)[:, 1:], self.config.opt_loss_decay_factor)
            losses = losses * weights
        return losses[counted].mean()
