# SPDX-License-Identifier: Apache-2.0
"""DoRA: Weight-Decomposed Low-Rank Adaptation (arXiv 2402.09353).

V = W + s·B A, g = m / ‖V_row‖ (no gradient through the norm), y = (g ⊙ V) x + b. The norm never forms B A, see
`ops.dora`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ....core import kinds
from ....ops import dora as ops
from .base import LoraVariant


class Magnitude(nn.Module):
    """Holds the trained row norms m."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


class Dora(LoraVariant):
    name = "DoRA"
    kinds = (kinds.Linear, kinds.Conv1D, kinds.Conv2d, kinds.Conv3d, kinds.Conv1d, kinds.Embedding)
    quantised = True
    additive = False

    @classmethod
    def check(cls, cfg: Any, key: str, kind: Any, layer_storage: Any, base: nn.Module) -> None:
        super().check(cfg, key, kind, layer_storage, base)
        if not layer_storage.readable:
            raise ValueError(
                f"DoRA needs the weight of {key!r}, but {layer_storage.label} cannot be read. Set use_dora=False."
            )
        if getattr(base, "groups", 1) != 1:
            raise ValueError(
                f"DoRA needs the norm of the changed weight, and a delta of the grouped convolution {key!r} has no "
                "weight form. Set use_dora=False or leave it out."
            )

    def create(self, layer: Any, name: str, cfg: Any) -> None:
        A, _, _ = self._matrices(layer, name)
        size = (1, layer.out_features, *(1,) * layer.kind.ndim) if layer.kind.is_conv else (layer.out_features,)
        weight = layer._reference_tensor(layer.get_base_layer())
        if A.device.type == "meta" or weight is None or weight.device.type == "meta":
            m = torch.empty(size, device="meta" if A.device.type == "meta" else None)
        else:
            m = self.norm(layer, name, fresh=True).view(size)
        layer.lora_magnitude_vector[name] = Magnitude(m.to(A.dtype))

    def _matrices(self, layer: Any, name: str) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """A [r, in·k], B [out, r], s."""
        A, B, s, _ = layer.plain_factors(name)
        return A.flatten(1), B.flatten(1), s

    @torch.no_grad()
    def norm(self, layer: Any, name: str, fresh: bool = False) -> torch.Tensor:
        """‖W + s·B A‖ per output row, [out], in float32."""
        from .. import dora as address

        cached = address.ENABLE_DORA_CACHING and not layer.training and not fresh
        store = layer.__dict__.setdefault("_norm_cache", {}) if cached else {}
        if name not in store:
            A, B, s = self._matrices(layer, name)
            W = layer.base_weight().flatten(1)
            store[name] = ops.dora_norm(W, A.to(W.device), B.to(W.device), s, self._row_norms(layer, W))
        return store[name]

    @staticmethod
    def _row_norms(layer: Any, W: torch.Tensor) -> torch.Tensor | None:
        """‖W_i‖², kept on the layer as long as the base weight is the same."""
        weight = layer._reference_tensor(layer.get_base_layer())
        if torch.compiler.is_compiling() or type(weight) is not nn.Parameter or weight.is_inference() or weight.is_meta:
            return None
        key = (weight.data_ptr(), weight._version, weight.device, weight.dtype)
        kept = layer.__dict__.get("_row_norms")
        if kept is None or kept[0] != key:
            kept = layer.__dict__["_row_norms"] = (key, ops.row_norms_sq(W))
        return kept[1]

    def _gain(self, layer: Any, name: str) -> torch.Tensor:
        """g [out], in the wider of both dtypes."""
        m = layer.lora_magnitude_vector[name].weight.flatten()
        return ops.gain(m, self.norm(layer, name).to(m.device))

    # ---- forward
    def fuses(self, layer: Any) -> bool:
        return layer.kind is kinds.Linear

    def fused(self, layer: Any, name: str, x: torch.Tensor) -> torch.Tensor:
        base, m = layer.base_layer, layer.lora_magnitude_vector[name].weight
        return ops.dora_linear(
            x, base.weight, base.bias, layer.plain_factors(name), m, self.norm(layer, name), layer.training
        )

    def advance(self, layer: Any, name: str, x: torch.Tensor, y: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """y + (g - 1) ⊙ (y - b) + g ⊙ s·B(A(x)); with dropout acting the fresh product W drop(x) stands for y - b."""
        kind = layer.kind
        if kind is kinds.Embedding:
            return self._gain(layer, name) * (y + layer.delta(name, x, base))
        if kind.is_linear:
            f, m = layer.plain_factors(name), layer.lora_magnitude_vector[name].weight
            return ops.dora_accumulate(
                y, x, layer.base_bias(), f, m, self.norm(layer, name), layer.training,
                product=lambda h: F.linear(h, layer.base_weight().to(h.dtype)),
            )  # fmt: skip
        return self._advance_conv(layer, name, x, y)

    def _advance_conv(self, layer: Any, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        kind, drop, module = layer.kind, layer.lora_dropout[name], layer.get_base_layer()
        g, bias = kind.per_feature(self._gain(layer, name), y), layer.base_bias()
        if layer.training and drop.training and getattr(drop, "p", 0.0) > 0:
            x = drop(x)
            inner = kind.call(module, x, layer.base_weight().to(x.dtype))
        else:
            inner = y if bias is None else y - kind.per_feature(bias, y)
        delta = layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]
        return y + (g - 1) * inner + g * delta

    def map_weight(self, layer: Any, name: str, w: torch.Tensor) -> torch.Tensor:
        return self._gain(layer, name).view(-1, *(1,) * (w.dim() - 1)) * w
