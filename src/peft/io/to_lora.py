# SPDX-License-Identifier: Apache-2.0
"""Adapters of other methods as a LoRA: per layer the best approximation of the delta weight with a given rank, by SVD.

ΔW = U Σ Vᵀ, B = U_k Σ_k, A = V_kᵀ, scaling 1. Where a method has low-rank factors of its own, ΔW = B' A', the SVD is
the one of the small product of their triangular QR factors, and ΔW is never formed.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..config import nearest
from ..core.aux_modules import ModulesToSaveWrapper, TrainableTokensWrapper
from ..core.layer import AdapterLayer
from .keys import PEFT_PREFIX, walk, wrapper_entries

Pair = tuple[torch.Tensor, torch.Tensor]


def save_as_lora(
    path: str | os.PathLike,
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """`convert_to_lora`, written to a folder that loads like any LoRA."""
    from .files import save_adapter

    config, state = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    config.inference_mode = True
    save_adapter(path, state, config)


@torch.no_grad()
def convert_to_lora(
    model: Any,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """(LoraConfig, tensors) of a LoRA that approximates adapter `adapter_name`.

    `rank`: an int, or a float in (0, 1]: per layer the smallest rank that keeps this share of the squared singular
    values. `compile_kwargs`: options for torch.compile of the decomposition.
    """
    from tqdm import tqdm

    _check_rank(rank)
    config = (getattr(model, "peft_config", None) or {}).get(adapter_name)
    layers = _layers(model, adapter_name, config)
    split = decompose if compile_kwargs is None else torch.compile(decompose, **compile_kwargs)
    state: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in tqdm(layers, disable=not progressbar):
        B, A = _pair(layer, adapter_name, name, rank, split)
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = A, B
        ranks[name.removeprefix(PEFT_PREFIX)] = A.shape[0]
    for name, module in walk(model):
        if isinstance(module, ModulesToSaveWrapper):
            state.update((e.file, e.tensor.detach().clone()) for e in wrapper_entries(name, module, adapter_name))
    return _lora_config(config, rank, ranks), state


def _check_rank(rank: int | float) -> None:
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise ValueError(
                f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}."
            )
    elif rank == 0:
        raise ValueError("Passing a rank of 0 doesn't make sense, please pass a valid value.")
    elif rank < 0:
        raise ValueError(f"The rank must be positive, got {rank}.")


def _layers(model: nn.Module, adapter_name: str, config: Any) -> list[tuple[str, AdapterLayer]]:
    """The layers to convert, by module name; all refusals are here."""
    found: dict[str, AdapterLayer] = {}
    known: set[str] = set()
    for path, module in walk(model):
        if isinstance(module, TrainableTokensWrapper) and adapter_name in module.adapter_names:
            raise TypeError(f"The trained tokens of {path!r} cannot be converted to LoRA.")
        if not isinstance(module, AdapterLayer):
            continue
        known.update(module.adapter_names)
        if adapter_name not in module:
            continue
        path = path.replace(".base_layer", "")
        if path in found or not module.supports_lora_conversion(adapter_name):
            why = (
                "it is adapted twice"
                if path in found
                else f"{module.method_name} on {type(module.get_base_layer()).__name__}"
            )
            raise TypeError(f"Some module types on this model do not support LoRA conversion: {path!r} ({why}).")
        found[path] = module
    if known and not found:
        raise ValueError(f"There is no adapter {adapter_name!r}, only {sorted(known)}.{nearest(adapter_name, known)}")
    if not found:
        raise TypeError("Could not detect any layer that supports LoRA conversion.")
    _check_source(config, found, adapter_name)
    return list(found.items())


def _check_source(config: Any, layers: dict[str, AdapterLayer], adapter_name: str) -> None:
    bias = getattr(config, "bias", getattr(config, "lora_bias", "none"))
    if bias not in ("none", False) or any(layer.delta_bias(adapter_name) is not None for layer in layers.values()):
        which = "lora_bias=True" if bias in ("none", False) else f"bias={bias!r}"
        raise ValueError(f"The adapter trains biases ({which}), which cannot be part of the converted LoRA.")
    if any("lora_A" in layer.slots for layer in layers.values()):
        warnings.warn(
            "Converting a LoRA adapter to a LoRA adapter is not useful unless its rank is to be reduced.", stacklevel=4
        )


def _pair(
    layer: AdapterLayer, adapter: str, name: str, rank: int | float, split: Callable[..., tuple[torch.Tensor, ...]]
) -> Pair:
    """(B [out, k], A [k, in]) in the dtype of the adapter."""
    exact = getattr(type(layer), "lora_factors", None)  # methods whose delta is a LoRA of a known rank
    pair = exact(layer, adapter) if exact is not None else None
    if pair is not None:
        return pair[0].contiguous(), pair[1].contiguous()
    factors = _low_rank(layer, adapter)
    if factors is None:
        delta = layer.kind.canonical(layer.get_delta_weight(adapter))
        dtype, shape = delta.dtype, delta.shape
    else:
        dtype, shape = factors[0].dtype, (factors[0].shape[0], factors[1].shape[1])
    if not isinstance(rank, float) and rank > min(shape):
        raise ValueError(
            f"The chosen rank {rank} is larger than the weight shape ({min(shape)}) of {name!r}, please choose a lower "
            "rank."
        )
    U, S, Vh = split(delta.float()) if factors is None else decompose_product(factors[0].float(), factors[1].float())
    k = rank if not isinstance(rank, float) else _enough(S, rank)
    B, A = U[:, :k] * S[:k], Vh[:k]
    if A.shape[0] < k:  # a product of smaller rank: nothing is left for the other columns
        A = torch.cat([A, A.new_zeros(k - A.shape[0], A.shape[1])])
        B = torch.cat([B, B.new_zeros(B.shape[0], k - B.shape[1])], dim=1)
    return B.to(dtype).contiguous(), A.to(dtype).contiguous()


def _low_rank(layer: AdapterLayer, adapter: str) -> Pair | None:
    """(s B', A') of a delta that is such a product, when that is the smaller problem."""
    if not layer.factored or getattr(layer, "lora_variant", {}).get(adapter) is not None:
        return None
    A, B, scale, _ = layer.factors(adapter)
    return (B * scale, A) if A.shape[0] < min(B.shape[0], A.shape[1]) else None


def decompose(delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Thin SVD."""
    return torch.linalg.svd(delta, full_matrices=False)


