# SPDX-License-Identifier: Apache-2.0
"""Intruder dimensions (LoRA vs Full Fine-tuning: An Illusion of Equivalence, arXiv 2410.21228).

Singular vectors of W + ΔW that are like none of W's are intruders. With u, σ, v of those among the leading ones, the
adapter becomes ΔW + (λ - 1) Σ σ u vᵀ, cut to its rank.
"""

from collections.abc import Callable
from typing import Any

import torch

from ...core.combine import low_rank_svd, split_svd
from ...utils.peft_types import PeftType
from .layer import LoraLayer


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> None:
    """Add (and activate) an adapter like `old_adapter_name` with its intruder dimensions scaled by `mitigation_lambda`.

    Of the `top_k` leading left singular vectors of the adapted weight, those are intruders whose cosine with every
    one of the base weight is below `threshold_epsilon`.
    """
    log = logging_sink or (lambda text: None)
    config = peft_model.peft_config.get(old_adapter_name)
    if config is None or config.peft_type != PeftType.LORA:
        raise ValueError(
            f"Intruder dimension reduction is implemented for LoRA only, {old_adapter_name!r} is no LoRA adapter."
        )
    if new_adapter_name in peft_model.peft_config:
        raise ValueError(f"The adapter {new_adapter_name!r} exists already; give another `new_adapter_name`.")
    if config.target_parameters or config.arrow_config:
        raise ValueError(
            f"Intruder dimension reduction needs a weight for each module; {old_adapter_name!r} adapts raw parameters "
            "(target_parameters) or routes to other adapters (arrow_config)."
        )
    reduced: dict[LoraLayer, tuple[torch.Tensor, torch.Tensor]] = {}
    for key, layer in peft_model.named_modules():
        if isinstance(layer, LoraLayer) and old_adapter_name in layer:
            factors = layer.static_factors(old_adapter_name)
            W, A, B = layer.base_weight().flatten(1).float(), factors.A, factors.B
            U, S, Vh = _intruders(W, W + layer.product(factors).flatten(1).float(), top_k, threshold_epsilon)
            log(f"{key}: {len(S)} intruder dimensions")
            if len(S):
                parts, weights = [(A, B, 1.0), (Vh, U * S, 1.0)], [1.0, (mitigation_lambda - 1) / float(factors.scale)]
                new_a, new_b = split_svd(*low_rank_svd(parts, weights), A.shape[0], balanced=True)
                A, B = new_a.reshape(A.shape), new_b.reshape(B.shape)
            reduced[layer] = A, B
    plain = config.init_lora_weights if isinstance(config.init_lora_weights, bool) else True
    peft_model.add_adapter(new_adapter_name, config.with_values(init_lora_weights=plain, use_bdlora=None))
    for layer, factors in reduced.items():
        own = (layer.parameters_of(name) for name in (old_adapter_name, new_adapter_name))
        for old, new in zip(*own, strict=True):  # biases, magnitudes, what variants train
            new.data = old.data.clone()
        if config.kasa_config:  # in the factors by now
            layer.lora_diag[new_adapter_name].fill_(1.0)  # type: ignore[operator]
        for parameter, value in zip(layer.factor_tensors(new_adapter_name), factors, strict=True):
            parameter.data = value.to(parameter.dtype).clone()
    peft_model.set_adapter(new_adapter_name)


def _intruders(
    W: torch.Tensor, M: torch.Tensor, top_k: int, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [out, k], S [k], Vh [k, in] of those of M's leading `top_k` directions that no left singular vector of
    W is like.
    """
    base = torch.linalg.svd(W, full_matrices=False).U
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    U, S, Vh = U[:, :top_k], S[:top_k], Vh[:top_k]
    found = (base.T @ U).abs().amax(0) < epsilon
    return U[:, found], S[found], Vh[found]
