"""Budgets on counts (operators, bytes, FLOPs), which do not depend on the machine. Seconds are never tested."""

import importlib.util
from pathlib import Path

import pytest
import torch

import peft

_PROBE = Path(__file__).parents[2] / "benchmarks" / "probe.py"
_spec = importlib.util.spec_from_file_location("inlay_probe", _PROBE)
probe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(probe)

# method -> (operators, bytes moved, bytes saved, FLOPs), each over the frozen base
BUDGETS = {
    "lora": (1.45, 1.40, 1.36, 1.25),
    "lora_drop": (None, None, 1.42, 1.25),
    "dora": (None, None, 1.75, 1.25),
    "vera": (3.0, None, 1.6, None),
    "ia3": (3.0, None, None, 1.25),
    "miss": (3.0, None, 1.6, 1.25),
    "lokr": (3.0, None, 1.6, 1.25),
    "deft": (3.0, None, 1.6, 1.25),
    "adalora": (3.0, None, 1.6, 1.25),
    "peanut": (3.0, None, 1.6, 1.75),
    "hira": (3.0, None, 1.6, 1.75),
}
BUDGETS_BF16 = {"lora": (1.70, 1.40, 1.36, 1.25)}


def counted(dtype: torch.dtype, method: str) -> dict[str, float]:
    torch.manual_seed(0)
    ids = torch.randint(0, 512, (4, 256), generator=torch.Generator().manual_seed(1))
    emb = torch.randn(4, 256, 256, generator=torch.Generator().manual_seed(2)).to(dtype)
    base = probe.llama(dtype=dtype).requires_grad_(False)
    frozen = probe.counts(base, probe.make_step(base, ids, emb))
    model = peft.get_peft_model(probe.llama(dtype=dtype), probe.configs()[method]()).train()
    mine = probe.counts(model, probe.make_step(model, ids, emb))
    return {k: mine[k] / frozen[k] for k in frozen}


@pytest.mark.parametrize(
    ("method", "dtype"),
    [*((m, torch.float32) for m in BUDGETS), *((m, torch.bfloat16) for m in BUDGETS_BF16)],
    ids=lambda v: str(v).removeprefix("torch."),
)
def test_counts_stay_within_the_budget(method, dtype):
    budget = (BUDGETS if dtype == torch.float32 else BUDGETS_BF16)[method]
    got = counted(dtype, method)
    for key, limit in zip(("ops", "moved_mb", "saved_mb", "gflop"), budget, strict=True):
        if limit is not None:
            assert got[key] <= limit, (key, got)
