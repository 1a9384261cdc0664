import pytest
import torch

from peft import ops
from peft.ops import householder as H


def product(u):
    """H_0 H_1 ... by the definition."""
    out = torch.eye(u.shape[0], dtype=u.dtype)
    for i in range(u.shape[1]):
        v = u[:, i : i + 1] / u[:, i].norm()
        out = out @ (torch.eye(u.shape[0], dtype=u.dtype) - 2 * v @ v.T)
    return out


def classical_gram_schmidt(u):
    cols = []
    for i in range(u.shape[1]):
        v = u[:, i] - sum((c @ u[:, i]) * c for c in cols) if cols else u[:, i]
        cols.append(v / v.norm())
    return torch.stack(cols, 1)


@pytest.mark.parametrize("orthonormal", [False, True])
@pytest.mark.parametrize("r", [1, 2, 5])
def test_reflections(orthonormal, r):
    u = torch.randn(9, r, dtype=torch.float64, requires_grad=True)
    want = product(classical_gram_schmidt(u) if orthonormal else u)
    torch.testing.assert_close(want @ want.T, torch.eye(9, dtype=torch.float64))
    torch.testing.assert_close(H.dense(u, orthonormal), want)
    U, P = H.wy(u, orthonormal)
    torch.testing.assert_close(torch.eye(9, dtype=torch.float64) - P @ U.T, want)
    x, W = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True), torch.randn(4, 9, dtype=torch.float64)
    got = H.reflect(x, u, orthonormal)
    torch.testing.assert_close(got, x @ want.T)
    d = torch.randn(got.shape, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(got, (x, u), d), torch.autograd.grad(x @ want.T, (x, u), d))
    for context in (ops.plain(), torch.no_grad()):
        with context:
            torch.testing.assert_close(H.reflect(x, u, orthonormal), x @ want.T)
            torch.testing.assert_close(H.reflect_weight(W, u, orthonormal), W @ want)
    torch.testing.assert_close(got @ W.T, x @ H.reflect_weight(W, u, orthonormal).T)
    assert torch.autograd.gradcheck(lambda x, u: H.reflect(x, u, orthonormal), (x, u))
    assert torch.autograd.gradgradcheck(lambda x, u: H.reflect(x, u, orthonormal), (x, u))


def test_more_orthonormal_vectors_than_features_span_everything():
    torch.testing.assert_close(H.dense(torch.randn(4, 7), orthonormal=True), -torch.eye(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_paired_vectors_cancel(dtype):
    u = torch.randn(64, 4).repeat_interleave(2, dim=1)
    x = torch.randn(10, 64).to(dtype)
    got = H.reflect(x, u)
    assert got.dtype == dtype
    if dtype is torch.float32:
        torch.testing.assert_close(got, x)
    else:  # both products of a pair are the same number, so they cancel exactly
        assert (got - x).abs().max() <= torch.finfo(dtype).eps * x.abs().max()
    assert (H.reflect_weight(x, u) - x).abs().max() <= 4 * torch.finfo(dtype).eps


def test_half_input_against_double():
    u = torch.randn(64, 6)
    x = torch.randn(10, 64).bfloat16()
    exact = x.double() @ product(u.double()).T
    assert (H.reflect(x, u) - exact).abs().max() < 6 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert H.reflect(x, u.bfloat16()).dtype == torch.bfloat16


def test_compile_and_transforms():
    torch._dynamo.reset()
    x, u = torch.randn(3, 9, requires_grad=True), torch.randn(9, 4, requires_grad=True)

    def loss(x, u):
        return H.reflect(x, u).pow(3).sum()

    want = torch.autograd.grad((x @ product(u).T).pow(3).sum(), (x, u))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x, u), (x, u)), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1))(x, u), want, rtol=1e-4, atol=1e-4)
