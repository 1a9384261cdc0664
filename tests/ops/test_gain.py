"""Trained gains and normalised directions: fused against plain, second derivatives, outputs modified in place."""

import pytest
import torch
from torch import nn

from peft import ops
from peft.ops import cayley, directions, gain
from peft.ops.checks import compare


def make(n_in, n_out, dtype=torch.float64, blocks=False):
    g = torch.Generator().manual_seed(0)
    base = nn.Linear(n_in, n_out, bias=False, dtype=dtype).requires_grad_(False)
    base.weight.copy_(torch.randn(n_out, n_in, generator=g))
    x = torch.randn(2, 3, n_in, generator=g).to(dtype).requires_grad_()
    s = (1 + 0.3 * torch.randn(n_out, generator=g)).to(dtype).requires_grad_()
    v = (0.2 * torch.randn(n_in // 4, 6, generator=g)).to(dtype).requires_grad_() if blocks else None
    return base, x, s, v


def call(base, x, s, v):
    R = None if v is None else cayley.cayley(cayley.skew(v, 4))
    y = gain.linear(base, x, s, R)
    assert (y is None) == ops.is_plain()
    return base(x if R is None else cayley.rotate(x, R)) * s if y is None else y


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("shape", [(8, 12), (12, 6)], ids=["keeps the output", "computes the product again"])
def test_gain(shape, blocks):
    args = make(*shape, blocks=blocks)
    compare(call, args, rtol=1e-9, atol=1e-9)
    leaves = [t for t in args[1:] if t is not None]

    def function(*t):
        return call(args[0], *t, *(None,) * (3 - len(t)))

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("shape", [(8, 12), (12, 6)], ids=["keeps the output", "computes the product again"])
def test_turned_pairs(shape):
    base, x, _, _ = make(*shape)
    g = torch.Generator().manual_seed(1)
    theta, alpha = (torch.randn(shape[1] // 2, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    half = shape[1] // 6

    def call(x, theta, alpha):
        y = gain.turned(base, x, theta, alpha, half)
        assert (y is None) == ops.is_plain()
        return gain._turned(x, base.weight, theta, alpha, half) if y is None else y

    compare(call, (x, theta, alpha), rtol=1e-9, atol=1e-9)
    first, second = (base(x).unflatten(-1, (-1, 2, half))[..., i, :] for i in (0, 1))
    c, s = (alpha * f(theta) for f in (torch.cos, torch.sin))
    c, s = c.view(-1, half), s.view(-1, half)
    want = torch.stack((c * first - s * second, c * second + s * first), -2).flatten(-3)
    torch.testing.assert_close(call(x, theta, alpha), want)
    assert torch.autograd.gradcheck(call, (x, theta, alpha))
    assert torch.autograd.gradgradcheck(call, (x, theta, alpha))
    got = torch.autograd.grad(call(x, theta, alpha).relu_().sum(), (x, theta, alpha))
    torch.testing.assert_close(got, torch.autograd.grad(want.relu().sum(), (x, theta, alpha)))


def test_gain_of_zero_and_outputs_modified_in_place():
    base, x, s, _ = make(8, 12, torch.float32)
    with torch.no_grad():
        s[3] = 0.0
    want = torch.autograd.grad((base(x) * s).relu().sum(), (x, s))
    for op in (torch.relu, torch.relu_):
        got = torch.autograd.grad(op(gain.linear(base, x, s)).sum(), (x, s))
        for a, b, where in ((got[0], want[0], slice(None)), (got[1], want[1], [i for i in range(12) if i != 3])):
            torch.testing.assert_close(a[..., where], b[..., where])
    exact = torch.autograd.grad((base(x) * s).sum(), s)[0]  # without the kink of relu at 0
    torch.testing.assert_close(torch.autograd.grad(gain.linear(base, x, s).sum(), s)[0], exact)


def test_gain_serves_only_plain_frozen_layers():
    base, x, s, _ = make(8, 12, torch.float32)
    with torch.no_grad():
        assert gain.linear(base, x, s) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert gain.linear(base, x, s) is None
    assert gain.linear(nn.Linear(8, 12).requires_grad_(False), x, s) is None
    assert gain.linear(nn.Linear(8, 12, bias=False), x, s) is None
    assert gain.linear(base, x.half(), s) is None


def test_directions():
    g = torch.Generator().manual_seed(0)
    A, B, w = (torch.randn(n, m, generator=g, dtype=torch.float64) for n, m in ((3, 8), (6, 3), (1, 8)))
    leaves = A.requires_grad_(), B.requires_grad_(), torch.tensor([0.7], dtype=torch.float64, requires_grad=True)

    def product(A, B, strength):
        left, right = directions.scaled(A, B, strength, w[0])
        return right @ left

    compare(product, leaves, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(product, leaves)
    assert torch.autograd.gradgradcheck(product, leaves)
    short = (A.detach() * torch.tensor([[1.0], [1e-9], [1.0]])).requires_grad_(), leaves[1], leaves[2]
    compare(product, short, rtol=1e-9, atol=1e-6)
    compare(product, (A, torch.zeros_like(B).requires_grad_(), torch.zeros(1).double().requires_grad_()))
