# SPDX-License-Identifier: Apache-2.0
"""Merge a LoRA adapter into a model folder, file by file and row block by row block; no model is built.

`W' = W + scaling * B A`, with DoRA `W' = m * (W + scaling * B A) / ||W + scaling * B A||` per output row. Products are
taken in float32 and rounded once, into the type of the base weight.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .adapter_files import Adapter, LoraParts, lora_parts, pattern_value
from .errors import CliError, nearest
from .tensor_files import DTYPES, INDEX, SINGLE, Entry, Output, Pieces, Shard, model_shards, row_reader, write_shard

_BLOCK_ELEMENTS = 1 << 20  # of a row block; with float32 copies a few times 4 MiB
_CODES = {dtype: code for code, dtype in DTYPES.items()}
# Initialisations that leave the base weights as they are; others store a residual that the file does not have.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_VARIANTS = (
    "velora_config", "alora_invocation_tokens", "use_qalora", "monteclora_config", "layer_replication", "use_bdlora",
    "arrow_config", "kasa_config", "target_parameters",
)  # fmt: skip
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".index.json")


@dataclass
class Plan:
    """What happens to which tensor of the base."""

    merged: dict[str, LoraParts] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    added: dict[str, torch.Tensor] = field(default_factory=dict)
    token_rows: dict[str, tuple[list[int], torch.Tensor]] = field(default_factory=dict)


@dataclass
class Base:
    folder: Path
    config: dict[str, Any]
    shards: list[Shard]
    places: dict[str, tuple[Shard, Entry]]

    @property
    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings")) and not any(n.startswith("lm_head.") for n in self.places)


def open_base(folder: Path) -> Base:
    shards = model_shards(folder)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    places = {entry.name: (shard, entry) for shard in shards for entry in shard.entries}
    return Base(folder, config, shards, places)


def check_mergeable(adapter: Adapter) -> None:
    """Only a change that can be computed for one weight at a time can be merged on files."""
    config = adapter.config
    advice = "load the model and use `merge_and_unload`, if the method merges at all"
    if adapter.method != "lora":
        raise CliError(f"{adapter.folder}: merging files works for LoRA, this adapter is {adapter.method}; {advice}")
    for key in _VARIANTS:
        if config.get(key):
            raise CliError(f"{adapter.folder}: the option {key} makes a change that is not B A per weight; {advice}")
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS and not (isinstance(init, str) and init.lower() in _PLAIN_INITS):
        raise CliError(
            f"{adapter.folder}: init_lora_weights='{init}' changes the base weights when the adapter is loaded; save "
            "it with path_initial_model_for_weight_conversion first, or load the model and use `merge_and_unload`"
        )
    bad = next((name for name, t in adapter.tensors.items() if not bool(t.isfinite().all())), None)
    if bad:
        raise CliError(f"{adapter.folder}: {bad} has values that are not finite")


def make_plan(adapter: Adapter, base: Base) -> Plan:
    """Match the adapter's modules with the base's tensors; every mismatch is an error, before anything is written."""
    check_mergeable(adapter)
    parts, rest = lora_parts(adapter)
    plan = Plan()
    for module, part in parts.items():
        name = _find(module + ".weight", base, adapter)
        _check_part(name, part, base, adapter)
        plan.merged[name] = part
        if part.bias is not None:
            bias = _find(module + ".bias", base, adapter)
            plan.biases[bias] = part.scaling * part.bias.float()
    for key, tensor in rest.items():
        _plan_rest(key, tensor, plan, base, adapter)
    if not plan.merged and not plan.replaced and not plan.token_rows:
        raise CliError(f"{adapter.folder}: holds nothing to merge")
    return plan


def _find(name: str, base: Base, adapter: Adapter) -> str:
    """The base's name for a tensor: files of some models leave out the first part of the module path."""
    for candidate in (name, name.partition(".")[2]):
        if candidate in base.places:
            return candidate
    longer = [known for known in base.places if known.endswith("." + name)]
    if len(longer) == 1:
        return longer[0]
    if base.tied and name.rpartition(".")[0].endswith("lm_head"):
        raise CliError(
            f"{adapter.folder}: the adapter changes {name}, which {base.folder} shares with the input embedding; "
            "merging would change both. Untie the base model first (tie_word_embeddings=False) and save it."
        )
    raise CliError(f"{adapter.folder}: {name} is not in {base.folder}{nearest(name, base.places)}")


