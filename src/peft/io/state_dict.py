# SPDX-License-Identifier: Apache-2.0
"""Reading an adapter out of a model and putting one in: `get_peft_model_state_dict`, `set_peft_model_state_dict`.

Loading checks everything first (names, shapes) and only then touches the model, so that a bad file leaves the model as
it was. Both directions cost one walk over the modules and do not depend on how many other adapters are loaded.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn.modules.module import _IncompatibleKeys

from ..core.offload import unsharded
from ..storage.dtensor import gathered
from ..utils.collector import without_collector
from ..utils.peft_types import PeftType
from ..utils.warning import PeftWarning
from .base_state import get_base_model_state_dict, set_base_model_state_dict
from .embeddings import embedding_entries
from .hotswap import trim_padding
from .keys import COMPILE_INFIX, Entry, adapter_entries, clean
from .load import LoadReport, _method, _some, load_adapter_state, tuner_of

__all__ = [
    "LoadReport",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "load_adapter_state",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]


# ---- out of the model


@without_collector()
def get_peft_model_state_dict(
    model: Any,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, torch.Tensor]:
    """The tensors of one adapter under the keys of its file (without the adapter's name).

    `state_dict`: take the values from there (what DeepSpeed or FSDP gathered) instead of from the modules. Without it,
    what is sharded over processes is gathered here, so all of them must call this.
    `save_embedding_layers`: True, False, or "auto" = when an embedding is a target or the vocabulary was resized.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    if state_dict is not None:
        return _state(model, state_dict, adapter_name, save_embedding_layers)
    with unsharded(model) as temporary:
        state = _state(model, None, adapter_name, save_embedding_layers)
        return {k: v.clone() for k, v in state.items()} if temporary else state


def _state(
    model: Any, state_dict: Mapping[str, torch.Tensor] | None, adapter_name: str, save_embedding_layers: bool | str
) -> dict[str, torch.Tensor]:
    config = model.peft_config[adapter_name]
    method = _method(config)
    entries = adapter_entries(model, adapter_name, config)
    alone = state_dict is not None  # nothing to gather, and the other processes need not be here
    held: list[torch.Tensor] = [e.tensor for e in entries]
    if method.is_prompt:
        entries = [e for e in entries if e.role == "wrapper"]
        held += model.prompt_encoder[adapter_name].parameters()
    with gathered(() if alone else held):
        state = model.prompt_encoder[adapter_name].export() if method.is_prompt else {}
        state.update(_pick(entries, state_dict))
        if not (alone or method.is_prompt):
            if config.peft_type == PeftType.LORA:
                state.update(trim_padding(entries, adapter_name, config))
            _check_gathered(config, state)
    tuner = tuner_of(model, adapter_name, "export_state")
    if tuner is not None:
        state = tuner.export_state(adapter_name, state)
    if not method.is_prompt:
        extra = embedding_entries(model, adapter_name, config, save_embedding_layers)
        with gathered(() if alone else [e.tensor for e in extra]):
            for key, value in _pick(extra, state_dict):
                state.setdefault(key, value)
    return state


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Detached; gathered from all ranks when sharded (every rank must come here)."""
    if hasattr(tensor, "ds_id"):
        return tensor.detach().clone()  # partitioned again after this
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[attr-defined]


def _pick(
    entries: Iterable[Entry], state_dict: Mapping[str, torch.Tensor] | None
) -> Iterable[tuple[str, torch.Tensor]]:
    """Values from the modules, or from a given state dict, which may hold only a part (the trainable parameters)."""
    if state_dict is None:
        yield from ((e.file, _whole(e.tensor)) for e in entries)
        return
    names = {clean(k): k for k in state_dict}
    for entry in entries:
        key = names.get(entry.memory) or names.get(entry.memory.removeprefix(COMPILE_INFIX))
        if key is not None:
            yield entry.file, state_dict[key]


def _check_gathered(config: Any, state: dict[str, torch.Tensor]) -> None:
    if config.peft_type not in (PeftType.LORA, PeftType.ADALORA):
        return
    empty = [
        k for k, v in state.items()
        if (".lora_A" in k or ".lora_B" in k) and not k.endswith(".bias") and (v.dim() < 2 or 0 in v.shape)
    ]  # fmt: skip
    if empty:
        warnings.warn(
            f"{len(empty)} LoRA weights have no two-dimensional shape, e.g. {empty[0]!r}: they are probably shards of "
            "ZeRO-3 or FSDP that were not gathered, and the saved adapter will be broken. Gather the weights and pass "
            "them as `state_dict`.",
            PeftWarning,
            stacklevel=3,
        )


# ---- into the model


@without_collector()
def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> _IncompatibleKeys:
    """Load the tensors of a file into adapter `adapter_name`; returns torch's (missing_keys, unexpected_keys).

    Keys are those of the file or names in memory. A shape that does not fit raises RuntimeError before anything is
    changed, unless `ignore_mismatched_sizes`. `low_cpu_mem_usage`: adapter parameters on the meta device become the
    given tensors.
    """
    report = load_adapter_state(
        model,
        peft_model_state_dict,
        adapter_name,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    if report.not_finite:
        warnings.warn(f"The adapter weights hold NaN: {_some(report.not_finite)}.", PeftWarning, stacklevel=2)
    return report.incompatible(getattr(model, "_orig_mod", model))
