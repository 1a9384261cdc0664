# SPDX-License-Identifier: Apache-2.0
"""P-tuning: GPT Understands, Too, arXiv 2103.10385.

Input embeddings [P; E(x)] with P = MLP(E') or MLP(LSTM(E')), E' [n, d]. Only P is stored.
"""

import enum
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import PromptLearningConfig, option
from ..core.prompt import BasePromptEncoder, sizes
from ..registry import register_method


class PromptEncoderReparameterizationType(str, enum.Enum):
    """The network that the prompt is the output of."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """Options of p-tuning."""

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = option(
        PromptEncoderReparameterizationType.MLP, "Network that makes the prompt: MLP or LSTM."
    )
    encoder_hidden_size: int | None = option(None, "Hidden width of that network (default: token_dim).")
    encoder_num_layers: int = option(2, "Number of LSTM layers.")
    encoder_dropout: float = option(0.0, "Dropout between the LSTM layers.")
    _choices = ("encoder_reparameterization_type",)
    _positive = ("encoder_hidden_size", "encoder_num_layers")


@register_method("p_tuning", config=PromptEncoderConfig)
class PromptEncoder(BasePromptEncoder):
    """`embedding` [n, d], then `mlp_head` (after `lstm_head`); in inference mode only `embedding`, which holds P."""

    def __init__(self, config: PromptEncoderConfig):
        super().__init__()
        size = sizes(config)
        self.token_dim = self.input_size = self.output_size = size.width
        self.hidden_size = config.encoder_hidden_size or size.width
        self.total_virtual_tokens = size.rows
        self.encoder_type = config.encoder_reparameterization_type
        self.embedding = nn.Embedding(self.total_virtual_tokens, self.token_dim)
        if not config.inference_mode:
            self._make_heads(config)

    def _make_heads(self, config: PromptEncoderConfig) -> None:
        d, h = self.token_dim, self.hidden_size
        if self.encoder_type == PromptEncoderReparameterizationType.LSTM:
            layers, p = config.encoder_num_layers, config.encoder_dropout
            self.lstm_head = nn.LSTM(d, h, layers, dropout=p, bidirectional=True, batch_first=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, d))
        else:
            if config.encoder_num_layers != type(config).encoder_num_layers:
                warnings.warn(
                    f"encoder_num_layers={config.encoder_num_layers} has no effect with "
                    "encoder_reparameterization_type='MLP': the MLP always has two hidden layers.",
                    stacklevel=2,
                )
            self.mlp_head = nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, d))

    def forward(self, indices: torch.Tensor, task_ids: Any = None) -> torch.Tensor:
        x = self.embedding(indices)
        if "lstm_head" in self._modules:
            x = self.lstm_head(x)[0]
        return self.mlp_head(x) if "mlp_head" in self._modules else x

    def load(self, state_dict: dict[str, torch.Tensor]) -> None:
        if "mlp_head" in self._modules:
            warnings.warn(
                "The stored prompt is the output of the p-tuning network, which is not stored: loaded into the input "
                "of this adapter's network. Use inference_mode=True for the prompt itself.",
                stacklevel=2,
            )
        super().load(state_dict)
