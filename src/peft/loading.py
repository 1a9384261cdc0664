# SPDX-License-Identifier: Apache-2.0
"""Loading adapters into a PeftModel and saving them: the order of the steps, and what is undone when one of them
fails.
"""

import contextlib
import copy
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .config import PeftConfig, hub_parameters, nearest
from .core.modules import awaiting_values
from .core.rollback import unchanged_on_error
from .mapping import peft_model_class
from .registry import method_of, name_warning

if TYPE_CHECKING:
    from .peft_model import PeftModel

# Initialisations that change the base weights, so that a second adapter next to them does not see what it was trained
# on.
_CHANGES_BASE = ("pissa", "corda", "olora")


def split_kwargs(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments for hf_hub_download, the others)."""
    hub = {k: v for k, v in kwargs.items() if k in hub_parameters() or k == "use_auth_token"}
    return hub, {k: v for k, v in kwargs.items() if k not in hub}


def _read_config(model_id: str | os.PathLike, hub: dict[str, Any]) -> Any:
    from .io.files import hub_options

    return PeftConfig.from_pretrained(model_id, **hub_options(hub))


def check_new_adapter_config(model: "PeftModel", config: PeftConfig, is_trainable: bool) -> None:
    """Refuse to continue training a prompt; warn of adapters that were made together with changed base weights."""
    if config.is_prompt_learning and is_trainable:
        raise ValueError("Cannot set a prompt learning adapter to trainable when loading pretrained adapter.")
    inits = [getattr(c, "init_lora_weights", None) for c in [config, *model.peft_config.values()]]
    found = next((i for i in inits if isinstance(i, str) and i in _CHANGES_BASE), None)
    if found is not None and len(set(map(id, [config, *model.peft_config.values()]))) > 1:
        warnings.warn(
            f"An adapter initialised with {found!r} has changed the base weights; adapters loaded next to it were "
            "trained on other ones. "
            "Convert it to a plain LoRA on saving (`path_initial_model_for_weight_conversion`).",
            stacklevel=4,
        )


def _set_offload(config: PeftConfig, ephemeral: bool) -> None:
    if hasattr(config, "runtime_config"):
        config.runtime_config.ephemeral_gpu_offload = ephemeral  # type: ignore[attr-defined]
    elif ephemeral:
        warnings.warn("Ephemeral GPU offloading is not supported for this type of adapter. Ignoring.", stacklevel=4)


def from_pretrained(
    cls: type["PeftModel"],
    model: nn.Module,
    model_id: str | os.PathLike,
    adapter_name: str = "default",
    is_trainable: bool = False,
    config: PeftConfig | None = None,
    *,
    autocast_adapter_dtype: bool = True,
    ephemeral_gpu_offload: bool = False,
    low_cpu_mem_usage: bool = False,
    key_mapping: dict[str, str] | None = None,
    **kwargs: Any,
) -> "PeftModel":
    """See `PeftModel.from_pretrained`."""
    if config is None:
        hub, _ = split_kwargs(kwargs)
        config = _read_config(model_id, hub)
    elif not isinstance(config, PeftConfig):
        raise ValueError(f"The input config must be a PeftConfig, got {type(config)}")
    assert isinstance(config, PeftConfig)
    if key_mapping is None and not config.is_prompt_learning:
        key_mapping = getattr(model, "_checkpoint_conversion_mapping", {})
    if config.is_prompt_learning and is_trainable:
        raise ValueError("Cannot set a prompt learning adapter to trainable when loading pretrained adapter.")
    only = getattr(getattr(model, "base_model", None), "only_config", type(config))
    if only is not type(config):
        raise TypeError(f"Expected '{only.__name__}', got '{type(config).__name__}' instead.")
    config.locate(model_id, kwargs)
    with _removed_on_error(model, config, adapter_name):
        _set_offload(config, ephemeral_gpu_offload)
        config.inference_mode = not is_trainable
        peft_model = _class_for(cls, config)(
            model,
            config,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
        peft_model.load_adapter(
            model_id,
            adapter_name,
            is_trainable=is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            key_mapping=key_mapping,
            **kwargs,
        )
    return peft_model


def _class_for(cls: type["PeftModel"], config: PeftConfig) -> type["PeftModel"]:
    from .peft_model import PeftModel

    return peft_model_class(config, cls) if issubclass(cls, PeftModel) else cls


@contextlib.contextmanager
def _removed_on_error(model: nn.Module, config: PeftConfig, adapter_name: str) -> Iterator[None]:
    """Take a half-loaded adapter off the user's model again."""
    with unchanged_on_error(model, config):
        try:
            yield
        except BaseException:
            _strip(model, adapter_name)
            raise


