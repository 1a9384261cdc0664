# SPDX-License-Identifier: Apache-2.0
"""Small helpers around models: names, devices, tokens, and preparation for training."""

import functools
import inspect
import os
import sys
import warnings
from typing import Any

import torch
from torch import nn

from ..core.targets import published_names
from ._lazy import lazy_attributes, owners

# ---- modules and their names


def _is_valid_match(key: str, target_key: str) -> bool:
    """Whether `key` is `target_key` or ends with it at a dot."""
    return key == target_key or key.endswith("." + target_key)


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, last name) of a dotted key."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def _get_submodules_with_grandparent(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module | None, nn.Module, str]:
    """(parent, grandparent, module, last name) of a dotted key; a child of the root has the root as grandparent."""
    parent, module, name = _get_submodules(model, key)
    return parent, model.get_submodule(key.rpartition(".")[0].rpartition(".")[0]), module, name


def _get_input_embeddings_name(model: nn.Module, default: str | None = None) -> str | None:
    """Dotted name of the input embedding, `default` where the model does not say which one it is."""
    from ..core.tied import embedding_name

    return embedding_name(model, default)


def _get_no_split_modules(model: nn.Module) -> set[str]:
    """Class names of the blocks that must stay on one device, collected over all sub-models."""
    found: set[str] = set()
    for module in model.modules():
        found.update(getattr(module, "_no_split_modules", None) or ())
    return found


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Freeze the parameters of one adapter: those with its name as a part of their dotted name."""
    for name, parameter in model.named_parameters():
        if adapter_name in name.split("."):
            parameter.requires_grad = False


def transpose(weight: torch.Tensor, fan_in_fan_out: bool) -> torch.Tensor:
    """`weight.T` if `fan_in_fan_out`; a Parameter stays one."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def id_tensor_storage(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """(device, storage id, storage size): equal for tensors that share memory."""
    if tensor.device.type == "xla":
        import torch_xla  # type: ignore[import-not-found]

        return tensor.device, torch_xla._XLAC._xla_get_tensor_id(tensor), tensor.nelement() * tensor.element_size()
    try:
        storage = tensor.untyped_storage()
    except NotImplementedError:  # sparse tensors have several
        return tensor.device, id(tensor), tensor.nelement() * tensor.element_size()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def infer_device() -> str:
    """The accelerator to use by default: cuda, mps, mlu, xpu, npu or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    for name in ("mlu", "xpu", "npu"):  # modules that vendor packages add to torch
        backend = getattr(torch, name, None)
        if backend is not None and backend.is_available():
            return name
    return "cpu"


def str_to_bool(value: str) -> int:
    """1 or 0 for the usual spellings of true and false."""
    lower = value.lower()
    if lower in ("y", "yes", "t", "true", "on", "1"):
        return 1
    if lower in ("n", "no", "f", "false", "off", "0"):
        return 0
    raise ValueError(f"invalid truth value {value}")


# ---- inputs


def _get_batch_size(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> int:
    if input_ids is not None:
        return input_ids.shape[0]
    if inputs_embeds is not None:
        return inputs_embeds.shape[0]
    raise ValueError("You have to provide either input_ids or inputs_embeds")


def shift_tokens_right(input_ids: torch.Tensor, pad_token_id: int, decoder_start_token_id: int) -> torch.Tensor:
    """Labels -> decoder inputs: shifted by one, starting with `decoder_start_token_id`, -100 replaced by padding."""
    if pad_token_id is None:
        raise ValueError("self.model.config.pad_token_id has to be defined.")
    shifted = torch.roll(input_ids, 1, dims=1)
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == -100, pad_token_id)


