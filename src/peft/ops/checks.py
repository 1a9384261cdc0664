# SPDX-License-Identifier: Apache-2.0
"""Self-check of every op: the path that would run here against the plain one, in value and gradient.

`python -c "from peft.ops import checks; print(checks.run('cuda'))"` tells whether a machine's kernels can be trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from . import cayley, circulant, dora, householder, low_rank, rows, sparse, wavelet
from .dispatch import plain


def _leaf(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def _linear(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
    return low_rank.linear(x, W, b, (low_rank.Factors(A, B, 0.5, p), low_rank.Factors(A, B, 2.0)), training=True)


def _accumulate(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return low_rank.accumulate(x, x, (low_rank.Factors(A, B, 0.5),), training=True)


def _dora(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, m: Tensor, p: float) -> Tensor:
    norm = dora.dora_norm(W, A, B, 0.5)
    return dora.dora_linear(x, W, b, low_rank.Factors(A, B, 0.5, p), m, norm, training=True)


def _linear_cases() -> Iterator[tuple]:
    for p in (0.0, 0.3):
        yield _leaf(3, 5, 32), torch.randn(24, 32), _leaf(24), _leaf(4, 32), _leaf(24, 4), p


def _dora_cases() -> Iterator[tuple]:
    for p, b in ((0.0, None), (0.0, torch.randn(24)), (0.3, torch.randn(24))):
        m = (1 + torch.rand(24)).requires_grad_()
        yield _leaf(3, 5, 32), torch.randn(24, 32), b, _leaf(4, 32), _leaf(24, 4), m, p


def _rotate_cases() -> Iterator[tuple]:
    for blocks in (4, 1):
        yield _leaf(3, 5, 32), _leaf(blocks, 8, 8)


def _sparse(x: Tensor, values: Tensor) -> Tensor:
    e = torch.arange(values.numel())
    return sparse.multiply(x, values, e % 24, e * 7 % 32, 24, 0.5)


def _wavelet(x: Tensor, c: Tensor, name: str) -> Tensor:
    e = torch.arange(c.numel())
    return wavelet.multiply(x, c, wavelet.basis(e % 24, e * 7 % 32, (24, 32), name), 0.5)


def _head(x: Tensor, W: Tensor, trained: Tensor) -> Tensor:
    return rows.head(x, W, None, torch.arange(trained.shape[0]) * 2, trained)


# Name of an op -> (call, what yields its argument tuples; floating tensors that require it are differentiated).
OPS: dict[str, tuple[Callable[..., Tensor], Callable[[], Iterable[tuple]]]] = {
    "low_rank.linear": (_linear, _linear_cases),
    "low_rank.accumulate": (_accumulate, lambda: [(_leaf(3, 5, 32), _leaf(4, 32), _leaf(32, 4))]),
    "dora.dora_linear": (_dora, _dora_cases),
    "cayley.rotate": (cayley.rotate, _rotate_cases),
    "cayley.cayley_series": (cayley.cayley_series, lambda: [(0.1 * torch.randn(3, 8, 8), t) for t in (1, 3, 5, 9)]),
    "householder.reflect": (householder.reflect, lambda: [(_leaf(5, 32), _leaf(32, 4), gs) for gs in (False, True)]),
    "circulant.multiply": (circulant.multiply, lambda: [(_leaf(5, 4 * b), _leaf(3, 4, b)) for b in (8, 16)]),
    "sparse.multiply": (_sparse, lambda: [(_leaf(5, 32), _leaf(40))]),
    "wavelet.multiply": (_wavelet, lambda: [(_leaf(5, 32), _leaf(40), name) for name in ("db1", "db3")]),
    "rows.head": (_head, lambda: [(_leaf(5, 32), torch.randn(20, 32), _leaf(3, 32))]),
}


def value_and_grads(call: Callable[..., Tensor], args: Sequence) -> tuple[Tensor, list[Tensor | None]]:
    """`call(*args)` and the gradients of a fixed random projection of it to every floating tensor among `args`."""
    leaves = [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]
    torch.manual_seed(0)
    out = call(*leaves)
    wanted = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
    if not wanted:
        return out.detach(), []
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(out)
    return out.detach(), list(torch.autograd.grad(out, wanted, direction, allow_unused=True))


def compare(call: Callable[..., Tensor], args: Sequence, *, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Raise AssertionError unless the chosen path and the plain path agree on `args` in value and gradient."""
    value, grads = value_and_grads(call, args)
    with plain():
        reference, expected = value_and_grads(call, args)
    torch.testing.assert_close(value, reference, rtol=rtol, atol=atol)
    for got, want in zip(grads, expected, strict=True):
        if got is None or want is None:
            assert got is want, "one path gives no gradient where the other does"
            continue
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def run(device: str | torch.device = "cpu", *, rtol: float = 1e-3, atol: float = 1e-3) -> list[str]:
    """Check every op on `device`; raises AssertionError at the first that disagrees, else returns the names checked."""
    with torch.device(device):
        for call, cases in OPS.values():
            for args in cases():
                compare(call, args, rtol=rtol, atol=atol)
    return list(OPS)
