# SPDX-License-Identifier: Apache-2.0
"""EVA: putting the components into the layers of a LoRA model, with the ranks that they ask for."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ...core.tuner import TunerModel
from .eva import (
    _lora_layers,
    forward_fn_dict,
    get_eva_state_dict,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from .layer import LoraLayer


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable | None = None,
    eva_state_dict: dict[str, torch.Tensor] | None = None,
    forward_fn: Callable | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable | dict[str, Callable] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Initialise a LoRA adapter by EVA, from data or from a result of `get_eva_state_dict`.

    Layers get the ranks found; those of rank 0 lose the adapter. The configuration is updated accordingly.
    """
    tuner = _tuner(model)
    if len(tuner.active_adapters) > 1:
        raise ValueError("`initialize_lora_eva_weights` currently only works with a single active adapter.")
    cfg: Any = tuner.peft_config.get(adapter_name)
    if cfg is None:
        raise ValueError(f"Adapter {adapter_name!r} does not exist; there are {sorted(tuner.peft_config)}.")
    if cfg.init_lora_weights != "eva":
        raise ValueError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`.")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            cfg,
            forward_fn=forward_fn,
            prepare_model_inputs_fn=prepare_model_inputs_fn,
            prepare_layer_inputs_fn=prepare_layer_inputs_fn,
            adapter_name=adapter_name,
            gather_distributed_inputs=gather_distributed_inputs,
            show_progress_bar=show_progress_bar,
        )
    _load(model, tuner, adapter_name, cfg, eva_state_dict)


def _tuner(model: nn.Module) -> TunerModel:
    found = getattr(model, "base_model", model)
    if not isinstance(found, TunerModel):
        raise ValueError("model must be a PeftModel (made by get_peft_model)")
    return found


@torch.no_grad()
def _load(model: nn.Module, tuner: TunerModel, name: str, cfg: Any, state: dict[str, torch.Tensor]) -> None:
    layers = _lora_layers(model, name)
    found = {_key(k): v for k, v in state.items()}
    missing, kept = [], []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for key, layer in layers.items():
        plain = _key(key)
        A = found.get(plain)
        if A is None:
            missing.append(plain)
            layer.update_layer(name, _like(layer, name, cfg, layer.r[name], layer.lora_alpha[name], True))
            kept.append(plain)
            continue
        r, alpha = A.shape[0], layer.lora_alpha[name]
        if r == 0:
            _remove(model, key, layer, name)
            continue
        if r != layer.r[name]:
            if cfg.eva_config.adjust_scaling_factors:
                alpha *= r / layer.r[name]
            dtype, flag = layer.factor_tensors(name)[0].dtype, layer.factor_tensors(name)[0].requires_grad
            layer.update_layer(name, _like(layer, name, cfg, r, alpha, "eva"))
            for parameter in layer.parameters_of(name):
                parameter.data = parameter.data.to(dtype)
                parameter.requires_grad_(flag)
        if r != cfg.r:
            ranks[plain] = r
        if alpha != cfg.lora_alpha:
            alphas[plain] = alpha
        parameter, B = layer.factor_tensors(name)
        layer.set_factors(name, A.to(parameter.device, parameter.dtype), B)
        kept.append(plain)
    if missing:
        warnings.warn(
            f"The EVA state dict has no entry for {missing}: these layers get the default initialization.", stacklevel=4
        )
    tuner.forget_layers()
    others = [
        k
        for k, m in tuner.named_layers().items()
        if isinstance(m, LoraLayer) and name in m and k not in kept and m.kind.is_linear is False
    ]
    cfg.target_modules = kept + others
    cfg.rank_pattern, cfg.alpha_pattern = ranks, alphas


def _key(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


def _like(layer: LoraLayer, name: str, cfg: Any, r: int, alpha: float, init: Any) -> Any:
    return cfg.with_values(r=r, lora_alpha=alpha, init_lora_weights=init)


def _remove(model: nn.Module, key: str, layer: LoraLayer, name: str) -> None:
    """Take the adapter off a layer; the layer goes too if it was the last one."""
    layer.drop(name)
    if not layer.adapter_names:
        parent, _, leaf = key.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.base_layer)
