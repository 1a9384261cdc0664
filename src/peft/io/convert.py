# SPDX-License-Identifier: Apache-2.0
"""Adapters made for another layout of the same architecture.

transformers 5 holds the experts of mixture models in stacked parameters (`experts.gate_up_proj`, `experts.down_proj`)
where it had a module for each expert. LoRA configurations and files that name the old modules are rewritten for the new
parameters; the deltas stay exactly the same. Other architectures had modules renamed, which is applied to the keys of
LoRA files too.
"""

import contextlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..core.layer import AdapterLayer
from ..core.match import ALL_LINEAR
from ..utils._lazy import lazy_attributes, owners
from ..utils.peft_types import PeftType
from .experts import fold_a, fold_b
from .keys import PEFT_PREFIX, adapter_entries, find_tuner, walk

_OPS = owners({"peft.io.conversion_ops": "FlattenDims PeftConcatenate PermuteDims"})
__getattr__, __dir__ = lazy_attributes(__name__, _OPS)

# Family of conversion -> old projection name -> parameter that holds it now.
FUSED = "gate_up_proj"
FAMILIES: dict[str, dict[str, str]] = {
    "mixtral": {"gate": "gate.weight", "w1": FUSED, "w3": FUSED, "w2": "down_proj"},
    "qwen2_moe": {"gate": "gate.weight", "gate_proj": FUSED, "up_proj": FUSED, "down_proj": "down_proj"},
}
FUSED_PATTERN = r".*\.gate_up_proj"


def _model_type(model: Any) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _table_of_transformers() -> Any:
    """transformers' module of conversions; None where it is not in use, or of version 4, which has the old layout."""
    if "transformers" in sys.modules:
        with contextlib.suppress(ImportError):
            from transformers import conversion_mapping

            return conversion_mapping
    return None


def _family(model_type: str) -> str | None:
    if (table := _table_of_transformers()) is None:
        return None
    family = {"mixtral": "mixtral", **getattr(table, "_MODEL_TO_CONVERSION_PATTERN", {})}.get(model_type)
    return family if family in FAMILIES else None


# ---- configurations


def convert_peft_config_for_transformers(peft_config: Any, model: nn.Module, conversions: Sequence[Any] | None) -> None:
    """Move old expert projections from `target_modules` to `target_parameters`, in place; no conversions, nothing to
    do.
    """
    if conversions:
        convert_config(peft_config, model)


def convert_config(config: Any, model: nn.Module) -> None:
    """See the module's docstring. Names that exist as modules too (dense layers, shared experts) stay targets as
    well.
    """
    model_type = _model_type(model)
    if config.peft_type != PeftType.LORA or model_type is None or config.target_modules is None:
        return
    family = _family(model_type)
    if family is None:
        return
    names = _Names(model)
    if not names.experts:  # an implementation of its own with the old layout
        return
    table = FAMILIES[family]
    if isinstance(config.target_modules, str):
        _convert_pattern(config, names, table, family)
    else:
        _convert_names(config, names, table)


class _Names:
    """Names of what a model holds: fused experts, routers (bare parameters), linear layers."""

    def __init__(self, model: nn.Module):
        self.experts: list[str] = []
        self.routers: list[str] = []
        self.linear: list[str] = []
        heads = _heads(model)
        for path, module in walk(model):
            if isinstance(module, AdapterLayer):
                continue
            path = path.replace(".base_layer", "")
            if FUSED in module._parameters:
                self.experts.append(path)
            elif isinstance(module, nn.Linear):
                if id(module) not in heads:
                    self.linear.append(path)
            elif path.rpartition(".")[2] == "gate" and module._parameters.get("weight") is not None:
                self.routers.append(path)


def _heads(model: Any) -> set[int]:
    function = getattr(model, "get_output_embeddings", None)
    head = function() if callable(function) else None
    return set() if head is None else {id(head), id(getattr(head, "base_layer", None))}


