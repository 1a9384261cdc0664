# SPDX-License-Identifier: Apache-2.0
"""Proof that what was saved is what was trained: reload into a fresh base, merge, compare logits each time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Check:
    """One comparison; `limit` is relative to the largest logit."""

    what: str
    difference: float
    limit: float
    skipped: str = ""

    @property
    def ok(self) -> bool:
        return bool(self.skipped) or self.difference <= self.limit  # NaN fails

    @property
    def text(self) -> str:
        if self.skipped:
            return f"{self.what}: not applicable, {self.skipped}"
        return f"{self.what}: logits differ by {self.difference:.2g} of the largest ({'ok' if self.ok else 'TOO MUCH'})"


def verify(trained: Any, adapter: Path, source: str, dtype: Any, rows: list[dict[str, Any]]) -> list[Check]:
    """Reload in the training dtype, where results must be the same; merge in float32, where rounding is small."""
    import torch

    from peft import PeftModel

    from . import models

    ids = [torch.tensor([row["input_ids"]]) for row in rows[:4]]
    base = models.load_model(source, dtype)
    fresh = PeftModel.from_pretrained(base, str(adapter), torch_device=str(trained.device)).to(trained.device)
    checks = [Check("reloaded adapter", _difference(_logits(trained, ids), _logits(fresh, ids)), 1e-5)]
    if fresh.peft_config[fresh.active_adapter].is_prompt_learning:
        return [*checks, Check("merged model", 0.0, 0.0, "a prompt cannot be merged into weights")]
    fresh = fresh.to(torch.float32)
    unmerged = _logits(fresh, ids)
    try:
        merged = fresh.merge_and_unload()
    except (ValueError, NotImplementedError, AttributeError, TypeError) as error:
        return [*checks, Check("merged model", 0.0, 0.0, f"this method does not merge ({str(error).splitlines()[0]})")]
    return [*checks, Check("merged model", _difference(unmerged, _logits(merged, ids)), 1e-3)]


def _logits(model: Any, ids: list[Any]) -> list[Any]:
    import torch

    from peft import PeftModel

    from .data import method_inputs

    model.eval()
    extra = method_inputs(model, 1) if isinstance(model, PeftModel) else {}
    with torch.no_grad():
        return [model(input_ids=row.to(model.device), **extra).logits.float().cpu() for row in ids]


def _difference(expected: list[Any], found: list[Any]) -> float:
    scale = max(float(e.abs().max()) for e in expected)
    return max(float((e - f).abs().max()) for e, f in zip(expected, found, strict=True)) / scale
