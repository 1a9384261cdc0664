# SPDX-License-Identifier: Apache-2.0
"""LoRA whose initialisation changed the base weights (PiSSA, OLoRA, CorDA, LoRA-GA), saved as a plain LoRA of the
unchanged base.

With W = W' + s B0 A0 for the changed base W', and trained factors A, B: W' + s B A = W + s [B | -B0] [A; A0].
"""

import copy
import math
import os
import warnings
from typing import Any

import torch

from ..config import PeftConfig
from ..utils.peft_types import PeftType

CHANGES_BASE = ("pissa", "corda", "olora", "lora_ga")


def convert_to_plain_lora(
    state: dict[str, torch.Tensor], config: Any, initial: str | os.PathLike
) -> tuple[dict[str, torch.Tensor], PeftConfig]:
    """Tensors and configuration of twice the rank. `initial` is the folder of the adapter as it was before training."""
    if config.peft_type != PeftType.LORA:
        raise ValueError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported for "
            f"{getattr(config.peft_type, 'value', config.peft_type)}, only for LORA."
        )
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ValueError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported when using "
            "`rank_pattern` or `alpha_pattern` at the same time as `use_rslora=True`."
        )
    if not str(config.init_lora_weights).lower().startswith(CHANGES_BASE):
        warnings.warn(
            f"`path_initial_model_for_weight_conversion` only makes sense for {', '.join(CHANGES_BASE)}: with "
            f"init_lora_weights={config.init_lora_weights!r} the base weights were not changed.",
            stacklevel=5,
        )
    from .files import load_peft_weights

    return subtract_initial(state, load_peft_weights(initial, device="cpu"), str(initial)), _doubled(config)


def subtract_initial(
    state: dict[str, torch.Tensor], before: dict[str, torch.Tensor], where: str
) -> dict[str, torch.Tensor]:
    """[A; A0] and [B | -B0] for every pair of factors; `before` holds A0 and B0 under the same keys."""
    out = {}
    for key, value in state.items():
        axis = rank_axis(key)
        if axis is None:
            out[key] = value
            continue
        if key not in before:
            raise ValueError(f"The initial adapter in {where} lacks {key!r}: it does not belong to this adapter.")
        first = before[key].to(value.device, value.dtype)
        out[key] = torch.cat([value, first if axis == 0 else -first], dim=axis)
    return out


def rank_axis(key: str) -> int | None:
    """The dimension of a factor that counts the rank; None for everything else in the file (biases, saved modules
    ...).
    """
    slot = key.removesuffix(".weight").rpartition(".")[2]
    return {"lora_A": 0, "lora_embedding_A": 0, "lora_B": 1, "lora_embedding_B": 1}.get(slot)


def _doubled(config: Any) -> PeftConfig:
    config = copy.copy(config)
    config.init_lora_weights = True
    config.r *= 2
    # The scaling must stay: alpha / r, or alpha / sqrt(r).
    config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
    config.rank_pattern = {k: 2 * v for k, v in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {k: 2 * v for k, v in (config.alpha_pattern or {}).items()}
    return config


def mark_initial_as_plain(folder: str | os.PathLike, config: Any) -> None:
    """The configuration in the folder of the initial adapter: its tensors are what they are, not to be computed
    again.
    """
    plain = copy.copy(config)
    plain.init_lora_weights = True
    plain.save_pretrained(folder)
