# SPDX-License-Identifier: Apache-2.0
"""Merge an adapter into a model folder, file by file and tensor by tensor; the model is never built.

Each adapted module is made alone from the shape of its weight, and the library's own layer goes around it. Its change
is added in row blocks; what is given by factors, `W' = W + s B A`, never exists as a whole. All in float32, rounded
once into the type of the base weight.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from peft.core.layer import WEIGHT_HOOKS
from peft.core.match import pattern_value
from peft.io.files import split_shared

from .adapter_files import PREFIX, Adapter
from .errors import CliError, check_place, nearest
from .merge_layers import ADVICE, Merger, Plan, is_embedding
from .tensor_files import INDEX, SINGLE, Base, Entry, Pieces, rewrite

_ADDED = "model-added.safetensors"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".index.json")


def check_mergeable(adapter: Adapter) -> None:
    """Only a change that can be computed for one weight at a time can be merged on files."""
    from peft.tuners.lora.init import changes_base

    config, record = adapter.config, adapter.record
    if WEIGHT_HOOKS.isdisjoint(getattr(record.layer, "hooks", ())):
        raise CliError(f"{adapter.folder}: this adapter is {adapter.method}, which has no weight form; {ADVICE}")
    if adapter.method == "frod":
        raise CliError(f"{adapter.folder}: this adapter is frod, whose base comes from all weights together; {ADVICE}")
    for key in ("alora_invocation_tokens", "layer_replication", "arrow_config", "kasa_config", "target_parameters"):
        if config.get(key):
            raise CliError(f"{adapter.folder}: the option {key} makes a change that is not one per weight; {ADVICE}")
    init = config.get("init_lora_weights", True)
    if changes_base(init):
        raise CliError(
            f"{adapter.folder}: init_lora_weights='{init}' changes the base weights when the adapter is loaded; save "
            "it with path_initial_model_for_weight_conversion first, or load the model and use `merge_and_unload`"
        )
    bad = next((name for name, t in adapter.tensors.items() if not bool(t.isfinite().all())), None)
    if bad:
        raise CliError(f"{adapter.folder}: {bad} has values that are not finite")


def make_plan(adapter: Adapter, base: Base) -> Plan:
    """Match the adapter's tensors with the base's; what does not match is an error, before anything is written."""
    check_mergeable(adapter)
    plan = Plan()
    changes_bias = adapter.record.layer.hooks & {"delta_bias", "map_bias", "replace"} and adapter.config.get(
        "lora_bias", True
    )
    for key, tensor in adapter.tensors.items():
        name = key.removeprefix(PREFIX)
        if name.startswith("base_model.") or _plan_rest(name, tensor, plan, base, adapter):
            continue  # shared tensors of the method; whole modules, biases, token rows
        module = _owner(name, base, adapter)
        weight, bias = base.find(module + ".weight"), base.find(module + ".bias")
        assert weight is not None
        _check_weight(weight, module, base, adapter)
        plan.owners[key], plan.merged[weight] = module, module
        if bias is not None and changes_bias:
            plan.biases[bias] = module
    if not plan.merged and not plan.replaced and not plan.token_rows:
        shared = " but tensors that all layers share, and does not say which these are" if adapter.tensors else ""
        raise CliError(f"{adapter.folder}: holds nothing to merge{shared}; {ADVICE}")
    return plan


def _owner(name: str, base: Base, adapter: Adapter) -> str:
    """The module that a tensor of the adapter belongs to: the longest part of its name that has a weight."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        if base.find(module + ".weight"):
            return module
    if base.tied and "lm_head" in parts:
        raise CliError(
            f"{adapter.folder}: the adapter changes lm_head, which {base.folder} shares with the input embedding; "
            "merging would change both. Untie the base model first (tie_word_embeddings=False) and save it."
        )
    raise CliError(f"{adapter.folder}: {name} is not in {base.folder}{nearest(name, base.places)}")


def _check_weight(name: str, module: str, base: Base, adapter: Adapter) -> None:
    _check_type(name, base)
    if is_embedding(module, adapter) and base.tied and not adapter.config.get("ensure_weight_tying"):
        raise CliError(
            f"{adapter.folder}: the adapter changes {name}, which is also the output layer (tie_word_embeddings); "
            "merging would change both. Untie the base model first, or train with ensure_weight_tying=True."
        )


def _check_type(name: str, base: Base) -> None:
    entry = base.places[name]
    if entry.dtype is None:
        raise CliError(f"{base.folder}: {name} is stored as {entry.code}, quantised weights cannot be merged by file")