def _convert_names(config: Any, names: _Names, table: dict[str, str]) -> None:
    moved = {}
    for entry in config.target_modules:
        leaf = entry.rpartition(".")[2]
        if leaf in table and (table[leaf] != "gate.weight" or names.routers):
            moved[entry] = leaf
    if not moved:
        return
    _check_fused(set(moved.values()), table)
    stay = {e for e in config.target_modules if e not in moved or any(f".{n}".endswith(f".{e}") for n in names.linear)}
    _apply(config, stay, {table[leaf] for leaf in moved.values()}, table)


def _check_fused(leaves: set[str], table: dict[str, str]) -> None:
    found = [leaf for leaf in _halves(table) if leaf in leaves]
    lost = [leaf for leaf in _halves(table) if leaf not in leaves]
    if found and lost:
        raise ValueError(
            f"Cannot convert PEFT target(s) {', '.join(found)} without also targeting {', '.join(lost)} because they "
            f"are fused into {FUSED}."
        )


def _halves(table: dict[str, str]) -> list[str]:
    """The old projections that are one parameter now."""
    return [leaf for leaf, parameter in table.items() if parameter == FUSED]


def _apply(config: Any, modules: set[str], parameters: set[str], table: dict[str, str]) -> None:
    config.target_modules = modules
    config.target_parameters = set(config.target_parameters or ()) | parameters
    ranks, alphas = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
    if any(p == FUSED or p.endswith("." + FUSED) for p in parameters):
        rank, alpha = _fused_rank(config, ranks, alphas, _halves(table))
        ranks.setdefault(FUSED_PATTERN, rank)
        alphas.setdefault(FUSED_PATTERN, alpha)
    for patterns in (ranks, alphas):
        for leaf in [n for n, new in table.items() if n != new and n in patterns and n not in modules]:
            value = patterns.pop(leaf)
            if table[leaf] != FUSED:
                patterns.setdefault(rf".*\.{re.escape(table[leaf])}", value)
    config.rank_pattern, config.alpha_pattern = ranks, alphas


def _fused_rank(config: Any, ranks: dict[str, int], alphas: dict[str, float], halves: list[str]) -> tuple[int, float]:
    """Rank and alpha of a parameter that two projections share: the ranks add up, the scaling stays."""
    r = [{leaf: config.r, **ranks}[leaf] for leaf in halves]
    alpha = [{leaf: config.lora_alpha, **alphas}[leaf] for leaf in halves]
    power = 0.5 if config.use_rslora else 1.0
    scalings = [a / n**power for a, n in zip(alpha, r, strict=True)]
    if max(scalings) > 1.0001 * min(scalings):
        raise ValueError(
            f"rank_pattern and alpha_pattern give {' and '.join(halves)} the scalings {scalings}, but they are fused "
            f"into {FUSED}, which has one. Choose ranks and alphas with the same alpha / r."
        )
    if len(set(r)) == 1 and power == 1.0:
        return len(r) * r[0], len(r) * alpha[0]
    return sum(r), scalings[0] * sum(r) ** power


def _convert_pattern(config: Any, names: _Names, table: dict[str, str], family: str) -> None:
    """A regex or "all-linear", tried on the names that the experts had."""
    everything = config.target_modules.lower() == ALL_LINEAR
    pattern = re.compile(".*" if everything else config.target_modules)
    hits: dict[str, list[str]] = defaultdict(list)  # old projection name -> places where the pattern hits it
    for path in names.experts:
        for leaf, parameter in table.items():
            if parameter != "gate.weight" and any(pattern.fullmatch(f"{p}.0.{leaf}") for p in _old_paths(path, family)):
                hits[leaf].append(path)
    for path in names.routers:
        if any(pattern.fullmatch(p) for p in _old_paths(path, family)):
            hits["gate"].append(path.removesuffix(".gate"))
    if not hits:
        return
    _check_fused(set(hits), table)
    parameters: set[str] = set()
    for leaf, places in hits.items():
        everywhere = len(places) == len(names.routers if leaf == "gate" else names.experts)
        parameters |= {table[leaf]} if everywhere else {f"{p}.{table[leaf]}" for p in places}
    matched = [n for n in names.linear if pattern.fullmatch(n)]
    leaves = {n.rpartition(".")[2] for n in matched}
    same = sum(n.rpartition(".")[2] in leaves for n in names.linear) == len(matched)
    _apply(config, leaves if same else set(matched), parameters, table)


