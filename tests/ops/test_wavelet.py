import pytest
import torch

from peft import ops
from peft.ops import sparse
from peft.ops import wavelet as V
from peft.ops.wavelet_filters import FILTERS


def rebuild(n, name):
    """The documented matrix, column by column."""
    g = FILTERS[name]
    L, P = len(g), V.padded(n, name)
    high = [(-1) ** i * g[L - 1 - i] for i in range(L)]
    M = torch.zeros(P - 2 + L, P, dtype=torch.float64)
    for j in range(P // 2):
        M[2 * j : 2 * j + L, j] = torch.tensor(g, dtype=torch.float64)
        M[2 * j : 2 * j + L, P // 2 + j] = torch.tensor(high, dtype=torch.float64)
    drop = (2 * L - 3) // 2
    M = M[drop : M.shape[0] - drop]
    start = (M.shape[0] - n) // 2
    return M[start : start + n]


def documented(c, rows, cols, shape, name, scale):
    P, Q = V.padded(shape[0], name), V.padded(shape[1], name)
    S = torch.zeros(P, Q, dtype=torch.float64)
    S[rows + (P - shape[0]) // 2, cols + (Q - shape[1]) // 2] = c
    h, w = P // 2, Q // 2
    swapped = torch.cat([torch.cat([S[:h, :w], S[h:, :w]], 1), torch.cat([S[:h, w:], S[h:, w:]], 1)], 0)
    return scale * rebuild(shape[0], name) @ swapped @ rebuild(shape[1], name).T


def make(shape, name, n=9):
    where = torch.randperm(shape[0] * shape[1])[:n]
    rows, cols = where // shape[1], where % shape[1]
    return torch.randn(n, dtype=torch.float64, requires_grad=True), rows, cols, V.basis(rows, cols, shape, name)


@pytest.mark.parametrize("name", list(FILTERS))
@pytest.mark.parametrize("shape", [(6, 8), (7, 9), (8, 5)])
def test_against_the_documented_matrices(name, shape):
    c, rows, cols, where = make(shape, name)
    want = documented(c, rows, cols, shape, name, 3.0)
    torch.testing.assert_close(V.matrix(c, where, 3.0), want)
    x = torch.randn(4, 3, shape[1], dtype=torch.float64, requires_grad=True)
    for lead in (x, x[0], x[0, 0]):
        torch.testing.assert_close(V.multiply(lead, c, where, 3.0), lead @ want.T)
    got, d = V.multiply(x, c, where, 3.0), torch.randn(4, 3, shape[0], dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(got, (x, c), d), torch.autograd.grad(x @ want.T, (x, c), d))
    a = torch.randn(5, V.padded(shape[0], name), dtype=torch.float64)
    torch.testing.assert_close(V.synthesise(a, shape[0], name), a @ rebuild(shape[0], name).T)
    x = torch.randn(5, shape[0], dtype=torch.float64)
    torch.testing.assert_close(V.analyse(x, name), x @ rebuild(shape[0], name))


@pytest.mark.parametrize("name", ["db1", "db3"])
def test_gradcheck_plain_and_empty(name):
    c, _, _, where = make((4, 5), name, 3)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, c: V.multiply(x, c, where, 0.7), (x, c))
    assert torch.autograd.gradgradcheck(lambda x, c: V.multiply(x, c, where, 0.7), (x, c))
    with ops.plain():
        want = V.multiply(x, c, where, 0.7)
    torch.testing.assert_close(V.multiply(x, c, where, 0.7), want)
    with torch.no_grad():
        torch.testing.assert_close(V.multiply(x, c, where, 0.7), want)
        assert V.multiply(x[:0], c, where).shape == (0, 4)
    assert V.multiply(x[:0], c, where).shape == (0, 4)
    with pytest.raises(ValueError, match="db99"):
        V.basis(where.rows, where.cols, (4, 5), "db99")


def test_half_input_compile_and_transforms():
    torch._dynamo.reset()
    c, _, _, where = make((12, 16), "db2", 40)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    exact = V.multiply(x, c, where, 2.0).detach()
    c32 = c.detach().float().requires_grad_()
    half = V.multiply(x.bfloat16().requires_grad_(), c32, where, 2.0)
    assert half.dtype == torch.bfloat16
    assert (half - exact).abs().max() < 4e-2 * exact.abs().max()
    half.sum().backward()
    assert c32.grad.dtype == torch.float32

    def loss(x, c):
        return V.multiply(x, c, where, 2.0).square().sum()

    want = torch.autograd.grad(loss(x, c), c)
    torch.testing.assert_close((torch.func.grad(loss, argnums=1)(x, c),), want)
    torch.testing.assert_close(
        torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, c), c), want
    )


class TestSparse:
    @pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,)])
    @pytest.mark.parametrize("chunk", [1, 1 << 24])
    def test_product(self, lead, chunk, monkeypatch):
        monkeypatch.setattr(sparse, "_CHUNK", chunk)
        rows, cols = torch.tensor([0, 3, 3, 1, 3]), torch.tensor([5, 2, 0, 1, 2])  # (3, 2) twice
        v = torch.randn(5, dtype=torch.float64, requires_grad=True)
        x = torch.randn(*lead, 6, dtype=torch.float64, requires_grad=True)
        S = torch.zeros(4, 6, dtype=torch.float64)
        for r, c, value in zip(rows, cols, v.detach(), strict=True):
            S[r, c] += value
        torch.testing.assert_close(sparse.matrix(v, rows, cols, (4, 6)), S)
        got = sparse.multiply(x, v, rows, cols, 4, 0.5)
        torch.testing.assert_close(got, 0.5 * x @ S.T)
        with ops.plain():
            want = sparse.multiply(x, v, rows, cols, 4, 0.5)
        torch.testing.assert_close(got, want)
        d = torch.randn(got.shape, dtype=torch.float64)
        torch.testing.assert_close(torch.autograd.grad(got, (x, v), d), torch.autograd.grad(want, (x, v), d))
        with torch.no_grad():
            torch.testing.assert_close(sparse.multiply(x, v, rows, cols, 4, 0.5), want)
        if lead == (4,):
            assert torch.autograd.gradcheck(lambda x, v: sparse.multiply(x, v, rows, cols, 4, 0.5), (x, v))
            assert torch.autograd.gradgradcheck(lambda x, v: sparse.multiply(x, v, rows, cols, 4, 0.5), (x, v))

    def test_keeps_input_and_values_only(self):
        rows, cols = torch.randint(0, 40, (300,)), torch.randint(0, 50, (300,))
        v, x, kept = torch.randn(300, requires_grad=True), torch.randn(70, 50).bfloat16(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
            y = sparse.multiply(x, v, rows, cols, 40)
        assert set(kept) == {t.data_ptr() for t in (x, v, rows, cols)}
        exact = x.double() @ sparse.matrix(v.double(), rows, cols, (40, 50)).T
        assert (y - exact).abs().max() < 3e-2 * exact.abs().max()
        y.sum().backward()
        assert v.grad.dtype == torch.float32
