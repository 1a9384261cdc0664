# SPDX-License-Identifier: Apache-2.0
"""Glue to DeepSpeed, accelerate-style device maps, bitsandbytes, tensor parallelism, and initialisation on meta."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


# ---- DeepSpeed ZeRO-3


def check_deepspeed_zero3_enabled() -> bool:
    """Whether the process runs under a ZeRO-3 configuration; without transformers imported there can be none."""
    if "transformers" not in sys.modules:
        return False
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


@contextmanager
def gather_params_ctx(
    param: nn.Parameter | Iterable[nn.Parameter],
    modifier_rank: int | None = 0,
    fwd_module: nn.Module | None = None,
) -> Iterator[None]:
    """Inside, parameters partitioned by ZeRO-3 are whole; rank `modifier_rank` may change them. Else does nothing."""
    if not check_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed  # type: ignore[import-not-found]

    with deepspeed.zero.GatheredParameters(param, modifier_rank=modifier_rank, fwd_module=fwd_module):
        yield


# ---- quantised weights


def get_bnb_param_type(param: nn.Parameter) -> Literal[False, "4bit", "8bit"]:
    """Which bitsandbytes parameter this is, judged by its class name so that nothing needs to be imported."""
    return {"Params4bit": "4bit", "Int8Params": "8bit"}.get(type(param).__name__, False)  # type: ignore[return-value]


def dequantize_module_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a module as floats: a plain Parameter as it is, a quantised one dequantised (HQQ, torchao, bnb)."""
    if hasattr(module, "W_q"):  # HQQ keeps its packed weight under this name
        return module.dequantize()  # type: ignore[operator]
    weight = module.weight
    if type(weight.data if isinstance(weight, nn.Parameter) else weight).__module__.startswith("torchao."):
        return weight.dequantize()  # type: ignore[operator]
    if not isinstance(weight, nn.Parameter):
        if isinstance(weight, torch.Tensor):
            return weight  # Parameter-like views, FSDP1
        raise TypeError(f"Input weight should be of type nn.Parameter, got {type(weight)} instead")
    return dequantize_bnb_weight(weight, state=getattr(module, "state", None))


def dequantize_bnb_weight(weight: nn.Parameter, state: Any = None) -> torch.Tensor:
    """A bitsandbytes weight as floats; anything else as it is. 8-bit weights need the `state` of their layer."""
    from ..storage.bnb import INT4, INT8

    kind = get_bnb_param_type(weight)
    if not kind:
        return weight
    if kind == "4bit":
        return INT4.dequantise(None, weight)
    if state is None:
        raise ValueError("No `state` was passed for bnb 8bit quantized weights. Please open an issue.")
    if state.SCB is None:
        state.SCB = weight.SCB  # type: ignore[attr-defined]
    return INT8.dequantise(None, (weight.data, state.SCB))


# ---- device maps

_BLOCK_INDEX = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)(?=\.|$)")
_ANY_INDEX = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def get_layer_device_map(model: Any) -> dict[int, int | str]:
    """{layer index: device that computes it} of a dispatched model; layers offloaded to cpu or disk run on the first
    other device of the map."""
    device_map = model.hf_device_map
    offload = ("cpu", "disk")
    main = next((d for d in device_map.values() if d not in offload), "cpu")  # cpu: everything is offloaded
    computed_on = {name: main if d in offload else d for name, d in device_map.items()}
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    if list(computed_on) == [""]:
        return dict.fromkeys(range(count), computed_on[""])
    layers: dict[int, int | str] = {}
    for name, device in computed_on.items():
        found = _BLOCK_INDEX.search(name) or _ANY_INDEX.search(name)
        if found:
            layers[int(found[1])] = device
    for index in range(count):
        if index not in layers:
            raise RuntimeError(f"layer {index} has not been mapped to a device.")
    return {index: layers[index] for index in range(count)}


def map_cache_to_layer_device_map(model: Any, cache: Any) -> None:
    """Move the keys and values of each layer to the device of the layer, where the model has an `hf_device_map`."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(cache, transformers.Cache) or not getattr(model, "hf_device_map", None):
        return
    if isinstance(cache, transformers.EncoderDecoderCache):
        map_cache_to_layer_device_map(model, cache.self_attention_cache)
        return
    devices = get_layer_device_map(model)
    for index, layer in enumerate(cache.layers):
        if getattr(layer, "keys", None) is not None:
            layer.keys, layer.values = layer.keys.to(devices[index]), layer.values.to(devices[index])


# ---- initialisation on meta


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Inside, parameters of new modules are on the meta device; `include_buffers` also buffers and new tensors."""
    if include_buffers:
        with torch.device("meta"):  # torch's own mode: every factory function
            yield
        return
    plain = nn.Module.register_parameter

    def register_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        plain(module, name, param)
        if param is not None and not param.is_meta:
            module._parameters[name] = type(param)(param.to("meta"), requires_grad=param.requires_grad)

    try:
        nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


_PLAIN_REGISTER_PARAMETER = nn.Module.register_parameter


@contextmanager
def _skip_init_on_device() -> Iterator[None]:
    active = nn.Module.register_parameter
    try:
        nn.Module.register_parameter = _PLAIN_REGISTER_PARAMETER  # type: ignore[method-assign]
        yield
    finally:
        nn.Module.register_parameter = active  # type: ignore[method-assign]


def skip_init_on_device(func: Callable) -> Callable:
    """Decorator: the function ignores a surrounding `init_empty_weights`."""
    return _skip_init_on_device()(func)


# ---- tensor parallelism


@dataclass
class TpInfo:
    """How a model is sharded: plan name per module pattern, the mesh, and the number of shards."""

    tp_plan: dict[str, str]
    device_mesh: "DeviceMesh"
    tp_size: int


def dtensor_from_local_like(local_tensor: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """`local_tensor` as a DTensor placed as `ref` is (or itself, where `ref` is no DTensor)."""
    if not hasattr(ref, "placements"):
        return local_tensor
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local_tensor, ref.device_mesh, ref.placements, run_check=False)  # type: ignore[attr-defined]
