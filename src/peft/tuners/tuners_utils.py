# SPDX-License-Identifier: Apache-2.0
"""Published address of the base classes and of functions on adapted models; they live in `peft.core`."""

import copy
import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from ..core import kinds
from ..utils._lazy import lazy_attributes, owners

if TYPE_CHECKING:
    from ..config import PeftConfig
    from ..core.tuner import TunerModel

warn_msg_weight_tying = (
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but no implementation exists to tie "
    "the adapters. This can lead to complications, for example when merging the adapter or converting your model to "
    "formats other than safetensors."
)


def _maybe_include_all_linear_layers(peft_config: "PeftConfig", model: nn.Module) -> "PeftConfig":
    """Replace `target_modules="all-linear"` of a config, in place, by the names of the linear layers of `model`."""
    from ..core.inject import Injection

    if hasattr(peft_config, "target_modules"):
        Injection(None, model, "", peft_config, False, None)._expand_all_linear()  # type: ignore[arg-type]
    return peft_config


def _get_in_out_features(module: nn.Module) -> tuple[int, int] | tuple[None, None]:
    """(inputs, outputs) of a layer: features, channels, or rows and width of an embedding."""
    kind = kinds.kind_of(module)
    if kind is not None and kind is not kinds.Norm:
        if isinstance(module, nn.modules.conv._ConvNd):
            return module.in_channels, module.out_channels
        out, inputs = kind.shape(module)[:2]
        return inputs, out
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures"), ("input_size", "output_size")):
        if all(hasattr(module, name) for name in names):
            return getattr(module, names[0]), getattr(module, names[1])
    warnings.warn(
        f"Unsupported layer type '{type(module)}' encountered, proceed at your own risk.", UserWarning, stacklevel=2
    )
    return None, None


def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """A copy of a module, with parameters of its own or with the original's."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()} if share_weights else {})


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """Dotted name of a module object inside `model`, "" if it is not there."""
    return next((name for name, module in model.named_modules() if module is reference_module), "")


def get_device_map(model: nn.Module) -> dict[str, Any]:
    """The device map that the model was dispatched with, or the one device it is on."""
    device_map = getattr(model, "hf_device_map", None)
    return {"": next(model.parameters()).device} if device_map is None else device_map


def inspect_matched_modules(tuner: "TunerModel", adapter_name: str = "default") -> dict[str, list[str]]:
    """Names of all modules that the config of an adapter matches, and of those that it does not."""
    from ..core.match import Matcher

    matcher = Matcher(tuner.peft_config[adapter_name])
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for name, _ in tuner.model.named_modules():
        found["matched" if name and matcher.match(name) else "unmatched"].append(name)
    return found


def _check_adapters_not_merged(model: nn.Module, adapter_names: Any) -> None:
    """ValueError if one of the adapters is merged somewhere."""
    from ..core.layer import AdapterLayer

    names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
    for key, layer in model.named_modules():
        if isinstance(layer, AdapterLayer) and (merged := names.intersection(layer.merged_adapters)):
            raise ValueError(f"Adapters {sorted(merged)} are merged in {key!r}; call unmerge_adapter() first.")


def _delete_auxiliary_adapter(model: nn.Module, adapter_name: str, new_active_adapters: list[str] | None) -> None:
    """Remove an adapter from the modules to save and token wrappers of a model."""
    from ..core.wrappers import AuxiliaryTrainingWrapper

    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.delete_adapter(adapter_name, new_active_adapters)


# Model types whose fused kernels read these modules' weights directly.
_MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_MAMBA_LEAVES = ("out_proj", "conv1d")


def _check_lora_target_modules_mamba(peft_config: "PeftConfig", model: nn.Module, target_name: str) -> None:
    """ValueError for modules of Mamba-like models whose weights are read by fused kernels."""
    if target_name.rpartition(".")[2] not in _MAMBA_LEAVES:
        return
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in _MAMBA_TYPES and peft_config.peft_type in ("LORA", "ADALORA", "XLORA", "RANDLORA"):
        raise ValueError(
            f"[PEFT:{peft_config.peft_type}] Module {target_name!r} is incompatible with Mamba-based models "
            f"(model_type={model_type!r}). Leave {', '.join(_MAMBA_LEAVES)} out of `target_modules`."
        )


# ---- state dict keys


def _remove_adapter_name_from_state_dict_key(key: str, adapter_name: str) -> str:
    """`a.lora_A.default.weight` -> `a.lora_A.weight`: the last part called like the adapter is taken out."""
    head, dot, tail = key.rpartition(f".{adapter_name}.")
    return f"{head}.{tail}" if dot else key.removesuffix(f".{adapter_name}")


def _is_key_under_prefixes(key: str, prefixes: set[str]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _filter_state_dict_by_key_prefixes(state_dict: dict[str, Any], prefixes: set[str]) -> dict[str, Any]:
    return {key: value for key, value in state_dict.items() if _is_key_under_prefixes(key, prefixes)}


def _get_tuner_state_dict_key_prefixes(model: nn.Module, adapter_name: str | None = None) -> set[str]:
    """Full names of what adapter layers hold besides their base: containers, or one adapter's entries of them."""
    from ..core.layer import AdapterLayer

    found = set()
    for key, layer in model.named_modules():
        if not isinstance(layer, AdapterLayer):
            continue
        for slot in layer.slots.values():
            if slot.is_module and (adapter_name is None or adapter_name in layer._held_in(slot.name)):
                found.add(".".join(filter(None, (key, slot.name, adapter_name))))
    return found


_HOMES = owners(
    {
        "peft.core.prompt": "BasePromptEncoder",
        "peft.core.tuner:TunerModel": "BaseTuner",
        "peft.core.layer:AdapterLayer": "BaseTunerLayer",
        "peft.core.slots": "BufferDict",
        "peft.core.merge": "check_adapters_to_merge",
        "peft.core.match": "check_target_module_exists match_target_against_key",
        "peft.core.match:ExcludedModule": "_ExcludedModule",
        "peft.core.match:find_minimal_target_modules": "_find_minimal_target_modules",
        "peft.core.trainable": "cast_adapter_dtype delete_adapter set_adapter set_requires_grad",
        "peft.core.offload": "onload_layer",
        "peft.core.tied": "_get_module_names_tied_with_embedding",
        "peft.core.wrappers": "AuxiliaryTrainingWrapper _set_adapter set_additional_trainable_modules",
        "peft.config": "PeftConfig",
        "peft.tuners.lora.replication": "replicate_layers",
        "peft.utils.constants": (
            "DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES EMBEDDING_LAYER_NAMES MIN_TARGET_MODULES_FOR_OPTIMIZATION "
            "SEQ_CLS_HEAD_NAMES UPCAST_DTYPES INCLUDE_LINEAR_LAYERS_SHORTHAND"
        ),
        "peft.utils.error": "NoMatchingPeftModuleError",
        "peft.utils.integrations": "init_empty_weights",
        "peft.utils.other": "_get_submodules is_gptqmodel_quant_linear",
        "peft.utils.peft_types": "PeftType TaskType",
        "peft.utils.quantization_utils": "QuantizationBackend",
        "peft.utils.warning": "PeftWarning",
    }
)
__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
