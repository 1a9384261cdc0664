# SPDX-License-Identifier: Apache-2.0
"""`ensure_weight_tying` for adapted embeddings: the tied layers (lm_head) compute from the embedding's factors.

With embedding factors A [r, V], B [d, r] the tied linear layer has A' = Bᵀ [r, d] and B' = Aᵀ [V, r]: one set of
parameters, whose gradients add up. Files hold both forms.
"""

import contextlib
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ...core import kinds
from ...core.layer import AdapterLayer, dropout
from ...core.tied import embedding_name
from .layer import LoraLayer

if TYPE_CHECKING:
    from .model import LoraModel


class Transposed(nn.Module):
    """A factor that is the transposed factor of another layer; holds no parameter itself."""

    def __init__(self, source: LoraLayer, slot: str, name: str):
        super().__init__()
        self.__dict__["source"] = (source, slot, name)  # past registration: the parameter belongs to the source

    @property
    def weight(self) -> torch.Tensor:
        source, slot, name = self.source  # type: ignore[misc]
        return getattr(source, slot)[name].T  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight  # its dtype is the source's to choose
        return F.linear(x.to(weight.dtype), weight)


def tie_layers(
    tuner: "LoraModel", name: str, cfg: Any, layers: dict[str, AdapterLayer], undo: contextlib.ExitStack
) -> None:
    """Give adapter `name` to the layers tied to the embedding. `undo` gets what takes it back."""
    source = layers.get(embedding_name(tuner.model) or "")
    for key in sorted(cfg.target_modules_to_tie):
        module = layer = tuner.model.get_submodule(key)
        if not isinstance(source, LoraLayer) or source.kind is not kinds.Embedding:
            raise ValueError(f"`ensure_weight_tying` needs an adapted input embedding to tie {key!r} to.")
        if isinstance(layer, LoraLayer):
            undo.callback(layer.drop, name)
        else:
            layer = LoraLayer.wrap(module, tuner.switch)
            tuner.model.set_submodule(key, layer)
            undo.callback(tuner.model.set_submodule, key, module)
        _tie(layer, source, name, tuner.layer_config(cfg, key, module))
        layers[key] = layer


def _tie(layer: Any, source: LoraLayer, name: str, cfg: Any) -> None:
    for slot in ("r", "lora_alpha", "scaling"):
        getattr(layer, slot)[name] = getattr(source, slot)[name]
    layer.use_rslora[name], layer.lora_bias[name], layer.use_dora[name] = cfg.use_rslora, False, False
    layer.lora_dropout[name] = dropout(cfg.lora_dropout)
    layer.lora_A[name] = Transposed(source, "lora_embedding_B", name)
    layer.lora_B[name] = Transposed(source, "lora_embedding_A", name)
    layer._names[name] = None
    layer._seen = None


def tied_tensors(tuner: "LoraModel", name: str) -> dict[str, torch.Tensor]:
    """Tensors that files hold for the tied layers, by file key."""
    found: dict[str, torch.Tensor] = {}
    for key, layer in tuner.named_layers().items():
        for slot in ("lora_A", "lora_B") if isinstance(layer, LoraLayer) else ():
            container = getattr(layer, slot)
            if name in container and isinstance(container[name], Transposed):
                found[f"base_model.model.{key}.{slot}.weight"] = container[name].weight.detach().contiguous()
    return found
