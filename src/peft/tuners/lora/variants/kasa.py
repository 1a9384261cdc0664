# SPDX-License-Identifier: Apache-2.0
"""KaSA: Knowledge-Aware Singular-Value Adaptation (arXiv 2412.06071).

The base loses its r smallest singular triplets once; then y = W x + s·B diag(d) A x, with d trained.
"""

from typing import Any

import torch
from torch import nn

from ....core import kinds
from ....core.slots import Slot
from ....ops.low_rank import Factors
from ..init import compute_weight
from .base import LoraVariant

DIAG = Slot("lora_diag", nn.ParameterDict, "trainable", saved=True)


class Kasa(LoraVariant):
    name = "KaSA"
    kinds = (kinds.Linear,)
    slots = (DIAG,)
    standalone = False  # it belongs to the truncated base

    @classmethod
    def check(cls, cfg: Any, key: str, kind: Any, layer_storage: Any, base: nn.Module) -> None:
        super().check(cfg, key, kind, layer_storage, base)
        n_out, n_in = kind.shape(base)
        if cfg.r >= min(n_out, n_in):
            raise ValueError(
                f"KaSA needs r < min(in_features, out_features) = {min(n_out, n_in)} at {key!r}, got r={cfg.r}."
            )

    def create(self, layer: Any, name: str, cfg: Any) -> None:
        layer.lora_diag[name] = nn.Parameter(torch.randn(cfg.r))
        weight = layer.kind.parameter(layer.get_base_layer())
        if weight.device.type != "meta":
            truncate(layer, cfg)

    def factors(self, layer: Any, name: str) -> Factors:
        f = layer.plain_factors(name)
        return Factors(f.A * layer.lora_diag[name][:, None], f.B, f.scale, f.dropout)


def truncate(layer: Any, cfg: Any) -> None:
    """Take the r smallest singular triplets out of the base weight."""
    W, r = compute_weight(layer, cfg).float(), cfg.r
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    dtype = layer.kind.parameter(layer.get_base_layer()).dtype
    layer.set_base_weight(layer.kind.stored((W - (U[:, -r:] * S[-r:]) @ Vh[-r:]).to(dtype)))


def loss(layer: Any, name: str, options: Any) -> torch.Tensor:
    """beta·Σ d² + gamma·(‖BᵀB - I‖ + ‖AAᵀ - I‖), in float32."""
    A, B, d = (t.float() for t in (*layer.factor_tensors(name), layer.lora_diag[name]))
    eye = torch.eye(len(d), device=d.device)
    spread = torch.linalg.matrix_norm(B.T @ B - eye) + torch.linalg.matrix_norm(A @ A.T - eye)
    return options.beta * d.square().sum() + options.gamma * spread