def create_attention_mask(
    model: Any,
    *,
    model_input: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Any,
    cache_position: torch.Tensor | None,
    batch_size: int,
    sequence_length: int,
    position_ids: torch.Tensor | None,
) -> Any:
    """The mask that `generate` would create for the base model with a static cache: 4-D, or one per layer type."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    legacy = getattr(base, "_prepare_4d_causal_attention_mask_with_cache_position", None)
    if legacy is not None:
        longest = getattr(past_key_values, "get_max_cache_shape", None) or past_key_values.get_max_length  # newer name
        return legacy(
            attention_mask,
            sequence_length=sequence_length,
            target_length=longest(),
            dtype=base.dtype,
            cache_position=cache_position,
            batch_size=batch_size,
            config=base.config,
            past_key_values=past_key_values,
        )
    from transformers.masking_utils import create_masks_for_generate

    create = getattr(base, "create_masks_for_generate", create_masks_for_generate)
    shape = (batch_size, sequence_length, 0)  # only the sizes, dtype and device of the embeddings are looked at
    arguments = {
        "config": base.config,
        "inputs_embeds": torch.empty(shape, dtype=base.dtype, device=model_input.device),
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
    }
    known = inspect.signature(create).parameters
    if "input_embeds" in known:  # name of the argument in transformers 4
        arguments["input_embeds"] = arguments.pop("inputs_embeds")
    if "cache_position" in known:
        arguments["cache_position"] = cache_position
    return create(**arguments)


# ---- preparation for training

# Methods whose parameters must not be cast to float32.
_PACKED = ("gptq", "aqlm", "eetq", "torchao", "hqq")


def _quantization_method(model: Any) -> str | None:
    method = getattr(model, "quantization_method", None)
    return getattr(method, "value", method)


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Make a quantised model ready to train adapters on: freeze it, float32 for what is not quantised, checkpointing.

    A model that is not quantised is frozen and cast, without checkpointing. Returns the model, changed in place.
    """
    packed = _quantization_method(model) in _PACKED or getattr(model, "hqq_quantized", False)
    for parameter in model.parameters():
        parameter.requires_grad = False
    if "bitsandbytes" in sys.modules:
        from ..storage.bnb import keep_differentiable

        for module in model.modules():
            keep_differentiable(module)
    if not packed:
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter).__name__ != "Params4bit":
                parameter.data = parameter.data.to(torch.float32)
        if auto_clear_cache:
            for backend in (torch.cuda, torch.xpu):
                if backend.is_available():
                    backend.empty_cache()
    quantized = packed or getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    if quantized and use_gradient_checkpointing:
        _enable_checkpointing(model, gradient_checkpointing_kwargs)
    return model


def _enable_checkpointing(model: Any, kwargs: dict[str, Any] | None) -> None:
    if (kwargs or {}).get("use_reentrant", True):
        # Reentrant checkpointing needs an input that requires grad; all weights before the first adapter are frozen.
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        else:
            model.get_input_embeddings().register_forward_hook(_require_grad)
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(kwargs)
        return
    if "gradient_checkpointing_kwargs" in inspect.signature(model.gradient_checkpointing_enable).parameters:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs or {})
        return
    if kwargs:
        warnings.warn(
            "gradient_checkpointing_kwargs is not supported in this version of transformers. The passed kwargs will be"
            " ignored. if you want to use that feature, please upgrade to the latest version of transformers.",
            FutureWarning,
            stacklevel=3,
        )
    model.gradient_checkpointing_enable()


def _require_grad(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen floating-point parameters -> `dtype`, trainable ones -> float32, in place."""
    for parameter in model.parameters():
        if parameter.is_floating_point():  # integers are packed weights
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def fsdp_auto_wrap_policy(model: nn.Module) -> functools.partial:
    """FSDP wrapping: transformer blocks, prompt encoders, and leaf modules with a trainable weight each on their own.

    The block classes are named by the environment variable FSDP_TRANSFORMER_CLS_TO_WRAP, else by the model itself.
    Leaves whose weight an adapter layer reads without calling the leaf stay with their block: alone, they would be
    shards by then.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    from ..tuners.cartridge import CartridgeEncoder
    from ..tuners.cpt import CPTEmbedding
    from ..tuners.p_tuning import PromptEncoder
    from ..tuners.prefix_tuning import PrefixEncoder
    from ..tuners.prompt_tuning import PromptEmbedding

    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    names = [n.strip() for n in named.split(",") if n.strip()] or sorted(_get_no_split_modules(model))
    available = {type(module).__name__: type(module) for module in model.modules()}
    missing = [name for name in names if name not in available]
    if missing:
        raise TypeError(
            f"Could not find the transformer layer class to wrap in the model: {', '.join(missing)}. "
            "Set FSDP_TRANSFORMER_CLS_TO_WRAP to class names that the model contains."
        )
    classes = {available[name] for name in names}
    classes |= {PrefixEncoder, PromptEncoder, PromptEmbedding, CartridgeEncoder, CPTEmbedding}
    read = _read_leaves(model) | {id(m.delta_embedding) for m in model.modules() if isinstance(m, CPTEmbedding)}
    leaves = functools.partial(
        lambda_auto_wrap_policy, lambda_fn=lambda module: _is_trainable_leaf(module) and id(module) not in read
    )
    blocks = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes)
    return functools.partial(_or_policy, policies=[leaves, blocks])


