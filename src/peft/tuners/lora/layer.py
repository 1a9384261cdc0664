# SPDX-License-Identifier: Apache-2.0
"""LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685).

y = W x + b + s·B A dropout(x),  s = alpha / r  (rsLoRA, arXiv 2312.03732: alpha / sqrt(r)).
"""

import math
from typing import Any

import torch
from torch import nn

from ...core import kinds
from ...core.layer import AdapterLayer, dropout, dropout_p
from ...core.slots import Aux, BareTrainable, Trainable
from ...ops.low_rank import Factors


class LoraLayer(AdapterLayer):
    """Low-rank delta on any kind of layer."""

    lora_A: Trainable[nn.ModuleDict]  # weight [r, in] (convolutions: [r, in, *kernel])
    lora_B: Trainable[nn.ModuleDict]  # weight [out, r]
    lora_embedding_A: Trainable[nn.ParameterDict]  # [r, num_embeddings]
    lora_embedding_B: Trainable[nn.ParameterDict]  # [dim, r]
    lora_magnitude_vector: BareTrainable[nn.ModuleDict]
    r: Aux[dict]
    lora_alpha: Aux[dict]
    scaling: Aux[dict]
    lora_dropout: Aux[nn.ModuleDict]
    use_rslora: Aux[dict]
    lora_bias: Aux[dict]
    use_dora: Aux[dict]
    kinds = (kinds.Linear, kinds.Conv1D, kinds.Conv2d, kinds.Conv3d, kinds.Conv1d, kinds.Embedding)

    def create(self, name: str, cfg: Any) -> None:
        r = cfg.r
        if r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {r}")
        self.r[name], self.lora_alpha[name], self.use_rslora[name], self.lora_bias[name] = r, cfg.lora_alpha, cfg.use_rslora, cfg.lora_bias
        self.scaling[name] = cfg.lora_alpha / (math.sqrt(r) if cfg.use_rslora else r)
        self.lora_dropout[name] = dropout(cfg.lora_dropout)
        self.use_dora[name] = cfg.use_dora
        if self.kind is kinds.Embedding:
            self.lora_embedding_A[name] = nn.Parameter(torch.randn(r, self.in_features))
            self.lora_embedding_B[name] = nn.Parameter(torch.randn(self.out_features, r))
            if cfg.init_lora_weights:
                nn.init.zeros_(self.lora_embedding_A[name])
                nn.init.normal_(self.lora_embedding_B[name])
            return
        A, B = self.kind.low_rank(self.get_base_layer(), r, cfg.lora_bias)
        self.lora_A[name], self.lora_B[name] = A, B
        if A.weight.device.type != "meta" and cfg.init_lora_weights:
            nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
            nn.init.zeros_(B.weight)
            if cfg.lora_bias:
                nn.init.zeros_(B.bias)

    def factors(self, name: str) -> Factors:
        return Factors(self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name], dropout_p(self.lora_dropout[name]))

    def delta(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.kind is kinds.Embedding:
            base = self.get_base_layer()
            rows = self.kind.look_up(base, x, self.lora_embedding_A[name].T) @ self.lora_embedding_B[name].T
            scale = self.kind.scale(base)
            return rows * self.scaling[name] * (1 if scale is None else scale)
        return self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]
