# SPDX-License-Identifier: Apache-2.0
"""Mixed batches of low-rank adapters: the gathered products are those of each adapter alone."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model
from peft.ops import mixed, plain
from peft.ops.low_rank import Factors, delta


def factors(rank: int, scale: float | str, seed: int, dtype=torch.float64) -> Factors:
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, 5, generator=g, dtype=dtype), torch.randn(7, rank, generator=g, dtype=dtype)
    vector = torch.rand(rank, generator=g, dtype=dtype) if scale == "vector" else None
    return Factors(A, B, torch.tensor(1.5, dtype=dtype) if scale == "number" else scale if vector is None else vector)


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5), (4, 2, 3, 5)])
@pytest.mark.parametrize(
    "given",
    [
        [(2, 0.5), (2, 0.5), (2, 0.5)],
        [(2, 0.5), (2, 2.0), (2, -1.0)],
        [(1, 0.5), (3, 0.5), (2, 0.5)],
        [(1, "vector"), (3, 2.0), (2, "number")],
    ],
)
@pytest.mark.parametrize("rows", [None, [3, 0, 2]])
def test_equals_each_adapter_alone(shape, given, rows):
    torch.manual_seed(0)
    x, y = torch.randn(shape, dtype=torch.float64), torch.randn(*shape[:-1], 7, dtype=torch.float64)
    if rows is None:
        x, y = x[:3], y[:3]
    each = [factors(r, s, i) for i, (r, s) in enumerate(given)]
    wanted, before = y.clone(), y.clone()
    for f, row in zip(each, rows or range(3), strict=True):
        wanted[row] += delta(x[row], f)
    index = None if rows is None else torch.tensor(rows)
    torch.testing.assert_close(mixed.accumulate(y, x, each, index), wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(y, before)


def test_gradients_reach_every_adapter():
    x, y = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    leaves = [t.requires_grad_() for i in range(2) for t in factors(2, 0.5, i)[:2]]
    assert torch.autograd.gradcheck(
        lambda *t: mixed.accumulate(y, x, [Factors(t[0], t[1], 0.5), Factors(t[2], t[3], 2.0)]), leaves
    )


def test_where_gathering_pays():
    def shapes(rows: int, tokens: int, width: int = 64):
        return torch.empty(rows, tokens, width, device="meta"), torch.empty(rows, tokens, width, device="meta")

    two = [Factors(torch.empty(8, 64), torch.empty(64, 8))] * 2
    assert mixed.pays(*shapes(8, 1), two)  # four rows an adapter
    assert mixed.pays(*shapes(500, 8), two)  # as many tokens as ranks
    assert not mixed.pays(*shapes(500, 1), two)
    assert mixed.pays(*shapes(500, 1, 8 * 1000), [Factors(torch.empty(8, 8000), torch.empty(8000, 8))] * 2)
    assert not mixed.pays(*shapes(8, 1), two[:1])
    with plain():
        assert not mixed.pays(*shapes(8, 1), two)


class Products(TorchDispatchMode):
    """Counts products, and what gathers their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in (
            "addmm",
            "mm",
            "bmm",
            "baddbmm",
            "stack",
            "index",
            "index_copy",
            "index_copy_",
            "mul",
            "add",
            "clone",
        ):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def served(method, count: int, **options):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    model = get_peft_model(base, method(target_modules=["0", "2"], **options), "t0")
    for i in range(1, count):
        model.add_adapter(f"t{i}", method(target_modules=["0", "2"], **options))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if any(f".t{i}" in n for i in range(count)):
                p.copy_(torch.randn(p.shape))
    return model.eval()


@pytest.mark.parametrize("unadapted", [0, 3])
def test_operators_do_not_grow_with_the_adapters(unadapted):
    counts = {}
    for count in (3, 12):
        model, x = served(LoraConfig, count, r=2), torch.randn(12 + unadapted, 4, 16)
        names = [f"t{i % count}" for i in range(12)] + ["__base__"] * unadapted
        with torch.no_grad(), Products() as log:
            mixed_out = model(x, adapter_names=names)
        counts[count] = log.seen
        for row in (0, 5, 11, len(x) - 1):
            with torch.no_grad():
                alone = model(x[row : row + 1], adapter_names=[names[row]])
            torch.testing.assert_close(mixed_out[row : row + 1], alone, rtol=1e-5, atol=1e-5)
    layer = {"addmm": 1, "stack": 2, "bmm": 1, "baddbmm": 1} | ({"index": 2, "index_copy": 1} if unadapted else {})
    assert counts[3] == counts[12] == {name: 2 * number for name, number in layer.items()}


@pytest.mark.parametrize(
    ("method", "options"),
    [(LoraConfig, {"r": 2, "use_dora": True}), (VeraConfig, {"r": 4}), (IA3Config, {"feedforward_modules": ["2"]})],
)
def test_other_methods_and_variants(method, options):
    model, x = served(method, 4, **options), torch.randn(6, 3, 16)
    names = ["t0", "t1", "__base__", "t3", "t2", "t0"]
    with torch.no_grad():
        out = model(x, adapter_names=names)
        for row, name in enumerate(names):
            alone = model(x[row : row + 1], adapter_names=[name])
            torch.testing.assert_close(out[row : row + 1], alone, rtol=1e-4, atol=1e-4)
