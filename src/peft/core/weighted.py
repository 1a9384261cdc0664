# SPDX-License-Identifier: Apache-2.0
"""What all forms of `add_weighted_adapter` share: checks, and the configuration of the new adapter."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..config import nearest

if TYPE_CHECKING:
    from .tuner import TunerModel


def union(values: Sequence[Any], field: str) -> Any:
    """Sets are united, regexes become alternatives; the two kinds do not mix."""
    texts = [isinstance(v, str) for v in values]
    if all(texts):
        return "|".join(f"({v})" for v in values)
    if any(texts):
        raise ValueError(
            f"All adapter configs should follow the same {field} type. Combining adapters with `{field}` of "
            "type list/set and str is not supported."
        )
    return set().union(*values)


def combined_config(
    tuner: "TunerModel",
    adapters: Sequence[str],
    weights: Sequence[float],
    fields: tuple[str, ...] = ("target_modules",),
) -> Any:
    """The first adapter's configuration with the union of the `fields`; checks that the sources can be combined."""
    if len(adapters) == 0:
        raise ValueError("Please give at least one adapter to combine.")
    if len(adapters) != len(weights):
        raise ValueError(
            f"There are {len(adapters)} adapters but {len(weights)} weights; give one weight for each adapter."
        )
    for name in adapters:
        if name not in tuner.peft_config:
            raise ValueError(
                f"Adapter {name} does not exist; there are "
                f"{sorted(tuner.peft_config)}.{nearest(name, tuner.peft_config)}"
            )
    shared = [w for w in tuner.wrappers() if sum(n in w.adapter_names for n in adapters) > 1]
    if names := [name for name, module in tuner.model.named_modules() if module in shared]:
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save: "
            f"{', '.join(map(repr, names))}. Combine adapters of which one at most trains it."
        )
    first = tuner.peft_config[adapters[0]]
    values = {f: union([getattr(tuner.peft_config[n], f) for n in adapters], f) for f in fields}
    return first.with_values(**values)
