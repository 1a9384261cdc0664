import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from peft import ops
from peft.ops import dora
from peft.ops.dora import dora_accumulate, dora_linear, dora_norm, row_norms_sq
from peft.ops.low_rank import Factors


def make(n_in=12, n_out=7, r=3, dtype=torch.float64, factor_dtype=None, scale=0.7, p=0.0):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    W, b = draw(n_out, n_in).to(dtype), draw(n_out).to(dtype)
    A, B = (
        draw(r, n_in).to(factor_dtype or dtype).requires_grad_(),
        draw(n_out, r).to(factor_dtype or dtype).requires_grad_(),
    )
    m = (dora_norm(W, A, B, scale) * (1 + 0.3 * draw(n_out))).to(factor_dtype or dtype).requires_grad_()
    return W, b, Factors(A, B, scale, p), m


def dense_norm(W, f):
    return torch.linalg.norm(W + f.scale * f.B @ f.A, dim=1).detach()


def formula(x, W, b, f, m):
    g = m / dense_norm(W, f)
    y = x @ (g[:, None] * (W + f.scale * f.B @ f.A)).T
    return y if b is None else y + b


def grads(out, *leaves):
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad(out, leaves, direction, retain_graph=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_equals_the_dense_norm(dtype, monkeypatch):
    monkeypatch.setattr(dora, "_CHUNK", 24)  # several chunks
    W, _, f, _ = make(dtype=dtype, factor_dtype=torch.float32 if dtype is torch.bfloat16 else dtype)
    f = Factors(f.A, f.B, 0.7)
    want = dense_norm(W.double(), Factors(f.A.double(), f.B.double(), 0.7))
    tolerance = 1e-5 if dtype is not torch.float64 else 1e-12
    for sq in (None, row_norms_sq(W)):
        got = dora_norm(W, f.A, f.B, 0.7, sq)
        assert not got.requires_grad
        assert got.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(dora_norm(W, f.A, f.B, torch.tensor(0.7), sq), got)
    with ops.plain():
        torch.testing.assert_close(dora_norm(W, f.A, f.B, 0.7).double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dora_norm(W.t().contiguous().t(), f.A, f.B, 0.7), dora_norm(W, f.A, f.B, 0.7))


def test_norm_of_a_cancelled_row_is_zero_not_nan():
    A = torch.randn(3, 12)
    B = torch.randn(7, 3)
    got = dora_norm(-(B @ A), A, B, 1.0)
    assert (got >= 0).all()
    assert (got < 1e-2).all()


def test_norm_never_forms_the_product():
    from torch.utils._python_dispatch import TorchDispatchMode

    W, _, f, _ = make(n_in=64, n_out=48)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    sq = row_norms_sq(W)
    with Watch():
        dora_norm(W, f.A, f.B, 0.7, sq)
    assert max(n for n in sizes if n != f.A.numel()) <= 48 * 3


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 5, 12), (0, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients(shape, bias):
    W, b, f, m = make()
    b = b.requires_grad_() if bias else None
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    norm = dora_norm(W, f.A, f.B, f.scale)
    got, want = dora_linear(x, W, b, f, m, norm, True), formula(x, W, b, f, m)
    torch.testing.assert_close(got, want)
    leaves = [x, f.A, f.B, m] + ([b] if bias else [])
    torch.testing.assert_close(grads(got, *leaves), grads(want, *leaves))
    with ops.plain():
        plain = dora_linear(x, W, b, f, m, norm, True)
    torch.testing.assert_close(plain, want)
    torch.testing.assert_close(grads(plain, *leaves), grads(want, *leaves))
    with torch.no_grad():
        torch.testing.assert_close(dora_linear(x, W, b, f, m, norm), want)
    y = F.linear(x, W, b)
    added = dora_accumulate(y, x, b, f, m, norm)
    torch.testing.assert_close(added, want)
    torch.testing.assert_close(grads(added, *leaves[:4]), grads(want, *leaves[:4]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(bias, p):
    W, b, f, m = make(n_in=5, n_out=4, r=2)
    b = b.requires_grad_() if bias else None
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    norm = dora_norm(W, f.A, f.B, f.scale)

    def fun(x, A, B, m, b=None):
        torch.manual_seed(1)
        return dora_linear(x, W, b, Factors(A, B, 0.7, p), m, norm, True)

    inputs = (x, f.A, f.B, m, b) if bias else (x, f.A, f.B, m)
    assert torch.autograd.gradcheck(fun, inputs)
    assert torch.autograd.gradgradcheck(fun, inputs)


def test_dropout_equals_the_published_composition():
    W, b, f, m = make(p=0.4)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    norm, f0 = dora_norm(W, f.A, f.B, f.scale), f._replace(dropout=0.0)
    outs = []
    for plain in (False, True):
        torch.manual_seed(0)
        with ops.plain(plain):
            outs.append(dora_linear(x, W, b, f, m, norm, True))
    torch.manual_seed(0)
    outs.append(dora_accumulate(F.linear(x, W, b), x, b, f, m, norm, True, product=lambda h: F.linear(h, W)))
    for out in outs[1:]:
        torch.testing.assert_close(outs[0], out)
        torch.testing.assert_close(grads(outs[0], x, f.A, f.B, m), grads(out, x, f.A, f.B, m))
    torch.testing.assert_close(dora_linear(x, W, b, f, m, norm, False), formula(x, W, b, f0, m))
    many = x[:1].detach().expand(20000, 12)
    mean = dora_linear(many, W, b, f, m, norm, True).mean(0)
    torch.testing.assert_close(mean, formula(x[0], W, b, f0, m), rtol=0.05, atol=0.2)
    with pytest.raises(RuntimeError, match="product"):
        dora_accumulate(F.linear(x, W, b), x, b, f, m, norm, True)


@pytest.mark.parametrize("bias", [True, False])
def test_output_modified_in_place(bias):
    W, b, f, m = make()
    b = b if bias else None
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    norm = dora_norm(W, f.A, f.B, f.scale)
    want = grads(torch.relu(formula(x, W, b, f, m)) + 1, x, f.A, f.B, m)
    for inplace in (lambda y: torch.relu_(y) + 1, lambda y: F.relu(y, inplace=True) + 1):
        torch.testing.assert_close(grads(inplace(dora_linear(x, W, b, f, m, norm)), x, f.A, f.B, m), want)

    def block(x):
        return torch.relu_(dora_linear(x, W, b, f, m, norm)) + 1

    for reentrant in (True, False):
        leaves = (x, f.A, f.B, m)
        for t in leaves:
            t.grad = None
        out = checkpoint(block, x, use_reentrant=reentrant)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
        torch.testing.assert_close(tuple(t.grad for t in leaves), want)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        out = block(x)
    torch.testing.assert_close(grads(out, x, f.A, f.B, m), want)


def test_nothing_of_full_width_but_input_and_output_is_kept():
    W, b, f, m = make(n_in=32, n_out=48, dtype=torch.bfloat16, factor_dtype=torch.float32)
    x, kept = torch.randn(300, 32, dtype=torch.bfloat16, requires_grad=True), {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = dora_linear(x, W, None, f, m, dora_norm(W, f.A, f.B, f.scale))
    known = {t.untyped_storage().data_ptr() for t in (x, y, W, f.A, f.B, m)}
    assert y.untyped_storage().data_ptr() in kept
    assert max(t.numel() for p, t in kept.items() if p not in known) == 300 * 3


def test_no_reference_cycle_keeps_the_output_alive():
    import gc
    import weakref

    W, _, f, m = make()
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    gc.disable()
    try:
        y = dora_linear(x, W, None, f, m, dora_norm(W, f.A, f.B, f.scale))
        node = weakref.ref(y.grad_fn)
        del y
        assert node() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_magnitudes_and_zero_rows(dtype):
    W, _, f, m = make(dtype=dtype)
    with torch.no_grad():
        m[0] = 0
        W[1] = 0
        f.B[1] = 0
        m[1] = 0
    x = torch.randn(5, 12).to(dtype).requires_grad_()
    norm = dora_norm(W, f.A, f.B, f.scale)
    got = dora_linear(x, W, None, f, m, norm)
    assert got[:, :2].abs().max() < 1e-9
    (dm,) = grads(got, m)
    u = x @ (W + f.scale * f.B @ f.A).T
    with torch.no_grad():
        d = torch.randn(got.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        want = (d * u.double()).sum(0) / norm.clamp(min=1e-30).double()
    want[1] = 0
    torch.testing.assert_close(
        dm.double(),
        want,
        rtol=3e-2 if dtype is torch.bfloat16 else 1e-4,
        atol=3e-2 if dtype is torch.bfloat16 else 1e-4,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_half_base_with_float32_factors(dtype, bias, p):
    W, b, f, m = make(n_in=64, n_out=48, dtype=dtype, factor_dtype=torch.float32, p=p)
    b = b if bias else None
    x = torch.randn(3, 10, 64).to(dtype).requires_grad_()
    norm = dora_norm(W, f.A, f.B, f.scale)
    torch.manual_seed(0)
    got = dora_linear(x, W, b, f, m, norm, True)
    assert got.dtype == dtype
    if dtype is torch.float16:
        W, b, x2 = W.float(), None if b is None else b.float(), x.float()
    else:
        W, b, x2 = W.float(), None if b is None else b.float(), x.float()
    torch.manual_seed(0)
    with ops.plain():
        exact = dora_linear(x2, W, b, f, m, norm, True)
    eps = torch.finfo(dtype).eps
    assert (got - exact).abs().max() < 4 * eps * exact.detach().abs().max()
    for g, e, leaf in zip(grads(got, x, f.A, f.B, m), grads(exact, x, f.A, f.B, m), (x, f.A, f.B, m), strict=True):
        assert g.dtype == leaf.dtype
        assert (g - e).abs().max() < 6 * eps * e.abs().max()


def test_autocast():
    W, b, f, m = make(n_in=64, n_out=48, dtype=torch.float32)
    x = torch.randn(10, 64, requires_grad=True)
    norm = dora_norm(W, f.A, f.B, f.scale)
    want = formula(x, W, b, f, m)
    for bias in (b, None):
        with torch.autocast("cpu", torch.bfloat16):
            got = dora_linear(x, W, bias, f, m, norm)
        want = formula(x, W, bias, f, m)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=0.2)
        for g, w in zip(grads(got, x, f.A, f.B, m), grads(want, x, f.A, f.B, m), strict=True):
            assert g.dtype == torch.float32
            assert (g - w).abs().max() < 0.03 * w.abs().max()
        (dx,) = torch.autograd.grad(got.float().square().sum(), x, create_graph=True)
        assert torch.isfinite(torch.autograd.grad(dx.square().sum(), m)[0]).all()


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_compile_and_transforms(p):
    torch._dynamo.reset()
    W, b, f, m = make(dtype=torch.float32, p=p)
    x = torch.randn(2, 4, 12, requires_grad=True)

    def fun(x, A, B, m):
        norm = dora_norm(W, A, B, 0.7, row_norms_sq(W))
        return dora_linear(x, W, b, Factors(A, B, 0.7, p), m, norm, True)

    compiled = torch.compile(fun, fullgraph=True, backend="aot_eager")
    got = compiled(x, f.A, f.B, m)
    assert got.shape == (2, 4, 7)
    if p == 0.0:
        want = formula(x, W, b, f, m)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(grads(got, x, f.A, f.B, m), grads(want, x, f.A, f.B, m))
        func = torch.func.grad(lambda m: fun(x, f.A, f.B, m).square().sum())(m)
        torch.testing.assert_close(func, torch.autograd.grad(want.square().sum(), m)[0])
