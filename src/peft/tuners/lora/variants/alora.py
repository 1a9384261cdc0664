# SPDX-License-Identifier: Apache-2.0
"""aLoRA: Activated LoRA (arXiv 2504.12397). The delta acts from the last occurrence of the invocation tokens on.

y_t = W x_t + [t >= start]·s·B A x_t. The 0/1 gate multiplies the rank-r intermediate: static shapes, no host
synchronisation.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ....ops import low_rank
from .base import LoraVariant

Offsets = list[int | None] | torch.Tensor


class ALora(LoraVariant):
    name = "aLoRA"
    quantised = True
    standalone = False
    why_not_mergeable = "they act on a part of the tokens only."

    def advance(self, layer: Any, name: str, x: torch.Tensor, y: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        gate = self.gate(layer, x)
        if gate is None:
            return y
        f = layer.plain_factors(name)
        return low_rank.accumulate(y, x, (low_rank.Factors(f.A, f.B, f.scale * gate, f.dropout),), layer.training)

    @staticmethod
    def gate(layer: Any, x: torch.Tensor) -> torch.Tensor | None:
        """1 where the adapter acts, [batch, T, 1]; None when no row has an offset (0 for backward)."""
        call = layer.switch.call
        if call.alora_offsets is None or x.dim() < 3:
            return x.new_zeros(1) if torch.is_grad_enabled() else None
        offsets = call.alora_offsets = offsets_tensor(call.alora_offsets, x.device)
        offsets = offsets if call.part is None else offsets[call.part]
        if len(offsets) != len(x):  # samples repeated by generate
            offsets = offsets.repeat_interleave(len(x) // len(offsets))
        length = x.shape[-2]
        position = torch.arange(length, device=x.device)
        return (position >= length - offsets[:, None]).to(x.dtype)[..., None]


def offsets_tensor(offsets: Offsets, device: torch.device) -> torch.Tensor:
    """Offsets from the end, 0 where the adapter is off."""
    if isinstance(offsets, torch.Tensor):
        return offsets.to(device)
    return torch.tensor([o or 0 for o in offsets], device=device)


def calculate_alora_offsets(
    peft_config: dict[str, Any],
    active_adapter: str | Sequence[str],
    input_ids: torch.Tensor,
    adapter_names: Sequence[str] | None = None,
) -> list[int | None]:
    """For each row, how many tokens from the end the adapter acts on: from the last occurrence of its tokens.

    None: not at all.
    """
    if input_ids is None:
        return []
    rows = len(input_ids)
    names = _names_of_rows(active_adapter, adapter_names, rows)
    offsets: list[int | None] = [None] * rows
    for name in dict.fromkeys(names):
        if name == "__base__":
            continue
        if name not in peft_config:
            warnings.warn(f"Adapter {name!r} not found in peft_config, its rows use the base model.", stacklevel=2)
            continue
        tokens = getattr(peft_config[name], "alora_invocation_tokens", None)
        if tokens:
            found = _last_occurrence(input_ids, torch.tensor(tokens, device=input_ids.device)).tolist()
            for row, start in enumerate(found):
                if names[row] == name and start >= 0:
                    offsets[row] = input_ids.shape[1] - start
    return offsets


def _names_of_rows(active: str | Sequence[str], adapter_names: Sequence[str] | None, rows: int) -> list[str]:
    if adapter_names is not None:
        return list(adapter_names)
    if not isinstance(active, str):
        if len(active) != 1:
            raise ValueError("aLoRA needs exactly one active adapter; use `adapter_names` for mixed batches.")
        active = active[0]
    return [active] * rows


def _last_occurrence(ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Start of the last occurrence of `tokens` in each row, -1 when there is none."""
    if ids.shape[1] < len(tokens):
        return torch.full((len(ids),), -1)
    hits = (ids.unfold(1, len(tokens), 1) == tokens).all(-1)  # [rows, starts]
    position = torch.arange(hits.shape[1], device=ids.device)
    return torch.where(hits, position, -1).amax(1)


def open_call(tuner: Any, kwargs: dict[str, Any]) -> None:
    """Leave the offsets of a call in the switch: given as `alora_offsets`, or found in `input_ids`."""
    configs, call = tuner.peft_config, tuner.switch.call
    given = kwargs.pop("alora_offsets", None)
    active = tuner.switch.at_work
    wanted = [n for n in configs if n in active and getattr(configs[n], "alora_invocation_tokens", None)]
    if not wanted:
        return
    if (kwargs.get("num_beams") or getattr(kwargs.get("generation_config"), "num_beams", 1) or 1) > 1:
        raise ValueError("Beam search is not supported with aLoRA adapters, please use num_beams=1.")
    if given is not None:
        call.alora_offsets = given
        return
    ids = kwargs.get("input_ids", kwargs.get("inputs"))
    causal = [n for n in wanted if configs[n].task_type == "CAUSAL_LM"]
    if not causal:
        return
    if ids is None:
        warnings.warn(
            "Cannot calculate aLoRA offsets from inputs_embeds; the adapter is off. Pass input_ids.", stacklevel=4
        )
        return
    call.alora_offsets = calculate_alora_offsets(configs, tuner.active_adapters, ids, call.adapter_names)
