# SPDX-License-Identifier: Apache-2.0
"""Old address of the operators in `core/combine.py`."""

from ._lazy import lazy_attributes, owners

_HOMES = owners(
    {
        "peft.core.combine": (
            "calculate_majority_sign_mask dare_linear dare_ties disjoint_merge magnitude_based_pruning magnitude_prune "
            "prune random_pruning reshape_weight_task_tensors task_arithmetic ties"
        )
    }
)

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
