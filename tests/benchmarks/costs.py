"""Counts of one step of every layer method on all linear layers, over the frozen base (`benchmarks/probe.py`)."""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import peft

_PROBE = Path(__file__).parents[2] / "benchmarks" / "probe.py"
_spec = importlib.util.spec_from_file_location("inlay_probe", _PROBE)
probe: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(probe)

KEYS = {"FLOPs": "gflop", "operators": "ops", "moved": "moved_mb", "saved": "saved_mb"}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def configs() -> dict[str, Callable[[], Any]]:
    """The probe's, and what it leaves out (RoAd's default groups do not divide a width of 688)."""

    def config(name: str, **options: Any) -> Callable[[], Any]:
        return lambda: getattr(peft, name)(task_type="CAUSAL_LM", target_modules=LINEAR, **options)

    more = {"road": config("RoadConfig", group_size=16), "supertuning": config("SupertuningConfig")}
    return probe.configs() | more


def _counts(dtype: torch.dtype, model: Any) -> dict[str, float]:
    """The probe's counts; the step that warms caches up has few tokens."""
    ids = torch.randint(0, 512, (4, 256), generator=torch.Generator().manual_seed(1))
    emb = torch.randn(4, 256, 256, generator=torch.Generator().manual_seed(2)).to(dtype)
    steps = iter([probe.make_step(model, ids[:, :8], emb[:, :8]), *[probe.make_step(model, ids, emb)] * 3])
    return probe.counts(model, lambda backward=True: next(steps)(backward))


@functools.cache
def _frozen(dtype: torch.dtype) -> dict[str, float]:
    return _counts(dtype, probe.llama(dtype=dtype).requires_grad_(False))


@functools.cache
def measured(method: str, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """{FLOPs, operators, moved, saved} as multiples of the frozen base's."""
    torch.manual_seed(0)
    mine = _counts(dtype, peft.get_peft_model(probe.llama(dtype=dtype), configs()[method]()).train())
    return {name: mine[key] / _frozen(dtype)[key] for name, key in KEYS.items()}