def _old_paths(path: str, family: str) -> Iterator[str]:
    yield path
    if family == "mixtral":
        yield re.sub(r"\.mlp(?=\.|$)", ".block_sparse_moe", path)


# ---- weights


def convert_peft_adapter_state_dict_for_transformers(
    model: nn.Module, peft_config: Any, adapter_state_dict: dict[str, torch.Tensor], adapter_name: str = "default"
) -> dict[str, torch.Tensor]:
    """Keys and tensors of a LoRA file in the layout of the installed transformers."""
    if getattr(peft_config, "peft_type", PeftType.LORA) != PeftType.LORA:
        return adapter_state_dict
    valid = {e.file for e in adapter_entries(model, adapter_name, peft_config)}
    return convert_weights(model, adapter_state_dict, valid)


def convert_weights(model: nn.Module, state: Mapping[str, torch.Tensor], valid: set[str]) -> dict[str, torch.Tensor]:
    """`valid`: the file keys that the model expects. Keys that are valid already are never touched."""
    foreign = [k for k in state if k not in valid and ".lora_" in k]
    conversions = _conversions(model) if foreign else None
    if not conversions:
        return dict(state)
    renamings, converters = _split(conversions)
    converted = {k: v for k, v in state.items() if k in valid or ".lora_" not in k}
    fused: dict[tuple[str, str, int], dict[tuple[int, int], str]] = defaultdict(dict)
    for key in foreign:
        prefix = PEFT_PREFIX if key.startswith(PEFT_PREFIX) else ""
        name = _renamed(key.removeprefix(prefix), renamings)
        place = _expert(name, converters)
        if place is None:
            new = prefix + name
            converted[new if new in valid or key.removeprefix(PEFT_PREFIX) not in valid else key] = state[key]
        else:
            head, factor, converter, source, expert = place
            fused[(prefix + head, factor, converter)][(source, expert)] = key
    for (head, factor, converter), keys in fused.items():
        target = _target(head, factor, converters[converter].target_patterns[0], valid)
        folded = _fold(factor, len(converters[converter].source_patterns), {p: state[k] for p, k in keys.items()})
        if target is None or folded is None:
            converted.update((k, state[k]) for k in keys.values())  # reported as unexpected
        else:
            converted[target] = folded
    return converted


def _conversions(model: Any) -> list[Any] | None:
    if (table := _table_of_transformers()) is None:
        return None
    tuner = find_tuner(model)
    base: Any = tuner.model if tuner is not None else model
    is_known = isinstance(base, sys.modules["transformers"].PreTrainedModel)
    return table.get_model_conversion_mapping(base) if is_known else None


