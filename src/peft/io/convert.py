# SPDX-License-Identifier: Apache-2.0
"""Adapters made for another layout of the same architecture: transformers 5 fused the experts of mixture models."""

from typing import Any

import torch


def convert_weights(model: Any, state: dict[str, torch.Tensor], adapter_name: str) -> dict[str, torch.Tensor]:
    """Adapter weights in the layout of the model in memory."""
    return state