def _plan_rest(name: str, tensor: torch.Tensor, plan: Plan, base: Base, adapter: Adapter) -> bool:
    """Trained copies of whole modules, biases, embeddings, and token rows."""
    if ".original_module." in name or ".modules_to_save." in name:
        return True  # further copies of an embedding whose current state is stored under its plain name
    if name.endswith(".trainable_tokens_delta"):
        module = name.removesuffix(".trainable_tokens_delta").removesuffix(".token_adapter")
        weight = base.find(module + ".weight")
        if weight is None and base.tied and module.endswith("lm_head"):
            return True  # its rows are those of the input embedding
        if weight is None:
            raise CliError(f"{adapter.folder}: {module} is not in {base.folder}{nearest(module, base.places)}")
        _check_type(weight, base)
        plan.token_rows[weight] = (_token_indices(adapter, module, tensor, base.places[weight].shape), tensor)
        return True
    plain = name.replace(".base_layer.", ".")
    known = base.find(plain)
    if known is None:
        saved = [str(m) for m in adapter.config.get("modules_to_save") or []]
        if any(f".{m}." in f".{plain}." for m in saved):
            plan.added[plain] = tensor
            return True
        return False
    entry = base.places[known]
    if tuple(tensor.shape) != entry.shape:
        raise CliError(
            f"{known}: the adapter brings shape {list(tensor.shape)}, the base has {list(entry.shape)}; "
            "resize the base model (its vocabulary?) and save it first"
        )
    plan.replaced[known] = tensor
    return True


def _token_indices(adapter: Adapter, module: str, rows: torch.Tensor, shape: tuple[int, ...]) -> list[int]:
    option = "token_indices" if adapter.method == "trainable_tokens" else "trainable_token_indices"
    indices = adapter.config.get(option)
    if isinstance(indices, dict):
        indices = pattern_value(indices, module, None)
    if not isinstance(indices, list) or len(indices) != rows.shape[0]:
        raise CliError(f"{adapter.folder}: {option} does not say which {rows.shape[0]} rows {module} has")
    if rows.shape[1:] != shape[1:] or not all(0 <= index < shape[0] for index in indices):
        raise CliError(
            f"{module}: the adapter brings rows {indices} of width {rows.shape[1]}, the base has {list(shape)}; "
            "resize the base model (its vocabulary?) and save it first"
        )
    return indices


# ---- writing


def _changed(plan: Plan, base: Base, merger: Merger) -> dict[str, Pieces]:
    """What is written for the tensors that do not stay as they are."""

    def bias(name: str, module: str) -> Pieces:
        return lambda: [merger.new_bias(module).to(base.places[name].dtype)]

    def replaced(name: str, value: torch.Tensor) -> Pieces:
        return lambda: [value.to(base.places[name].dtype)]

    return (
        {name: _token_pieces(base.places[name], *rows) for name, rows in plan.token_rows.items()}
        | {name: replaced(name, value) for name, value in plan.replaced.items()}
        | {name: bias(name, module) for name, module in plan.biases.items()}
        | {name: merger.pieces(module) for name, module in plan.merged.items()}
    )


def _token_pieces(entry: Entry, indices: list[int], rows: torch.Tensor) -> Pieces:
    def pieces() -> Iterable[torch.Tensor]:
        for begin, end in entry.spans():
            block = entry.rows(begin, end)
            for position, index in enumerate(indices):
                if begin <= index < end:
                    block[index - begin] = rows[position].to(block.dtype)
            yield block

    return pieces


def merge_into_folder(adapter: Adapter, base: Base, out: Path, report: Callable[[], object]) -> Plan:
    """Write the merged model to `out`, which appears only when it is complete."""
    plan = make_plan(adapter, base)
    check_place("--out", out, folder=True)
    if out.exists() and any(out.iterdir()):
        raise CliError(f"--out {out}: exists and is not empty")
    if out.resolve().is_relative_to(base.folder.resolve()):
        raise CliError(f"--out {out}: must not be inside the base folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    room = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    room.mkdir()
    try:
        _write_all(room, plan, base, _changed(plan, base, Merger(adapter, base, plan)), report)
        os.replace(room, out)
    except BaseException:
        shutil.rmtree(room, ignore_errors=True)
        raise
    return plan


def _write_all(room: Path, plan: Plan, base: Base, changed: dict[str, Pieces], report: Callable[[], object]) -> None:
    weight_map = {}
    for shard in base.shards:
        # a file of the usual name would hide the index, which tells of the added tensors
        name = "model-base.safetensors" if plan.added and shard.path.name == SINGLE else shard.path.name
        rewrite(shard, room / name, changed, report)
        weight_map |= dict.fromkeys(shard.entries, name)
    if plan.added:
        save_file(split_shared(plan.added), room / _ADDED, {"format": "pt"})
        weight_map |= dict.fromkeys(plan.added, _ADDED)
    if set(weight_map.values()) != {SINGLE}:
        total = sum(entry.end - entry.begin for entry in base.places.values())
        total += sum(tensor.nbytes for tensor in plan.added.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (room / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _copy_other_files(base.folder, room)


def _copy_other_files(source: Path, target: Path) -> None:
    """Everything but weights: config, generation config, tokenizer, templates, licence."""
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name.endswith(_WEIGHT_SUFFIXES):
            continue
        if path.is_file():
            shutil.copy2(path, target / path.name)
        elif path.is_dir() and not any(inner.name.endswith(_WEIGHT_SUFFIXES) for inner in path.rglob("*")):
            shutil.copytree(path, target / path.name)