def _check_part(name: str, part: LoraParts, base: Base, adapter: Adapter) -> None:
    entry = base.places[name][1]
    if entry.dtype is None:
        raise CliError(f"{base.folder}: {name} is stored as {entry.code}, quantised weights cannot be merged by file")
    if part.embedding and base.tied and not adapter.config.get("ensure_weight_tying"):
        raise CliError(
            f"{adapter.folder}: the adapter changes {name}, which is also the output layer (tie_word_embeddings); "
            "merging would change both. Untie the base model first, or train with ensure_weight_tying=True."
        )
    left, right = _factors(entry, part, base, adapter)
    if part.magnitude is not None:
        if part.embedding or len(entry.shape) != 2:
            raise CliError(f"{name}: DoRA is merged by file on linear layers only, use `merge_and_unload`")
        outputs = right.shape[1] if _transposed(entry, part, base, adapter) else left.shape[0]
        if part.magnitude.numel() != outputs:
            raise CliError(f"{name}: DoRA magnitude has {part.magnitude.numel()} values, the layer {outputs} outputs")


def _factors(entry: Entry, part: LoraParts, base: Base, adapter: Adapter) -> tuple[torch.Tensor, torch.Tensor]:
    """L [rows, r] and R [r, columns] with delta = scaling * L R in the orientation of the stored weight."""
    if part.embedding or _transposed(entry, part, base, adapter):
        left, right = part.A.T, part.B.T
    else:
        left, right = part.B.flatten(1), part.A.flatten(1)
    count = 1
    for size in entry.shape[1:]:
        count *= size
    if left.shape[1] != right.shape[0] or (left.shape[0], right.shape[1]) != (entry.shape[0], count):
        raise CliError(
            f"{entry.name}: the base weight is {list(entry.shape)}, the adapter's A {list(part.A.shape)} and "
            f"B {list(part.B.shape)} do not fit it; is this the right base model?"
        )
    return left.float(), right.float()


def _transposed(entry: Entry, part: LoraParts, base: Base, adapter: Adapter) -> bool:
    """Weights stored [in, out] (Conv1D): the shape says so, the config only where the weight is square."""
    if len(entry.shape) != 2 or part.A.dim() != 2:
        return False
    out_in, in_out = (part.B.shape[0], part.A.shape[1]), (part.A.shape[1], part.B.shape[0])
    if out_in != in_out:
        return entry.shape == in_out
    return bool(adapter.config.get("fan_in_fan_out")) or base.config.get("model_type") in _CONV1D_MODELS


def _plan_rest(key: str, tensor: torch.Tensor, plan: Plan, base: Base, adapter: Adapter) -> None:
    """Trained copies of whole modules, biases, embeddings, and token rows."""
    if ".original_module." in key or ".modules_to_save." in key:
        return  # further copies of an embedding whose current state is stored under its plain name
    if ".token_adapter." in key:
        module = key.partition(".token_adapter.")[0]
        name = _find(module + ".weight", base, adapter)
        plan.token_rows[name] = (_token_indices(adapter, module, tensor), tensor)
        return
    plain = key.replace(".base_layer.", ".")
    known = [c for c in (plain, plain.partition(".")[2]) if c in base.places]
    if not known:
        if not any(plain.split(".")[-2:-1] == [m.split(".")[-1]] or f".{m}." in f".{plain}." for m in _saved(adapter)):
            raise CliError(f"{adapter.folder}: {plain} is not in {base.folder}{nearest(plain, base.places)}")
        plan.added[plain] = tensor
        return
    entry = base.places[known[0]][1]
    if tuple(tensor.shape) != entry.shape:
        raise CliError(
            f"{known[0]}: the adapter brings shape {list(tensor.shape)}, the base has {list(entry.shape)}; "
            "resize the base model (its vocabulary?) and save it first"
        )
    plan.replaced[known[0]] = tensor


def _saved(adapter: Adapter) -> list[str]:
    return [str(name) for name in adapter.config.get("modules_to_save") or []]


def _token_indices(adapter: Adapter, module: str, rows: torch.Tensor) -> list[int]:
    indices = adapter.config.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = pattern_value(indices, module, None)
    if not isinstance(indices, list) or len(indices) != rows.shape[0]:
        raise CliError(
            f"{adapter.folder}: trainable_token_indices does not say which {rows.shape[0]} rows {module} has"
        )
    return [int(index) for index in indices]