def decompose_product(B: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Thin SVD of B A [out, R] [R, in] in O((out + in) R²)."""
    Q_b, R_b = torch.linalg.qr(B)
    Q_a, R_a = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_b @ R_a.T)
    return Q_b @ U, S, Vh @ Q_a.T


def _enough(S: torch.Tensor, share: float) -> int:
    """Smallest k whose first k squared singular values make up `share` of the sum."""
    energy = S.square().cumsum(0)
    return min(int((energy < share * energy[-1]).sum()) + 1, len(S))


def _lora_config(config: Any, rank: int | float, ranks: dict[str, int]) -> Any:
    from ..tuners.lora import LoraConfig

    targets = getattr(config, "target_modules", None)
    common = 1 if isinstance(rank, float) else int(rank)
    every = isinstance(rank, float) or isinstance(targets, str)  # a regex cannot be extended by names
    pattern = {n: r for n, r in ranks.items() if every or r != common}
    lora = LoraConfig(r=common, lora_alpha=common, rank_pattern=pattern, alpha_pattern=dict(pattern))
    lora.target_modules = targets if isinstance(targets, str) else set(targets or ()) | set(ranks)
    for field in (
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "base_model_name_or_path",
        "revision",
        "exclude_modules",
    ):
        value = getattr(config, field, None)
        if value:
            setattr(lora, field, value)
    return lora
