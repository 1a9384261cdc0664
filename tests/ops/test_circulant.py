import pytest
import torch

from peft import ops
from peft.ops import circulant


def by_loops(w):
    M, N, b = w.shape
    out = torch.zeros(M * b, N * b, dtype=w.dtype)
    for m in range(M):
        for n in range(N):
            for i in range(b):
                for j in range(b):
                    out[m * b + i, n * b + j] = w[m, n, (j - i) % b]
    return out


@pytest.mark.parametrize("b", [1, 4, 5, 16, 17])
@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (0,)])
def test_product(b, lead):
    w = torch.randn(3, 2, b, dtype=torch.float64, requires_grad=True)
    x = torch.randn(*lead, 2 * b, dtype=torch.float64, requires_grad=True)
    D = by_loops(w.detach())
    torch.testing.assert_close(circulant.matrix(w), D)
    got = circulant.multiply(x, w, 0.3)
    torch.testing.assert_close(got, 0.3 * x @ D.T)
    with ops.plain():
        want = circulant.multiply(x, w, 0.3)
    torch.testing.assert_close(got, want)
    d = torch.randn(got.shape, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(got, (x, w), d, retain_graph=True), torch.autograd.grad(want, (x, w), d)
    )
    with torch.no_grad():
        torch.testing.assert_close(circulant.multiply(x, w, 0.3), got)
    torch.relu_(got).sum().backward()


@pytest.mark.parametrize("b", [3, 16])
def test_gradcheck(b):
    w = torch.randn(2, 1, b, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, b, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: circulant.multiply(x, w, 0.7), (x, w))
    assert torch.autograd.gradgradcheck(lambda x, w: circulant.multiply(x, w, 0.7), (x, w))


@pytest.mark.parametrize("b", [8, 32])
def test_half_input_and_what_is_kept(b):
    w = torch.randn(2, 3, b, requires_grad=True)
    x = torch.randn(50, 3 * b).bfloat16().requires_grad_()
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        got = circulant.multiply(x, w)
    assert set(kept) == {x.untyped_storage().data_ptr(), w.untyped_storage().data_ptr()}
    assert got.dtype == torch.bfloat16
    exact = x.double() @ by_loops(w.double()).T
    assert (got - exact).abs().max() < 2e-2 * exact.detach().abs().max()
    dx, dw = torch.autograd.grad(got, (x, w), torch.ones_like(got))
    ex, ew = torch.autograd.grad(
        circulant.multiply(x.double(), w.double()), (x, w), torch.ones(50, 2 * b, dtype=torch.float64)
    )
    assert (dx.dtype, dw.dtype) == (torch.bfloat16, torch.float32)
    assert (dx - ex).abs().max() < 2e-2 * ex.abs().max()
    assert (dw - ew).abs().max() < 2e-2 * ew.abs().max()


@pytest.mark.parametrize("b", [4, 16])
def test_compile_and_transforms(b):
    torch._dynamo.reset()
    w, x = torch.randn(2, 3, b, requires_grad=True), torch.randn(2, 5, 3 * b, requires_grad=True)

    def loss(x, w):
        return circulant.multiply(x, w, 0.5).square().sum()

    want = torch.autograd.grad((0.5 * x @ circulant.matrix(w).T).square().sum(), (x, w))
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1))(x, w), want, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x, w), (x, w)), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("b", [1, 2, 3, 4, 5, 8])
def test_published_gradient_of_the_input_is_the_same_on_every_path(b, plain):
    """It reads the output's gradient backwards in each block; the value and the gradient of w are the true ones."""
    w = torch.randn(3, 2, b, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 2 * b, dtype=torch.float64, requires_grad=True)
    d, D = torch.randn(5, 3 * b, dtype=torch.float64), by_loops(w.detach())
    with ops.plain(plain):
        got = circulant.multiply(x, w, 0.3, published=True)
    true = circulant.multiply(x, w, 0.3)
    torch.testing.assert_close(got, true)
    dx, dw = torch.autograd.grad(got, (x, w), d)
    mirrored = d.view(5, 3, b)[..., [-i % b for i in range(b)]].reshape(5, -1)
    torch.testing.assert_close(dx, 0.3 * mirrored @ D)
    torch.testing.assert_close(dw, torch.autograd.grad(true, w, d)[0])
