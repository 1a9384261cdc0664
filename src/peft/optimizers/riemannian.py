# SPDX-License-Identifier: Apache-2.0
"""Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, arXiv 2402.02347.

Before each step of any first-order optimizer: g_A <- (B^T B + reg I)^+ g_A and g_B <- g_B (A A^T + reg I)^+, both with
the factors before the step.
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from ._gram import refuse_block_diagonal, regularised_inverses

if TYPE_CHECKING:
    from ..peft_model import PeftModel

Pairs = list[tuple[nn.Parameter, nn.Parameter]]


def _collect_lora_pairs(model: nn.Module) -> Pairs:
    """Trainable two-dimensional (A [r, in], B [out, r]) of all adapters."""
    named = dict(model.named_parameters())
    pairs = []
    for name, A in named.items():
        B = named.get(name.replace(".lora_A.", ".lora_B.")) if ".lora_A." in name else None
        if B is not None and A.requires_grad and B.requires_grad and A.dim() == 2 and B.dim() == 2:
            pairs.append((A, B))
    return pairs


@torch.no_grad()
def _precondition(pairs: Pairs, reg: float) -> None:
    """Overwrite the gradients of pairs of factors by the preconditioned ones."""
    of_a = [(A, B) for A, B in pairs if A.grad is not None]
    of_b = [(A, B) for A, B in pairs if B.grad is not None]
    for (A, _), inverse in zip(of_a, regularised_inverses([B.T for _, B in of_a], reg), strict=True):
        A.grad.copy_(inverse @ A.grad.to(inverse.dtype))  # type: ignore[union-attr]
    for (_, B), inverse in zip(of_b, regularised_inverses([A for A, _ in of_b], reg), strict=True):
        B.grad.copy_(B.grad.to(inverse.dtype) @ inverse)  # type: ignore[union-attr]


def create_riemannian_optimizer(
    model: "PeftModel", optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An `optimizer_cls` over the trainable parameters that preconditions the gradients of LoRA factors in `step`.

    The gradients are overwritten; clip them before. With B = 0 at the start, those of A grow by 1 / reg.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls}.")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{optimizer_cls.__name__} requires a closure and re-evaluates the objective inside step(); the Riemannian "
            "preconditioner would be recomputed each iteration, invalidating the optimizer's curvature or line-search "
            "state. Use an optimizer whose step() has an optional closure (SGD, AdamW, etc)."
        )
    refuse_block_diagonal(model, "The Riemannian preconditioner")
    pairs = _collect_lora_pairs(model)
    if not pairs:
        raise ValueError(
            "create_riemannian_optimizer did not find any trainable lora_A/lora_B parameter pairs on the model. The "
            "Riemannian preconditioner only applies to LoRA-style adapters."
        )

    class RiemannianPreconditionedOptimizer(optimizer_cls):
        def step(self, closure: Callable | None = None) -> Any:  # type: ignore[override]
            if closure is not None:
                raise ValueError(
                    "The Riemannian-preconditioned optimizer does not support closures. Closures re-evaluate the "
                    "objective inside step(), which would overwrite the preconditioned gradients before the base "
                    "optimizer consumes them."
                )
            _precondition(pairs, reg)
            return super().step()

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return RiemannianPreconditionedOptimizer(trainable, lr=lr, **kwargs)  # type: ignore[call-arg]
