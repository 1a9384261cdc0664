# SPDX-License-Identifier: Apache-2.0
"""What was targeted, in words: a count per target entry, and the entries that matched nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Targets:
    counts: dict[str, int]
    unmatched: list[str]
    lines: list[str] = field(default_factory=list)


def count_targets(names: list[str], entries: Any) -> tuple[dict[str, int], list[str]]:
    """Modules per entry of `target_modules`; full names (from "all-linear") are counted by their last part."""
    if isinstance(entries, str) or not entries or len(names) and set(entries) >= set(names):
        return dict(Counter(name.rpartition(".")[2] for name in names)), []
    counts = {
        entry: sum(name == entry or name.endswith("." + entry) for name in names) for entry in sorted(map(str, entries))
    }
    return {k: v for k, v in counts.items() if v}, [k for k, v in counts.items() if not v]


def describe_targets(model: Any) -> Targets:
    config = model.peft_config[model.active_adapter]
    if config.is_prompt_learning:
        line = f"targets  the input: {config.num_virtual_tokens} virtual tokens"
        return _with_saved(model, config, Targets({"virtual tokens": config.num_virtual_tokens}, [], [line]))
    names = list(getattr(model.base_model, "targeted_module_names", []))
    parameters = list(getattr(model.base_model, "targeted_parameter_names", []))
    counts, unmatched = count_targets(names, getattr(config, "target_modules", None))
    counts |= dict(Counter(name.rpartition(".")[2] for name in parameters))
    total = sum(counts.values())
    lines = [f"targets  {total} modules: " + ", ".join(f"{name} x{count}" for name, count in sorted(counts.items()))]
    return _with_saved(model, config, Targets(counts, unmatched, lines))


def _with_saved(model: Any, config: Any, targets: Targets) -> Targets:
    """Adds the modules that are trained in full."""
    from peft.core.wrappers import ModulesToSaveWrapper

    names = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    counts, unmatched = count_targets(names, getattr(config, "modules_to_save", None))
    if counts:
        targets.lines.append("in full  " + ", ".join(f"{name} x{count}" for name, count in sorted(counts.items())))
    targets.unmatched += unmatched
    if targets.unmatched:
        targets.lines.append("         matched nothing: " + ", ".join(targets.unmatched))
    return targets
