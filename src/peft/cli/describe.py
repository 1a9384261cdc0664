# SPDX-License-Identifier: Apache-2.0
"""What was targeted, in words: a count per target entry, and the entries that matched nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any


@dataclass
class Targets:
    counts: dict[str, int]
    unmatched: list[str]
    lines: list[str]


def count_targets(names: list[str], entries: Any) -> tuple[dict[str, int], list[str]]:
    """Modules per entry of `target_modules`; full names (from "all-linear") are counted by their last part."""
    if isinstance(entries, str) or not entries or len(names) and set(entries) >= set(names):
        return dict(Counter(name.rpartition(".")[2] for name in names)), []
    counts = {
        entry: sum(name == entry or name.endswith("." + entry) for name in names) for entry in sorted(map(str, entries))
    }
    return {k: v for k, v in counts.items() if v}, [k for k, v in counts.items() if not v]


def describe_targets(model: Any) -> Targets:
    from peft.core.wrappers import ModulesToSaveWrapper

    config, tuner = model.peft_config[model.active_adapter], model.base_model
    if config.is_prompt_learning:
        counts, unmatched = {"virtual tokens": config.num_virtual_tokens}, []
        lines = [f"targets  the input: {config.num_virtual_tokens} virtual tokens"]
    else:
        counts, unmatched = count_targets(tuner.targeted_module_names, getattr(config, "target_modules", None))
        counts |= Counter(name.rpartition(".")[2] for name in tuner.targeted_parameter_names)
        lines = [f"targets  {sum(counts.values())} modules: {_listed(counts)}"]
    wrapped = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    in_full, missing = count_targets(wrapped, getattr(config, "modules_to_save", None))
    if in_full:
        lines.append(f"in full  {_listed(in_full)}")
    if unmatched := unmatched + missing:
        lines.append("         matched nothing: " + ", ".join(unmatched))
    return Targets(counts, unmatched, lines)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in sorted(counts.items()))