def merged_pieces(place: tuple[Shard, Entry], part: LoraParts, base: Base, adapter: Adapter) -> Pieces:
    """The merged weight as row blocks."""
    entry = place[1]
    left, right = _factors(entry, part, base, adapter)
    assert entry.dtype is not None
    work = torch.float64 if entry.dtype == torch.float64 else torch.float32
    left, right, dtype = left.to(work) * part.scaling, right.to(work), entry.dtype
    read, spans = row_reader(*place), _spans(entry)

    def changed(begin: int, end: int) -> torch.Tensor:
        return read(begin, end).to(work).flatten(1).addmm_(left[begin:end], right)

    def pieces() -> Iterable[torch.Tensor]:
        if part.magnitude is None:
            yield from (changed(*span).to(dtype) for span in spans)
            return
        m = part.magnitude.to(work).flatten()
        if _transposed(entry, part, base, adapter):
            squares = torch.zeros(entry.shape[1], dtype=torch.float64)
            for span in spans:
                squares += changed(*span).double().square().sum(0)
            scale = (m / squares.sqrt().to(work))[None, :]
            yield from ((changed(*span) * scale).to(dtype) for span in spans)
        else:
            for begin, end in spans:
                block = changed(begin, end)
                yield (block * (m[begin:end] / block.norm(dim=1))[:, None]).to(dtype)

    return pieces


def _spans(entry: Entry) -> list[tuple[int, int]]:
    width = 1
    for size in entry.shape[1:]:
        width *= size
    step = max(1, _BLOCK_ELEMENTS // max(1, width))
    return [(begin, min(begin + step, entry.shape[0])) for begin in range(0, entry.shape[0], step)]


def _token_pieces(place: tuple[Shard, Entry], indices: list[int], rows: torch.Tensor) -> Pieces:
    def pieces() -> Iterable[torch.Tensor]:
        read, entry = row_reader(*place), place[1]
        for begin, end in _spans(entry):
            block = read(begin, end)
            for position, index in enumerate(indices):
                if begin <= index < end:
                    block[index - begin] = rows[position].to(block.dtype)
            yield block

    return pieces


def _outputs(shard: Shard, plan: Plan, base: Base, adapter: Adapter) -> list[Output]:
    outputs = []
    for entry in shard.entries:
        place, pieces = (shard, entry), None
        name, dtype = entry.name, entry.dtype
        if name in plan.merged:
            pieces = merged_pieces(place, plan.merged[name], base, adapter)
        elif name in plan.replaced or name in plan.biases:
            value = plan.replaced.get(name)
            value = row_reader(*place)(0, entry.shape[0]).float() if value is None else value.float()
            value = (value + plan.biases.get(name, 0.0)).to(dtype)
            pieces = _constant(value)
        elif name in plan.token_rows:
            pieces = _token_pieces(place, *plan.token_rows[name])
        outputs.append(Output(name, entry.code, entry.shape, place, pieces))
    return outputs


def _constant(value: torch.Tensor) -> Pieces:
    return lambda: [value]


def merge_into_folder(adapter: Adapter, base: Base, out: Path, report: Callable[[str], object]) -> Plan:
    """Write the merged model to `out`, which appears only when it is complete."""
    plan = make_plan(adapter, base)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CliError(f"--out {out}: exists and is not empty")
    if out.resolve().is_relative_to(base.folder.resolve()):
        raise CliError(f"--out {out}: must not be inside the base folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _write_all(room, plan, base, adapter, report)
        os.chmod(room, 0o777 & ~_umask())
        os.replace(room, out)
    except BaseException:
        shutil.rmtree(room, ignore_errors=True)
        raise
    return plan


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_all(room: Path, plan: Plan, base: Base, adapter: Adapter, report: Callable[[str], object]) -> None:
    total, weight_map = 0, {}
    for shard in base.shards:
        outputs = _outputs(shard, plan, base, adapter)
        if shard is base.shards[-1]:
            outputs += [
                Output(name, _CODES.get(tensor.dtype, "F32"), tuple(tensor.shape), None, _constant(tensor))
                for name, tensor in plan.added.items()
            ]
        total += write_shard(room / shard.path.name, outputs, shard.metadata, report)
        weight_map |= {output.name: shard.path.name for output in outputs}
    if [shard.path.name for shard in base.shards] != [SINGLE]:
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
