import pytest
import torch

from peft import ops
from peft.ops import cayley as C


def skew_by_loops(v, n):
    Q = torch.zeros(*v.shape[:-1], n, n, dtype=v.dtype)
    k = 0
    for i in range(n):
        for j in range(i + 1, n):
            Q[..., i, j], Q[..., j, i] = v[..., k], -v[..., k]
            k += 1
    return Q


def rotation(blocks, B, dtype=torch.float64, size=0.3):
    return C.cayley(skew_by_loops(size * torch.randn(blocks, B * (B - 1) // 2, dtype=dtype), B))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_skew(lead):
    v = torch.randn(*lead, 10, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(C.skew(v, 5), skew_by_loops(v.detach(), 5))
    rows, cols = torch.triu_indices(5, 5, 1)
    assert torch.equal(C.skew(v, 5, rows, cols), C.skew(v, 5))
    assert torch.autograd.gradcheck(lambda v: C.skew(v, 5), (v,))
    assert C.skew(v.detach().bfloat16(), 5).dtype == torch.bfloat16


def test_exact_map_is_orthogonal_and_has_the_documented_sign():
    Q = skew_by_loops(torch.randn(4, 15, dtype=torch.float64, requires_grad=True), 6)
    R, eye = C.cayley(Q), torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(R, (eye - Q) @ torch.linalg.inv(eye + Q))
    torch.testing.assert_close(R @ R.mT, eye.expand(4, 6, 6))
    small = 0.05 * Q
    torch.testing.assert_close(C.cayley_series(small, 12), C.cayley(-small), rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(
        lambda v: C.cayley(C.skew(v, 4)), (torch.randn(2, 6, dtype=torch.float64, requires_grad=True),)
    )


@pytest.mark.parametrize("terms", range(1, 12))
def test_series(terms):
    Q = skew_by_loops(torch.randn(2, 10, dtype=torch.float64), 5)
    eye = torch.eye(5, dtype=torch.float64).expand(2, 5, 5)
    want = eye if terms == 1 else eye + 2 * Q
    if terms in (3, 4):
        want = eye + 2 * Q + 2 * Q @ Q + Q @ Q @ Q
    if terms > 4:
        want = (
            eye
            + 2 * sum(torch.linalg.matrix_power(Q, k) for k in range(1, terms - 1))
            + torch.linalg.matrix_power(Q, terms - 1)
        )
    torch.testing.assert_close(C.cayley_series(Q, terms), want)
    with ops.plain():
        torch.testing.assert_close(C.cayley_series(Q, terms), want)
    v = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: C.cayley_series(C.skew(v, 3), terms), (v,))


def test_five_terms_take_two_products():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        C.cayley_series(torch.randn(3, 8, 8), 5)
    assert counter.get_total_flops() == 2 * (2 * 3 * 8**3)
    with pytest.raises(ValueError, match="at least 1"):
        C.cayley_series(torch.randn(3, 8, 8), 0)


def test_projection():
    v = torch.randn(3, 10, dtype=torch.float64)
    v[0] *= 1e-3
    v[1] = 0
    Q = C.skew(C.project(v, 0.5), 5)
    torch.testing.assert_close(Q[:2], C.skew(v, 5)[:2])
    torch.testing.assert_close(torch.linalg.matrix_norm(Q)[2], torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(C.bound(C.skew(v, 5), 0.5), Q)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (0,)])
def test_rotate(share, lead):
    B, blocks = 4, 3
    R = rotation(1 if share else blocks, B).requires_grad_()
    dense = torch.block_diag(*[R[0 if share else k] for k in range(blocks)])
    torch.testing.assert_close(C.block_diagonal(R, 12), dense)
    x = torch.randn(*lead, 12, dtype=torch.float64, requires_grad=True)
    got, want = C.rotate(x, R), x @ dense
    with ops.plain():
        torch.testing.assert_close(C.rotate(x, R), want)
    torch.testing.assert_close(got, want)
    d = torch.randn(got.shape, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(got, (x, R), d), torch.autograd.grad(want, (x, R), d))
    with torch.no_grad():
        assert torch.equal(C.rotate(x, R), got)
    torch.relu_(C.rotate(x, R)).sum().backward()  # no view of a custom function's output
    if lead:
        assert torch.autograd.gradcheck(C.rotate, (x, R))
        assert torch.autograd.gradgradcheck(C.rotate, (x, R))
    W = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(x @ dense @ W.T, x @ C.rotate_weight(W, R).T)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_input_keeps_small_rotations(share, dtype):
    R = C.cayley(skew_by_loops(1e-3 * torch.randn(1 if share else 3, 28), 8)).requires_grad_()
    x = torch.randn(50, 24).to(dtype).requires_grad_()
    exact = x.double() @ C.block_diagonal(R.double(), 24)
    got = C.rotate(x, R)
    assert got.dtype == dtype
    assert (got - exact).abs().max() <= 1.1 * torch.finfo(dtype).eps * exact.detach().abs().max()
    dx, dR = torch.autograd.grad(got, (x, R), torch.ones_like(got))
    ex, eR = torch.autograd.grad(exact, (x, R), torch.ones_like(exact))
    assert dx.dtype == dtype
    assert dR.dtype == torch.float32
    torch.testing.assert_close(dx, ex, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(dR, eR, rtol=2e-2, atol=0.2)
    identity = torch.eye(8).expand(1 if share else 3, 8, 8)
    assert torch.equal(C.rotate(x, identity), x)


def test_transforms_and_compile():
    torch._dynamo.reset()
    R, x = rotation(3, 4, torch.float32).requires_grad_(), torch.randn(2, 5, 12, requires_grad=True)

    def loss(x, R):
        return C.rotate(x, R).square().sum() + C.butterfly(x, R.unsqueeze(0)).sum()

    want = torch.autograd.grad(loss(x, R), (x, R))
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1))(x, R), want)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x, R), (x, R)), want)

    def whole(v, x):
        return C.rotate(x, C.cayley_series(C.skew(v, 4), 5)) + C.rotate(x, C.cayley(C.skew(C.project(v, 0.1), 4)))

    v = torch.randn(3, 6)
    torch.testing.assert_close(torch.compile(whole, fullgraph=True, backend="aot_eager")(v, x), whole(v, x))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_butterfly_equals_the_dense_product(count):
    B, n = 4, 16
    O = torch.stack([rotation(n // B, B) for _ in range(count)]).requires_grad_()  # noqa: E741
    half, R = B // 2, torch.eye(n, dtype=torch.float64)
    for i in range(count):
        p = torch.arange(n).view(-1, 2**i, 2, half).transpose(1, 2).flatten()
        P = torch.eye(n, dtype=torch.float64)[p] if i else torch.eye(n, dtype=torch.float64)
        assert all(P[k, p[k]] == 1 for k in range(n))
        R = P @ torch.block_diag(*O[i]) @ P.T @ R
    x = torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(C.butterfly(x, O), x @ R)
    torch.testing.assert_close(C.butterfly(x, O, transpose=True), x @ R.T)
    torch.testing.assert_close(C.butterfly(C.butterfly(x, O), O, transpose=True), x)
    assert torch.autograd.gradcheck(C.butterfly, (x[:1, :2].detach().requires_grad_(), O))


def test_five_terms_have_the_second_derivatives_of_the_plain_series():
    Q = (0.3 * torch.randn(2, 3, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda q: C.cayley_series(q, 5), (Q,))