def _strip(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter from a plain model, with its layers if no other adapter is left."""
    configs = model.__dict__.get("peft_config")
    if not isinstance(configs, dict) or adapter_name not in configs:
        return
    from .core.layer import AdapterLayer
    from .core.wrappers import AuxiliaryTrainingWrapper

    tuner: Any = method_of(configs[adapter_name]).tuner
    del configs[adapter_name]
    parts: Any = [m for m in model.modules() if isinstance(m, (AdapterLayer, AuxiliaryTrainingWrapper))]
    for part in parts:
        part.drop(adapter_name)
    if configs:
        return
    tuner.strip(model)
    if not parts:
        return
    parts[0].switch.set_active(())  # so that saved modules give way to their originals
    shell = tuner.__new__(tuner)
    nn.Module.__init__(shell)
    shell.model, shell.peft_config, shell.switch = model, configs, parts[0].switch
    shell.forget_layers()
    shell._unload_and_optionally_merge(False)


def _check_offload(options: dict[str, Any]) -> None:
    """Adapters stay on the device that computes their layer, so a base model with weights on CPU or disk needs no new
    dispatch: these options are only checked.
    """
    if options.get("offload_dir") and options.get("offload_folder"):
        raise ValueError("Cannot use `offload_folder` when `offload_dir` is specified: they are the same.")


def load_adapter(
    model: "PeftModel",
    model_id: str | os.PathLike,
    adapter_name: str,
    is_trainable: bool = False,
    torch_device: str | None = None,
    *,
    autocast_adapter_dtype: bool = True,
    ephemeral_gpu_offload: bool = False,
    low_cpu_mem_usage: bool = False,
    key_mapping: dict[str, str] | None = None,
    **kwargs: Any,
) -> Any:
    """See `PeftModel.load_adapter`."""
    from .io.files import load_peft_weights
    from .utils.other import infer_device

    hub, other = split_kwargs(kwargs)
    ignore_mismatched_sizes = other.pop("ignore_mismatched_sizes", False)
    _check_offload(other)
    is_new = adapter_name not in model.peft_config
    if is_new:
        config: Any = _read_config(model_id, hub)
        _set_offload(config, ephemeral_gpu_offload)
    else:
        config = model.peft_config[adapter_name]
    model._check_new_adapter_config(config, is_trainable)
    device = torch_device or infer_device()
    weights = load_peft_weights(str(model_id), device=device, key_mapping=key_mapping, **hub)
    put = functools.partial(
        _put, model, adapter_name, weights, ignore_mismatched_sizes, low_cpu_mem_usage, str(model_id)
    )
    if is_new:
        config.inference_mode = not is_trainable
        options = {"low_cpu_mem_usage": low_cpu_mem_usage, "autocast_adapter_dtype": autocast_adapter_dtype}
        awaited = not low_cpu_mem_usage and _only_draws(model, config)
        report = _add_and_put(model, adapter_name, config, options, put, awaited)
    else:
        report = put()
    _tell(model, adapter_name, report, str(model_id))
    if not is_new:
        model._cast_adapter(adapter_name, autocast_adapter_dtype)
    if not is_trainable:
        _to_eval(model, None if is_new else adapter_name)
    return report.incompatible()


def _only_draws(model: "PeftModel", config: Any) -> bool:
    tuner = method_of(config).tuner
    return isinstance(model.base_model, tuner) and hasattr(tuner, "only_draws") and model.base_model.only_draws(config)


def _add_and_put(
    model: "PeftModel", name: str, config: Any, options: dict, put: Callable[[], Any], awaited: bool
) -> Any:
    """Add an adapter and load it. `awaited`: random first values are drawn only if the file turns out to lack some."""
    with awaiting_values() if awaited else contextlib.nullcontext():
        model.add_adapter(name, config, **options)
    try:
        if not config.inference_mode:
            model.set_requires_grad(name)
        report = put()
    except BaseException:
        model.delete_adapter(name)
        raise
    if not (awaited and report.missing):
        return report
    model.delete_adapter(name)
    return _add_and_put(model, name, config, options, put, awaited=False)


def _to_eval(model: nn.Module, name: str | None) -> None:
    """`model.eval()`, except that of the adapters of a layer in evaluation mode only `name` is looked at (new ones are
    made in the mode of their layer).
    """
    from .core.layer import AdapterLayer

    stack: list[Any] = [model]
    while stack:
        module = stack.pop()
        if module.training:
            module.eval()
        elif isinstance(module, AdapterLayer):
            stack.append(module._modules["base_layer"])
            if name is not None:
                containers = (c for c in module._modules.values() if isinstance(c, nn.ModuleDict) and name in c)
                stack += [c[name] for c in containers]
        else:
            stack += (child for child in module._modules.values() if child is not None)


def _put(model: "PeftModel", name: str, weights: dict, ignore: bool, low_cpu: bool, source: str) -> Any:
    """Load the tensors; of the missing keys only those of this adapter's own parameters are reported."""
    from .io.state_dict import load_adapter_state

    options: Any = {"ignore_mismatched_sizes": ignore, "low_cpu_mem_usage": low_cpu, "source": source}
    if hasattr(type(model), "_nested_keys"):
        weights = model._nested_keys(weights, name)
    report = load_adapter_state(model, weights, name, **options)
    shared = _shared_names(model)
    report.missing[:] = [k for k in report.missing if not any(f"{s}.{name}" in k for s in shared)]
    return report


def _shared_names(model: "PeftModel") -> list[str]:
    """Containers of the tuner: files may leave them out, since they are drawn again from a seed."""
    containers = getattr(type(model.base_model), "shared_containers", None)
    return list(containers(model.base_model)) if containers is not None else []


def _tell(model: "PeftModel", name: str, report: Any, source: str) -> None:
    """Say what of the file was not used, what it lacks, and what cannot be right."""
    if report.not_finite:
        warnings.warn(
            f"The adapter weights in {source} hold NaN: {report.not_finite[:8]}. The run that wrote them diverged.",
            stacklevel=4,
        )
    missing, unexpected = report.missing, report.unexpected
    if not missing and not unexpected:
        return
    parts = []
    if missing:
        parts.append(f"Found missing adapter keys while loading the checkpoint: {missing}.")
    if unexpected:
        hints = "".join(f" {key!r}: the nearest valid key is {valid!r}." for key, valid in report.hints.items())
        more = f" and {len(unexpected) - 8} more" if len(unexpected) > 8 else ""
        parts.append(
            f"Keys of the checkpoint that the model has no place for were ignored: {unexpected[:8]}{more}.{hints}"
        )
    prefix = method_of(model.peft_config[name]).prefix
    if missing and name in prefix:
        parts.insert(0, name_warning(name, prefix))
    warnings.warn(" ".join(parts), stacklevel=4)


def save_pretrained(
    model: "PeftModel",
    save_directory: str | os.PathLike,
    *,
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    save_embedding_layers: str | bool = "auto",
    is_main_process: bool = True,
    path_initial_model_for_weight_conversion: str | None = None,
    **kwargs: Any,
) -> None:
    """See `PeftModel.save_pretrained`."""
    from .io.files import save_adapter
    from .io.state_dict import get_peft_model_state_dict

    root = Path(save_directory)
    names = _names_to_save(model, root, selected_adapters)
    ready = []  # nothing is written before everything is known to be fine
    for name in names:
        state = get_peft_model_state_dict(
            model,
            state_dict=kwargs.get("state_dict"),
            adapter_name=name,
            save_embedding_layers=save_embedding_layers,
        )
        config = saved_config(model, name)
        if path_initial_model_for_weight_conversion is not None:
            from .io.initial import convert_to_plain_lora, mark_initial_as_plain

            initial = path_initial_model_for_weight_conversion
            state, doubled = convert_to_plain_lora(state, config, initial)
            if is_main_process:
                mark_initial_as_plain(initial, config)
            config = doubled
        ready.append((root if name == "default" else root / name, state, config))
    root.mkdir(parents=True, exist_ok=True)
    if is_main_process and names:
        model.create_or_update_model_card(str(root))
    for folder, state, config in ready:
        folder.mkdir(parents=True, exist_ok=True)
        if is_main_process:
            from .core.tuner import TunerModel

            if isinstance(model.base_model, TunerModel):
                model.base_model.save_parts(folder, config, safe_serialization)
            save_adapter(folder, state, config, safe_serialization=safe_serialization)


def _names_to_save(model: "PeftModel", root: Path, selected: list[str] | None) -> list[str]:
    if root.is_file():
        raise ValueError(f"Provided path ({root}) should be a directory, not a file")
    known = list(model.peft_config)
    if unknown := [n for n in selected or () if n not in known]:
        raise ValueError(
            f"You passed an invalid `selected_adapters` argument, current supported adapter names are {known} - got "
            f"{selected}.{nearest(unknown[0], known)}"
        )
    return known if selected is None else list(selected)


def saved_config(model: "PeftModel", name: str) -> PeftConfig:
    """The configuration as it is written: frozen, with the name of the base model, and its class where no task says
    it.
    """
    config = copy.copy(model.peft_config[name])
    base = model.get_base_model()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = model.peft_config[name].base_model_name_or_path = (
            base.__dict__.get("name_or_path") or None
        )
    config.inference_mode = True
    if config.task_type is None:
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return config