def _read_leaves(model: nn.Module) -> set[int]:
    """Ids of modules in adapter layers whose weight is used without a call: all but the factors of plain LoRA."""
    from ..core.layer import AdapterLayer
    from ..tuners.lora.layer import LoraLayer

    found: set[int] = set()
    for layer in model.modules():
        if not isinstance(layer, AdapterLayer):
            continue
        variants = layer.lora_variant if isinstance(layer, LoraLayer) and not layer.kind.substituted else None
        for container in (layer._modules.get(slot) for slot in layer.adapter_layer_names):
            for name, held in () if container is None else container._modules.items():
                if held is not None and (variants is None or name in variants):
                    found.update(id(m) for m in held.modules())
    return found


def _is_trainable_leaf(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not module._modules and weight is not None and weight.requires_grad


# ---- quantisation


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """`model.config.quantization_config` if the model is quantised with `method`, else None."""
    config = getattr(model, "config", None)
    if config is not None and _quantization_method(model) == method:
        return getattr(config, "quantization_config", None)
    return None


def _forward_only_label(module: nn.Module | None) -> str | None:
    from ..storage.forward_only import detect

    storage = detect(module) if module is not None else None
    return storage.label if storage is not None else None


def is_gptqmodel_quant_linear(module: nn.Module | None) -> bool:
    """Whether this is a linear layer of the gptqmodel package (GPTQ or AWQ)."""
    return _forward_only_label(module) in ("gptq", "awq")


def is_gptqmodel_awq_layer(module: nn.Module | None) -> bool:
    """Whether this is an AWQ layer of the gptqmodel package."""
    return _forward_only_label(module) == "awq"


def get_gptqmodel_quant_linear(gptq_quantization_config: Any, device_map: Any = None) -> type | None:
    """The layer class that gptqmodel uses for a quantisation config; None without a config or the package."""
    from ..import_utils import is_gptqmodel_available

    if gptq_quantization_config is None or not is_gptqmodel_available():
        return None
    from gptqmodel.utils.importer import hf_select_quant_linear  # type: ignore[import-not-found]

    config = gptq_quantization_config
    read = config.get if isinstance(config, dict) else lambda name, default: getattr(config, name, default)
    defaults = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    defaults |= {"checkpoint_format": "gptq", "meta": None, "backend": "auto"}
    arguments = {name: read(name, default) for name, default in defaults.items()} | {"device_map": device_map}
    known = inspect.signature(hf_select_quant_linear).parameters
    return hf_select_quant_linear(**{name: value for name, value in arguments.items() if name in known})


__getattr__, __dir__ = lazy_attributes(
    __name__,
    owners(
        {
            "peft.core.match": "get_pattern_key match_target_against_key",
            "peft.core.wrappers": (
                "AuxiliaryTrainingWrapper ModulesToSaveWrapper TrainableTokensWrapper _set_adapter _set_trainable "
                "set_additional_trainable_modules"
            ),
            "peft.core.prompt:prepare_prompt_config": "_prepare_prompt_learning_config",
            "peft.io.files": "check_file_exists_on_hf_hub",
            "peft.core.tied": "_get_module_names_tied_with_embedding",
            "peft.utils.constants": [
                *(
                    "CONFIG_NAME",
                    "EMBEDDING_LAYER_NAMES",
                    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
                    "SAFETENSORS_WEIGHTS_NAME",
                ),
                *("WEIGHTS_NAME", "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING"),
                *("bloom_model_postprocess_past_key_value", "starcoder_model_postprocess_past_key_value"),
                *published_names(),
            ],
        }
    ),
)
