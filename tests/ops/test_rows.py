import pytest
import torch
import torch.nn.functional as F

from peft import ops
from peft.ops import rows as R


def make(dtype=torch.float64):
    W = torch.randn(11, 6, dtype=dtype)
    return W, torch.tensor([3, 0, 10]), torch.randn(3, 6, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("padding", [None, 0, 5])
def test_embedding(padding):
    W, indices, rows = make()
    ids = torch.tensor([[0, 1, 3, 3], [10, 10, 2, 0]])
    table = R.slots(indices, 11)
    assert table.tolist() == [1, -1, -1, 0, -1, -1, -1, -1, -1, -1, 2]
    fixed = int(table[padding]) if padding is not None and table[padding] >= 0 else None
    got = R.embed(F.embedding(ids, W) * 3.0, ids, table, rows, scale=3.0, fixed=fixed)
    want = F.embedding(ids, R.replaced(W, indices, rows), padding_idx=padding) * 3.0
    torch.testing.assert_close(got, want)
    d = torch.randn(got.shape, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(got, rows, d), torch.autograd.grad(want, rows, d))
    if padding is None:
        y = F.embedding(ids, W).requires_grad_()
        assert torch.autograd.gradcheck(lambda y, rows: R.embed(y, ids, table, rows, scale=2.0), (y, rows))


def test_embedding_in_another_dtype():
    W, indices, rows = make(torch.bfloat16)
    rows, ids = rows.detach().float().requires_grad_(), torch.tensor([0, 1])
    got = R.embed(F.embedding(ids, W), ids, R.slots(indices, 11), rows)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got[0], rows[1].bfloat16())
    assert torch.equal(got[1], W[1])
    got.sum().backward()
    assert rows.grad.dtype == torch.float32


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,)])
def test_head(bias, lead):
    W, indices, rows = make()
    b = torch.randn(11, dtype=torch.float64) if bias else None
    x = torch.randn(*lead, 6, dtype=torch.float64, requires_grad=True)
    got, patched = R.head(x, W, b, indices, rows), R.patch(F.linear(x, W, b), x, b, indices, rows)
    with ops.plain():
        want = R.head(x, W, b, indices, rows)
    torch.testing.assert_close(want, F.linear(x, W.index_copy(0, indices, rows), b))
    d = torch.randn(want.shape, dtype=torch.float64)
    expected = torch.autograd.grad(want, (x, rows), d)
    for out in (got, patched):
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(torch.autograd.grad(out, (x, rows), d, retain_graph=True), expected)
    with torch.no_grad():
        torch.testing.assert_close(R.head(x, W, b, indices, rows), want)
    if lead == (2, 3):
        assert torch.autograd.gradcheck(lambda x, rows: R.head(x, W, b, indices, rows), (x, rows))
        assert torch.autograd.gradgradcheck(lambda x, rows: R.head(x, W, b, indices, rows), (x, rows))


def test_head_with_a_trained_matrix_and_in_half_precision():
    W, indices, rows = make()
    W.requires_grad_()
    x = torch.randn(4, 6, dtype=torch.float64)
    (dW,) = torch.autograd.grad(R.head(x, W, None, indices, rows).sum(), W)
    assert (dW[indices] == 0).all()
    assert (dW[1] != 0).all()
    W, rows, x = W.detach().bfloat16(), rows.detach().float().requires_grad_(), x.bfloat16().requires_grad_()
    got = R.head(x, W, None, indices, rows)
    got.sum().backward()
    assert (got.dtype, x.grad.dtype, rows.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    W, x = W.float(), x.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = R.head(x, W, None, indices, rows)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), x @ R.replaced(W, indices, rows).T, rtol=3e-2, atol=5e-2)
    out.sum().backward()
    assert x.grad.dtype == torch.float32


def test_head_keeps_nothing_of_vocabulary_width():
    W, indices, rows = make()
    x, kept = torch.randn(50, 6, dtype=torch.float64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        R.head(x, W, None, indices, rows)
    assert max(t.numel() for t in kept if t is not W) == x.numel()


def test_compile_and_transforms():
    torch._dynamo.reset()
    W, indices, rows = make(torch.float32)
    ids, table = torch.tensor([[0, 1, 3, 3]]), R.slots(indices, 11)

    def loss(rows):
        y = R.embed(F.embedding(ids, W), ids, table, rows)
        return R.head(y, W, None, indices, rows).square().sum()

    with ops.plain():
        want = torch.autograd.grad(loss(rows), rows)
    torch.testing.assert_close(torch.autograd.grad(loss(rows), rows), want)
    torch.testing.assert_close((torch.func.grad(loss)(rows),), want)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(rows), rows), want)
