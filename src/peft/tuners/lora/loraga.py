# SPDX-License-Identifier: Apache-2.0
"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation (arXiv 2407.05000): the pass that measures gradients.

`preprocess_loraga` leaves the mean gradient of each target weight on the layer; `init.lora_ga` makes the factors from
it.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...core import kinds
from . import data_init
from .config import LoraConfig

_SUFFIX = "._peft_loraga_grad"


def preprocess_loraga(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], None], cache_file: str | None = None
) -> None:
    """Measure the gradients of the target layers, before `get_peft_model` with init_lora_weights="lora_ga".

    `train_step` runs forward and backward passes on some batches; no optimiser step. `cache_file` is read if it
    exists, else written.
    """
    if lora_config.lora_ga_config is None:
        raise ValueError(
            "If you want to use LoRA-GA, please initialize the LoraConfig with lora_ga_config=LoraGAConfig()."
        )
    layers = data_init.target_layers(model, lora_config)
    data_init.refuse_quantised(layers, "LoRA-GA")
    if not layers:
        raise ValueError(
            "LoRA-GA found no supported target layer (nn.Linear or Conv1D) in the model; check `target_modules`."
        )
    if cache_file and os.path.exists(cache_file) and os.path.getsize(cache_file):
        stored = data_init.load(cache_file)
        if missing := [n for n in layers if n + _SUFFIX not in stored]:
            raise ValueError(f"The LoRA-GA cache file lacks {missing[0]!r}: it was made for other layers.")
        found = {n: stored[n + _SUFFIX] for n in layers}
    else:
        found = _measure(model, layers, train_step)
        if cache_file:
            data_init.save(cache_file, {n + _SUFFIX: g.cpu() for n, g in found.items()})
    for name, layer in layers.items():
        layer._peft_loraga_grad = found[name].to(_weight(layer).device)  # type: ignore[assignment]


def _weight(layer: nn.Module) -> Any:
    kind: Any = kinds.kind_of(layer)
    return kind.parameter(layer)


def _measure(model: nn.Module, layers: dict[str, nn.Module], train_step: Callable[[], None]) -> dict[str, torch.Tensor]:
    """Mean over the backward passes of the gradient of each weight. Gradients and flags of the model are put back."""
    weights = {name: _weight(layer) for name, layer in layers.items()}
    sums: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys(weights, 0)

    def collect(name: str) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            sums[name] = parameter.grad if name not in sums else sums[name] + parameter.grad
            counts[name] += 1
            parameter.grad = None  # only one layer's gradient lives at a time beside the sums

        return hook

    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for p, _, _ in before:
        p.requires_grad_(False)
        p.grad = None
    for weight in weights.values():
        weight.requires_grad_(True)
    handles = [w.register_post_accumulate_grad_hook(collect(n)) for n, w in weights.items()]
    try:
        with data_init.hooks(handles), data_init.mode(model, True):
            train_step()
    finally:
        for p, flag, grad in before:
            p.requires_grad_(flag)
            p.grad = grad
    if unused := [n for n, c in counts.items() if c == 0]:
        raise ValueError(f"`train_step` gave no gradient for {unused[0]!r}; does it call backward()?")
    return {n: sums[n] / counts[n] for n in weights}
