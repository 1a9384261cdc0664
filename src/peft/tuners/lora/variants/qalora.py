# SPDX-License-Identifier: Apache-2.0
"""QA-LoRA (arXiv 2309.14717): y = W x + s·B A (pool(x)·in/g), inputs averaged over quantisation groups of size g.

GPTQ layers.
"""

from typing import Any

import torch
from torch import nn

from ....ops import low_rank
from .base import LoraVariant


class QALora(LoraVariant):
    name = "QA-LoRA"
    quantised = True
    standalone = False
    why_not_mergeable = "the delta would have to go into the quantisation parameters."

    def __init__(self, cfg: Any):
        self.group_size = cfg.qalora_group_size

    @classmethod
    def check(cls, cfg: Any, key: str, kind: Any, layer_storage: Any, base: nn.Module) -> None:
        super().check(cfg, key, kind, layer_storage, base)
        n_in = kind.shape(base)[1]
        if n_in % cfg.qalora_group_size:
            raise ValueError(
                f"in_features {n_in} of {key!r} must be divisible by qalora_group_size={cfg.qalora_group_size}."
            )

    def create(self, layer: Any, name: str, cfg: Any) -> None:
        layer.lora_A[name] = nn.Linear(layer.in_features // self.group_size, cfg.r, bias=False)
        layer.__dict__.setdefault("qalora_group_size", {})[name] = self.group_size

    def advance(self, layer: Any, name: str, x: torch.Tensor, y: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        f, groups = layer.plain_factors(name), layer.in_features // self.group_size
        if layer.training and f.dropout > 0.0:
            x = layer.lora_dropout[name](x)
        pooled = x.reshape(*x.shape[:-1], groups, self.group_size).mean(-1) * groups
        return low_rank.accumulate(y, pooled, (low_rank.Factors(f.A, f.B, f.scale),), layer.training)