def _split(conversions: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    return renamings, [c for c in conversions if isinstance(c, WeightConverter) and _is_experts(c)]


def _is_experts(converter: Any) -> bool:
    targets = converter.target_patterns
    return len(targets) == 1 and targets[0].endswith((FUSED, "down_proj"))


def _renamed(name: str, renamings: list[Any]) -> str:
    """The key after the renamings of the base model; one that only drops a prefix is undone."""
    new = name
    for renaming in renamings:
        new = renaming.rename_source_key(new)[0]
    return name if name.endswith("." + new) else new


def _expert(name: str, converters: list[Any]) -> tuple[str, str, int, int, int] | None:
    """(module path of the experts, "A" or "B", converter, source in it, expert) of a per-expert key."""
    for i, converter in enumerate(converters):
        for j, source in enumerate(converter.source_patterns):
            stem = re.escape(source.removesuffix(".weight")).replace(r"\*", r"(?P<expert>\d+)")
            found = re.search(rf"{stem}\.lora_(?P<factor>[AB])\.weight$", name)
            if found is not None:
                inner = converter.target_patterns[0].rpartition(".")[0]
                return name[: found.start()] + inner, found["factor"], i, j, int(found["expert"])
    return None


def _target(head: str, factor: str, pattern: str, valid: set[str]) -> str | None:
    """The gate and up projections are wrapped first, so they are the inner layer, unless they are the only one."""
    outer, inner = f"{head}.lora_{factor}.weight", f"{head}.base_layer.lora_{factor}.weight"
    if outer not in valid:
        outer, inner = outer.removeprefix(PEFT_PREFIX), inner.removeprefix(PEFT_PREFIX)
    nested = inner in valid
    target = inner if nested and pattern.endswith(FUSED) else outer
    return target if target in valid else None


def _fold(factor: str, sources: int, tensors: dict[tuple[int, int], torch.Tensor]) -> torch.Tensor | None:
    experts = 1 + max(e for _, e in tensors)
    if set(tensors) != {(s, e) for s in range(sources) for e in range(experts)}:
        return None
    rows = [[tensors[s, e] for e in range(experts)] for s in range(sources)]
    if any(t.shape != row[0].shape for row in rows for t in row):
        return None
    stacks = [torch.stack(row) for row in rows]
    return fold_a(stacks) if factor == "A" else fold_b(stacks)


# ---- what transformers' own loader is told


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """The conversions of a base model, for the keys of an adapter file: prefix off, adapter name in, experts fused."""
    if not weight_conversions:
        return []
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    prefixes = _prefixes(peft_config)
    mapping: list[Any] = [WeightRenaming("base_model.model.model.", "model."), WeightRenaming("base_model.model.", "")]
    if getattr(peft_config, "use_dora", False):  # the only entry of a module that files know without `.weight`
        mapping.append(WeightRenaming("lora_magnitude_vector$", "lora_magnitude_vector.weight"))
    mapping += [WeightRenaming(rf"({prefix}[^\.]*)", rf"\1.{adapter_name}") for prefix in sorted(prefixes)]
    alone = _fused_alone(peft_config)
    for conversion in weight_conversions:
        if not isinstance(conversion, WeightConverter):
            mapping.append(conversion)
        elif _is_experts(conversion):
            mapping += [_lora_converter(conversion, factor, adapter_name, alone) for factor in "AB"]
    return mapping


def _prefixes(config: Any) -> set[str]:
    """The parameter prefix of the configuration's method, all known ones if there is no (known) method."""
    from ..registry import method_of, methods

    with contextlib.suppress(KeyError):
        if config is not None:
            return {method_of(config).prefix}
    return {m.prefix for m in methods().values()}


def _fused_alone(config: Any) -> bool:
    """The configuration adapts gate and up projections but no down projection: then nothing is nested."""
    if config is None or isinstance(getattr(config, "target_modules", None), str):
        return False
    entries = [*(getattr(config, "target_modules", None) or ()), *(getattr(config, "target_parameters", None) or ())]
    leaves = {e.rpartition(".")[2] for e in entries}
    return bool(leaves & {FUSED, "w1", "gate_proj"}) and not leaves & {"down_proj", "w2"}


def _lora_converter(conversion: Any, factor: str, adapter_name: str, alone: bool) -> Any:
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

    from .conversion_ops import FlattenDims, PeftConcatenate, PermuteDims

    old, target = conversion._original_source_patterns, conversion._original_target_patterns[0]
    sources = [s.removesuffix(".weight") + f".lora_{factor}.*" for s in old]
    head, _, leaf = target.rpartition(".")
    inner = "base_layer." if leaf == FUSED and not alone else ""
    operations: list[Any] = [MergeModulelist(dim=0)]
    if factor == "A":
        operations += [Concatenate(dim=1)] if len(sources) > 1 else []
        operations.append(FlattenDims((0, 1)))
    elif len(sources) > 1:
        operations.append(PeftConcatenate(dim=1))
    else:
        operations += [PermuteDims((2, 0, 1)), FlattenDims((0, 1)), Transpose(0, 1)]
    made = type(conversion)(sources, f"{head}.{inner}lora_{factor}.{adapter_name}.weight", operations)
    for field in ("distributed_operation", "quantization_operation", "scope_prefix", "base_model_prefix", "force_cpu"):
        if hasattr(conversion, field):  # not all are in every version of transformers
            setattr(made, field, getattr(conversion, field))
    return made
