# SPDX-License-Identifier: Apache-2.0
"""LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning, arXiv 2308.03303.

A is frozen. The gradient of B becomes the one whose delta is closest to the full gradient:
g_B <- g_B (A A^T + 1e-8 I)^+ / s^2. Then AdamW.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..config import positive
from ._gram import refuse_block_diagonal, regularised_inverses

if TYPE_CHECKING:
    from ..peft_model import PeftModel

_A, _B = ("lora_A", "lora_embedding_A"), ("lora_B", "lora_embedding_B")
_REG = 1e-8


class LoraFAOptimizer(Optimizer):
    """AdamW that projects the gradients of LoRA B's.

    Every parameter group needs `names` and `scaling_factors` (one per parameter, None outside of LoRA). Pairs are found
    by name: `<layer>.lora_A.<adapter>` with `<layer>.lora_B.<adapter>`.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ):
        if lr < 0.0:
            raise ValueError(f"Invalid learning rate: {lr} - should be >= 0.0")
        for beta in betas:
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter: {beta} - should be in [0.0, 1.0)")
        if not eps >= 0.0:
            raise ValueError(f"Invalid epsilon value: {eps} - should be >= 0.0")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)
        self._warned = False

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:  # type: ignore[override]
        """One optimizer step; `closure` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _scalings(self, group: dict[str, Any]) -> list[float | None]:
        if "scaling_factors" in group:
            return group["scaling_factors"]
        if "scaling_factor" not in group:
            raise KeyError("Expected optimizer param group to define `scaling_factors`.")
        if not self._warned:
            self._warned = True
            warnings.warn(
                "`scaling_factor` is deprecated and will be removed after 2026-11-01. Please use `scaling_factors`"
                " instead.",
                FutureWarning,
                stacklevel=4,
            )
        return [group["scaling_factor"]] * len(group["params"])

    def _step_group(self, group: dict[str, Any]) -> None:
        scalings = self._scalings(group)
        keys = [_pair_key(name) for name in group["names"]]
        frozen = {key: p for (key, is_a), p in zip(keys, group["params"], strict=True) if is_a and key is not None}
        entries = zip(group["names"], keys, group["params"], scalings, strict=True)
        pairs, others = [], []
        for name, (key, is_a), parameter, scaling in entries:
            if parameter.grad is None or is_a:
                continue
            if key is not None and key in frozen:
                pairs.append((key, frozen[key], parameter, scaling))
            else:
                others.append((name, parameter))
        for (layer, _), A, _, _ in pairs:
            if A.dim() != 2:
                raise ValueError(
                    f"LoRA-FA supports linear and embedding layers; {layer} has a factor of shape {A.shape}."
                )
        states: Any = self.state  # keyed by names here, not by parameters
        inverses = regularised_inverses([A for _, A, _, _ in pairs], _REG)
        for (key, _, B, scaling), inverse in zip(pairs, inverses, strict=True):
            grad = B.grad.to(inverse.dtype)
            projected = (grad @ inverse).to(B.grad.dtype)
            if scaling:
                projected /= scaling**2
            self._adam(B, projected, states[self._state_key(key, frozen)], group, suffix="_B")
        for name, parameter in others:
            self._adam(parameter, parameter.grad, states[name], group)

    @staticmethod
    def _state_key(key: tuple[str, str], known: Iterable[tuple[str, str]]) -> str:
        """The published key, `<layer>.lora`, with the adapter's name where a layer has several."""
        layer, adapter = key
        several = sum(other == layer for other, _ in known) > 1
        return f"{layer}.lora.{adapter}" if several else f"{layer}.lora"

    @staticmethod
    def _adam(
        p: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any], suffix: str = ""
    ) -> None:
        mean_key, square_key = f"exp_avg{suffix}", f"exp_avg_sq{suffix}"
        if not state:
            state["step"] = 0
            state[mean_key], state[square_key] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean, square = state[mean_key], state[square_key]
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        size = group["lr"]
        if group["correct_bias"]:
            size *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        p.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"] > 0:
            p.add_(p, alpha=-group["lr"] * group["weight_decay"])


def _pair_key(name: str) -> tuple[tuple[str, str] | None, bool]:
    """((layer, adapter), is it the A) of a LoRA factor; (None, False) for other parameters."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part in _A or part in _B:
            rest = parts[position + 1 :]
            if rest and rest[-1] == "weight":
                rest = rest[:-1]
            if len(rest) == 1:
                return (".".join(parts[:position]), rest[0]), part in _A
    return None, False


def create_lorafa_optimizer(
    model: "PeftModel",
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """Freeze all LoRA A's of the model and return a `LoraFAOptimizer` over its parameters.

    Scalings are those of the layers; `r` and `lora_alpha` only give the old group entry `scaling_factor`.
    """
    refuse_block_diagonal(model, "LoRA-FA")
    if use_rslora is not None:
        _check_rslora(model, use_rslora)
    for name, parameter in model.named_parameters():
        if any(part in _A for part in name.split(".")):
            parameter.requires_grad = False
    positive("r", r)
    by_name = _scalings_by_parameter(model)
    parameters = dict(model.named_parameters())
    group = {
        "params": list(parameters.values()),
        "names": list(parameters),
        "scaling_factors": [by_name.get(name) for name in parameters],
        "scaling_factor": lora_alpha / (math.sqrt(r) if use_rslora else r),
    }
    return LoraFAOptimizer([group], lr=lr, weight_decay=weight_decay)


def _check_rslora(model: Any, use_rslora: bool) -> None:
    differ = [a for a in model.active_adapters if model.peft_config[a].use_rslora != use_rslora]
    if differ:
        raise ValueError(
            f"`use_rslora={use_rslora}` was passed to create_lorafa_optimizer, but the following active adapters have "
            f"`use_rslora` set differently in the model config: {differ}. Please configure rsLoRA via LoraConfig and "
            "remove the `use_rslora` argument from create_lorafa_optimizer as the parameter is deprecated."
        )
    warnings.warn(
        "`use_rslora` in create_lorafa_optimizer is deprecated and will be removed after 2026-11-01. Please configure"
        " rsLoRA via LoraConfig instead.",
        FutureWarning,
        stacklevel=3,
    )


def _scalings_by_parameter(model: nn.Module) -> dict[str, float]:
    """{parameter name: scaling of its adapter in its layer} of everything that LoRA layers hold besides their base."""
    found = {}
    for key, layer in model.named_modules():
        scaling = getattr(layer, "scaling", None)
        if not isinstance(scaling, dict) or not hasattr(layer, "lora_A"):
            continue
        for name, _ in layer.named_parameters():
            container, _, rest = name.partition(".")
            adapter = rest.removesuffix(".weight").removesuffix(".bias")
            if container != "base_layer" and adapter in scaling:
                found[f"{key}.{name}" if key else name] = scaling[adapter]
    return found
