# SPDX-License-Identifier: Apache-2.0
"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation (arXiv 2407.05000): the pass that measures gradients.

`preprocess_loraga` leaves the mean gradient of each target weight on the layer; `init.lora_ga` makes the factors from
it.
"""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import nn

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
    found = data_init.cached(cache_file, [n + _SUFFIX for n in layers])
    if found is None:
        found = _measure(model, {n + _SUFFIX: layer.weight for n, layer in layers.items()}, train_step)  # type: ignore
        data_init.save(cache_file, found)
    for name, layer in layers.items():
        layer._peft_loraga_grad = found[name + _SUFFIX].to(layer.weight.device)  # type: ignore


def _measure(
    model: nn.Module, weights: dict[str, nn.Parameter], train_step: Callable[[], None]
) -> dict[str, torch.Tensor]:
    """Mean over the backward passes of the gradient of each weight. Gradients and flags of the model are put back."""
    sums: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys(weights, 0)

    def collect(name: str, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        sums[name] = weight.grad if name not in sums else sums[name] + weight.grad
        counts[name] += 1
        weight.grad = None  # only one layer's gradient lives at a time beside the sums

    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for p, _, _ in before:
        p.requires_grad_(False)
        p.grad = None
    try:
        with contextlib.ExitStack() as hooks, data_init.mode(model, True):
            for name, weight in weights.items():
                weight.requires_grad_(True)
                hooks.enter_context(weight.register_post_accumulate_grad_hook(functools.partial(collect, name)))
            train_step()
    finally:
        for p, flag, grad in before:
            p.requires_grad_(flag)
            p.grad = grad
    if unused := [n for n, c in counts.items() if c == 0]:
        raise ValueError(
            f"`train_step` gave no gradient for {unused[0].removesuffix(_SUFFIX)!r}; does it call backward()?"
        )
    return {n: sums[n] / counts[n] for n in weights}
