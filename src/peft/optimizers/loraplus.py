# SPDX-License-Identifier: Apache-2.0
"""LoRA+: Efficient Low Rank Adaptation of Large Models, arXiv 2402.12354.

B is trained with `lr * loraplus_lr_ratio`, A with `lr`.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from ..peft_model import PeftModel

_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
_EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def create_loraplus_optimizer(
    model: "PeftModel", optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An `optimizer_cls` over the trainable parameters in four groups: A and others, embeddings, B, B without decay.

    Of `kwargs`, `loraplus_weight_decay` (0) is the weight decay of all groups but the last, `loraplus_lr_embedding`
    (1e-6) the learning rate of adapted embeddings; the rest goes to `optimizer_cls`. B stands for the LoRA B's and all
    one-dimensional parameters; those in layer norms and biases have no decay.
    """
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    lr_embedding = kwargs.pop("loraplus_lr_embedding", 1e-6)
    for name, rate in (("lr", lr), ("loraplus_lr_ratio", loraplus_lr_ratio), ("loraplus_lr_embedding", lr_embedding)):
        if rate < 0:
            raise ValueError(f"`{name}` must not be negative, got {rate}.")
    without_decay = _parameters_without_decay(model)
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "B no decay": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = next((part for part in reversed(name.split(".")) if part in _FACTORS), None)
        if factor in ("lora_embedding_A", "lora_embedding_B"):
            groups["embedding"].append(parameter)
        elif factor == "lora_B" or parameter.ndim == 1:
            groups["B no decay" if id(parameter) in without_decay else "B"].append(parameter)
        else:
            groups["A"].append(parameter)
    optimizer = optimizer_cls(
        [
            {"params": groups["A"], "weight_decay": decay, "lr": lr},
            {"params": groups["embedding"], "weight_decay": decay, "lr": lr_embedding},
            {"params": groups["B"], "weight_decay": decay, "lr": lr * loraplus_lr_ratio},
            {"params": groups["B no decay"], "weight_decay": 0.0, "lr": lr * loraplus_lr_ratio},
        ],
        lr=lr,  # type: ignore[call-arg]
        **kwargs,
    )
    if optimizer_cls.__name__ in _EIGHT_BIT:
        _keep_embeddings_in_32_bits(model)
    return optimizer


def _parameters_without_decay(model: nn.Module) -> set[int]:
    """Ids of biases and of parameters of layer norms (the classes that transformers counts as such, if it is there)."""
    utils = sys.modules.get("transformers.pytorch_utils")
    norms = tuple(getattr(utils, "ALL_LAYERNORM_LAYERS", None) or (nn.LayerNorm,))
    found = {id(parameter) for name, parameter in model.named_parameters() if "bias" in name}
    for module in model.modules():
        if isinstance(module, norms):
            found.update(map(id, module.parameters()))
    return found


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    bitsandbytes: Any = importlib.import_module("bitsandbytes")
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
