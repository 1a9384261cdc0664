import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft import ops
from peft.ops import low_rank
from peft.ops.dropout import keep_mask, rescale
from peft.ops.low_rank import Factors, accumulate, linear


def make(n_in=12, n_out=7, r=3, k=1, dtype=torch.float32, factor_dtype=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(n_out, n_in, generator=g, dtype=torch.float64).to(dtype)
    b = torch.randn(n_out, generator=g, dtype=torch.float64).to(dtype)
    fs = tuple(
        Factors(
            torch.randn(r + i, n_in, generator=g, dtype=torch.float64).to(factor_dtype or dtype).requires_grad_(),
            torch.randn(n_out, r + i, generator=g, dtype=torch.float64).to(factor_dtype or dtype).requires_grad_(),
            0.5 + i,
        )
        for i in range(k)
    )
    return W, b, fs


def formula(x, W, b, fs):
    y = F.linear(x, W, b)
    for f in fs:
        y = y + (x.to(f.A.dtype) @ f.A.T * f.scale) @ f.B.T
    return y


def grads(out, *leaves):
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad(out, leaves, direction)


def leaves_of(fs):
    return [t for f in fs for t in (f.A, f.B)]


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 5, 12), (2, 3, 4, 12), (0, 12), (2, 0, 12)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [1, 2])
def test_value_and_gradients(shape, bias, k):
    W, b, fs = make(k=k)
    b = b if bias else None
    x = torch.randn(shape, requires_grad=True)
    want, got = formula(x, W, b, fs), linear(x, W, b, fs, True)
    assert got.shape == want.shape
    assert type(got.grad_fn).__name__ == "_LowRankBackward"
    assert not got._is_view()
    torch.testing.assert_close(got, want)
    for g, w in zip(grads(got, x, *leaves_of(fs)), grads(want, x, *leaves_of(fs)), strict=True):
        torch.testing.assert_close(g, w)
    y = torch.randn(*shape[:-1], 7, requires_grad=True)
    want, got = y + formula(x, W, None, fs) - F.linear(x, W), accumulate(y, x, fs, True)
    torch.testing.assert_close(got, want)
    for g, w in zip(grads(got, y, x, *leaves_of(fs)), grads(want, y, x, *leaves_of(fs)), strict=True):
        torch.testing.assert_close(g, w)


def test_noncontiguous_input_and_expanded_gradient():
    W, b, fs = make()
    x = torch.randn(12, 3, 5).permute(1, 2, 0).requires_grad_()
    torch.testing.assert_close(linear(x, W, b, fs), formula(x, W, b, fs))
    got = torch.autograd.grad(linear(x, W, b, fs).sum(), [x, fs[0].A])
    want = torch.autograd.grad(formula(x, W, b, fs).sum(), [x, fs[0].A])
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, W, b, fs), formula(x, W, b, fs))


def test_which_gradients_exist_follows_requires_grad():
    W, b, _ = make()
    for nx, na, nb, nw in itertools.product([False, True], repeat=4):
        _, _, (f,) = make()
        f.A.requires_grad_(na), f.B.requires_grad_(nb)
        W.requires_grad_(nw), b.requires_grad_(nw)
        x = torch.randn(4, 12, requires_grad=nx)
        out = linear(x, W, b, (f,))
        assert out.requires_grad == (nx or na or nb or nw)
        wanted = [t for t in (x, f.A, f.B, W, b) if t.requires_grad]
        if wanted:
            torch.testing.assert_close(grads(out, *wanted), grads(formula(x, W, b, (f,)), *wanted))


def test_frozen_a_does_not_keep_the_input():
    W, b, (f,) = make(n_in=64)
    f.A.requires_grad_(False)
    x, kept = torch.randn(32, 64), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.untyped_storage().data_ptr()) or t, lambda t: t
    ):
        linear(x, W, b, (f,))
    assert x.untyped_storage().data_ptr() not in kept


def test_keeps_the_input_itself_and_nothing_else_of_full_width():
    W, b, fs = make(n_in=64, n_out=64, dtype=torch.bfloat16, factor_dtype=torch.float32)
    x, kept = torch.randn(4, 100, 64, dtype=torch.bfloat16, requires_grad=True), {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear(x, W, b, tuple(f._replace(dropout=0.3) for f in fs), True)
    known = {t.untyped_storage().data_ptr() for t in (x, W, b, *leaves_of(fs))}
    assert x.untyped_storage().data_ptr() in kept
    assert (
        sum(n for p, n in kept.items() if p not in known) == 400 * 3 * 2 + 2 * 64 * 3 * 2
    )  # x Aᵀ and the cast factors


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p):
    W, b, fs = make(n_in=5, n_out=4, r=2, k=2, dtype=torch.float64)
    W.requires_grad_(), b.requires_grad_()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def fun(x, W, b, A, B, A2, B2):
        torch.manual_seed(1)
        return linear(x, W, b, (Factors(A, B, 0.7, p), Factors(A2, B2, 2.0)), True)

    def add(y, x, A, B):
        torch.manual_seed(1)
        return accumulate(y, x, (Factors(A, B, 0.7, p),), True)

    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(fun, (x, W, b, *leaves_of(fs)))
        assert check(add, (y, x, fs[0].A, fs[0].B))
        assert check(lambda A, B: fun(x.detach(), W.detach(), b.detach(), A, B, A, B), (fs[0].A, fs[0].B))


@pytest.mark.parametrize("scale_shape", [(), (3,), (2, 1, 1), (2, 5, 1)])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_tensor_scale(scale_shape, p):
    W, b, (f,) = make(dtype=torch.float64)
    s = torch.rand(scale_shape, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    f = f._replace(scale=s, dropout=p)
    torch.manual_seed(5)
    got = linear(x, W, b, (f,), True)
    torch.manual_seed(5)
    with ops.plain():
        want = linear(x, W, b, (f,), True)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads(got, x, f.A, f.B, s), grads(want, x, f.A, f.B, s))
    with torch.no_grad():
        torch.manual_seed(5)
        torch.testing.assert_close(linear(x, W, b, (f,), True), want)
        torch.manual_seed(5)
        torch.testing.assert_close(accumulate(F.linear(x, W, b), x, (f,), True), want)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("k", [1, 2])
def test_accumulate_onto_the_input_itself(p, k):
    _, _, fs = make(n_in=6, n_out=6, r=2, k=k, dtype=torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def fun(x, *tensors):
        torch.manual_seed(1)
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        return accumulate(x, x, tuple(Factors(A, B, 0.7, p) for A, B in pairs), True)

    assert torch.autograd.gradcheck(fun, (x, *leaves_of(fs)))
    assert torch.autograd.gradgradcheck(fun, (x, *leaves_of(fs)))
    with ops.plain():
        want = fun(x, *leaves_of(fs))
    torch.testing.assert_close(fun(x, *leaves_of(fs)), want)
    before = x.detach().clone()
    with torch.no_grad():
        torch.testing.assert_close(fun(x, *leaves_of(fs)), want)
    assert torch.equal(x, before)


def test_factors_computed_from_other_parameters():
    W, b, (f,) = make()
    d = torch.randn(3, requires_grad=True)
    x = torch.randn(4, 12)
    got = linear(x, W, b, (Factors(f.A, f.B * d, 2.0),))
    torch.testing.assert_close(grads(got, d), grads(formula(x, W, b, (Factors(f.A, f.B * d, 2.0),)), d))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_factors_over_a_half_base(dtype):
    W, b, fs = make(n_in=64, n_out=48, r=8, dtype=dtype, factor_dtype=torch.float32)
    x = torch.randn(3, 10, 64).to(dtype).requires_grad_()
    got = linear(x, W, b, fs)
    with ops.plain():
        peer = linear(x, W, b, fs)
    exact = formula(x.double(), W.double(), b.double(), tuple(Factors(f.A.double(), f.B.double(), f.scale) for f in fs))
    assert got.dtype == peer.dtype == dtype
    scale = exact.detach().abs().max()
    assert (got - exact).abs().max() / scale < 3 * torch.finfo(dtype).eps
    gots, peers = grads(got, x, *leaves_of(fs)), grads(peer, x, *leaves_of(fs))
    for g, p, leaf in zip(gots, peers, [x, *leaves_of(fs)], strict=True):
        assert g.dtype == leaf.dtype
        assert (g - p).abs().max() / p.abs().max() < 3 * torch.finfo(dtype).eps
    y = F.linear(x, W, b)
    torch.testing.assert_close(accumulate(y, x, fs), got, rtol=2e-2, atol=2e-2 * float(scale))
    with torch.no_grad():
        torch.testing.assert_close(linear(x, W, b, fs), got, rtol=2e-2, atol=2e-2 * float(scale))


def test_plain_is_the_float32_arithmetic():
    W, b, (f,) = make(dtype=torch.bfloat16, factor_dtype=torch.float32)
    x = torch.randn(4, 12).bfloat16()
    with ops.plain():
        got = linear(x, W, b, (f,))
    assert torch.equal(got, (F.linear(x, W, b) + F.linear(F.linear(x.float(), f.A), f.B) * f.scale).bfloat16())


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
def test_autocast(factor_dtype):
    W, b, fs = make(n_in=64, n_out=48, r=8, factor_dtype=factor_dtype)
    x = torch.randn(10, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = linear(x, W, b, fs), F.linear(x, W, b)
        want = want + F.linear(F.linear(x, fs[0].A), fs[0].B) * fs[0].scale
        added = accumulate(F.linear(x, W, b), x, fs)
        with torch.no_grad():
            torch.testing.assert_close(linear(x, W, b, fs), got.detach(), rtol=2e-2, atol=0.1)
        inside = grads(linear(x, W, b, fs), x, *leaves_of(fs))
    assert got.dtype == torch.bfloat16 == added.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=0.1)
    torch.testing.assert_close(added, want, rtol=2e-2, atol=0.1)
    outside = grads(got, x, *leaves_of(fs))
    for g, i, w in zip(outside, inside, grads(want, x, *leaves_of(fs)), strict=True):
        torch.testing.assert_close(g, w, rtol=2e-2, atol=0.03 * float(w.abs().max()))
        torch.testing.assert_close(g, i)
    W.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        (dW,) = grads(linear(x, W, b, fs), W)
    assert dW.dtype == torch.float32


def test_double_backward_after_autocast():
    W, b, (f,) = make()
    x = torch.randn(4, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(x, W, b, (f,))
    (dx,) = torch.autograd.grad(out.float().square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    assert f.A.grad.dtype == torch.float32
    assert torch.isfinite(f.A.grad).all()


class TestDropout:
    def test_masks_do_not_depend_on_dtype_and_have_the_right_mean(self):
        masks = [
            keep_mask(7, 0.3, torch.empty(301, 97, dtype=d)) for d in (torch.float64, torch.float32, torch.bfloat16)
        ]
        assert torch.equal(masks[0], masks[1].double())
        assert torch.equal(masks[0], masks[2].double())
        assert abs(masks[0].mean() - 0.7) < 0.01
        assert abs(float(masks[0].mean(0).std()) - (0.21 / 301) ** 0.5) < 0.01
        assert rescale(0.25) == 4 / 3
        assert keep_mask(7, 1.0, torch.empty(5)).sum() == 0
        assert not torch.equal(keep_mask(8, 0.3, masks[1]), masks[1])

    def test_expectation_is_the_undropped_output(self):
        W, b, (f,) = make(dtype=torch.float64)
        x = torch.randn(1, 12, dtype=torch.float64).expand(20000, 12)
        got = linear(x, W, b, (f._replace(dropout=0.2),), True).mean(0)
        torch.testing.assert_close(got, formula(x[0], W, b, (f,)), rtol=0.02, atol=0.15)

    @pytest.mark.parametrize("grad", [True, False])
    def test_equals_the_plain_path(self, grad):
        W, b, fs = make(k=2)
        fs = tuple(f._replace(dropout=p) for f, p in zip(fs, (0.5, 0.1), strict=True))
        x = torch.randn(4, 12, requires_grad=True)
        torch.manual_seed(0)
        with torch.set_grad_enabled(grad):
            got = linear(x, W, b, fs, True)
        torch.manual_seed(0)
        with ops.plain():
            want = linear(x, W, b, fs, True)
        torch.testing.assert_close(got, want)
        if grad:
            torch.testing.assert_close(grads(got, x, *leaves_of(fs)), grads(want, x, *leaves_of(fs)))

    def test_off_in_evaluation(self):
        W, b, (f,) = make()
        x = torch.randn(4, 12)
        torch.testing.assert_close(linear(x, W, b, (f._replace(dropout=0.9),), False), formula(x, W, b, (f,)))

    def test_drawing_is_reproducible_and_advances(self):
        W, b, (f,) = make()
        x, f = torch.randn(4, 12), f._replace(dropout=0.5)
        torch.manual_seed(0)
        first, second = linear(x, W, b, (f,), True), linear(x, W, b, (f,), True)
        torch.manual_seed(0)
        assert torch.equal(first, linear(x, W, b, (f,), True))
        assert not torch.equal(first, second)

    def test_everything_dropped(self):
        W, b, (f,) = make()
        x = torch.randn(4, 12)
        torch.testing.assert_close(linear(x, W, b, (f._replace(dropout=1.0),), True), F.linear(x, W, b))

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing_replays_the_masks(self, reentrant):
        W, b, (f,) = make(n_out=12)
        f = f._replace(dropout=0.5)
        x = torch.randn(4, 12, requires_grad=True)

        def block(x):
            return linear(torch.tanh(linear(x, W, b, (f,), True)), W, b, (f,), True)

        torch.manual_seed(0)
        want = grads(block(x), x, f.A, f.B)
        torch.manual_seed(0)
        out = checkpoint(block, x, use_reentrant=reentrant)
        x.grad = f.A.grad = f.B.grad = None
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).float())
        torch.testing.assert_close((x.grad, f.A.grad, f.B.grad), want)


def test_output_may_be_modified_in_place():
    W, b, (f,) = make()
    x = torch.randn(2, 4, 12, requires_grad=True)
    got = torch.relu_(linear(x, W, b, (f,)))
    want = torch.relu(formula(x, W, b, (f,)))
    torch.testing.assert_close(grads(got, x, f.A, f.B), grads(want, x, f.A, f.B))


def test_accumulate_never_writes_into_the_base_output():
    W, b, (f,) = make()
    x, y = torch.randn(4, 12), torch.randn(4, 7)
    before = y.clone()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            accumulate(y, x, (f,))
            assert torch.equal(y, before)
    assert torch.equal(accumulate(y, x, ()), y)


def test_accumulate_of_mixed_dtypes_keeps_the_output_dtype():
    W, b, (f,) = make()
    x, y = torch.randn(4, 12, requires_grad=True), torch.randn(4, 7).bfloat16()
    out = accumulate(y, x, (f,))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_graph_break(grad, training):
    torch._dynamo.reset()
    W, b, fs = make(k=2)
    fs = tuple(f._replace(dropout=0.0 if grad else 0.2) for f in fs)
    x = torch.randn(2, 4, 12, requires_grad=grad)

    def fun(x, A, B, A2, B2):
        return accumulate(
            linear(x, W, b, (Factors(A, B, 0.5, fs[0].dropout),), training), x, (Factors(A2, B2),), training
        )

    with torch.set_grad_enabled(grad):
        compiled = torch.compile(fun, fullgraph=True, backend="aot_eager")
        got, want = compiled(x, *leaves_of(fs)), fun(x, *leaves_of(fs))
    assert got.shape == want.shape
    if fs[0].dropout and training:
        return
    torch.testing.assert_close(got, want)
    if grad:
        torch.testing.assert_close(grads(got, x, *leaves_of(fs)), grads(want, x, *leaves_of(fs)))


def test_compiled_scale_tensor_swaps_without_recompiling():
    torch._dynamo.reset()
    W, b, (f,) = make()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fun = torch.compile(lambda x, s: linear(x, W, b, (Factors(f.A, f.B, s),)), fullgraph=True, backend=counter)
    x = torch.randn(4, 12)
    for value in (1.0, 2.0, 0.5):
        torch.testing.assert_close(fun(x, torch.tensor(value)), formula(x, W, b, (f._replace(scale=value),)))
    assert counter.frame_count == 1


def test_function_transforms():
    W, b, (f,) = make()
    x = torch.randn(4, 12)

    def loss(fun):
        return lambda A, B, x: fun(x, W, b, (Factors(A, B, 0.5),)).square().sum()

    got, want = (torch.func.grad(loss(fun), argnums=(0, 1, 2))(f.A, f.B, x) for fun in (linear, formula))
    torch.testing.assert_close(got, want)
    As, Bs = torch.randn(5, 3, 12), torch.randn(5, 7, 3)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got = torch.func.vmap(lambda A, B: linear(x, W, b, (Factors(A, B),)))(As, Bs)
        torch.testing.assert_close(
            got, torch.stack([formula(x, W, b, (Factors(A, B),)) for A, B in zip(As, Bs, strict=True)])
        )
    per_sample = torch.func.vmap(torch.func.grad(loss(linear)), (None, None, 0))(f.A, f.B, x)
    torch.testing.assert_close(per_sample.sum(0), torch.func.grad(loss(formula))(f.A, f.B, x))
    _, tangent = torch.func.jvp(
        lambda A: linear(x, W, b, (Factors(A, f.B.detach()),)), (f.A.detach(),), (f.A.detach(),)
    )
    torch.testing.assert_close(tangent, (x @ f.A.T) @ f.B.T)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(linear(dual, W, b, (f,))).tangent
    torch.testing.assert_close(tangent, formula(torch.ones_like(x), W, None, (f,)))


def test_tensor_subclasses_and_meta():
    class Tagged(torch.Tensor):
        pass

    W, b, (f,) = make()
    x = torch.randn(4, 12)
    got = linear(x.as_subclass(Tagged), W, b, (f._replace(dropout=0.0),), True)
    assert isinstance(got, Tagged)
    torch.testing.assert_close(got.as_subclass(torch.Tensor), formula(x, W, b, (f,)))
    A = f.A.detach().as_subclass(Tagged).requires_grad_()
    got = linear(x, W, b, (f._replace(A=A, dropout=0.0),), True)
    torch.testing.assert_close(got.as_subclass(torch.Tensor), formula(x, W, b, (f,)))
    assert isinstance(got, Tagged)
    torch.testing.assert_close(grads(got.as_subclass(torch.Tensor), A), grads(formula(x, W, b, (f,)), f.A))
    Wm, bm, fm = W.to("meta"), b.to("meta"), Factors(f.A.to("meta"), f.B.to("meta"), 1.0, 0.5)
    assert linear(x.to("meta"), Wm, bm, (fm,), True).shape == (4, 7)


@pytest.mark.parametrize("tokens", [1, 3000])
def test_inference_by_size(tokens):
    W, b, fs = make(n_in=64, n_out=48, k=2)
    x, y = torch.randn(2, tokens, 64), torch.randn(2, tokens, 48)
    before = y.clone()
    with torch.no_grad():
        torch.testing.assert_close(linear(x, W, b, fs), formula(x, W, b, fs), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(accumulate(y, x, fs), y + formula(x, W * 0, None, fs), rtol=1e-4, atol=1e-4)
        half = tuple(f._replace(dropout=0.5) for f in fs)
        torch.manual_seed(0)
        got = linear(x, W, b, half, True)
        torch.manual_seed(0)
        with ops.plain():
            torch.testing.assert_close(got, linear(x, W, b, half, True), rtol=1e-4, atol=1e-4)
    assert torch.equal(y, before)


def test_inference_mode_and_wrong_dtype():
    W, b, (f,) = make()
    x = torch.randn(1, 1, 12)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, W, b, (f,)), formula(x, W, b, (f,)))
    with pytest.raises(RuntimeError):
        linear(x, W.bfloat16(), b.bfloat16(), (f,))  # as nn.Linear


def test_a_changed_input_is_noticed():
    W, b, (f,) = make()
    x = torch.randn(4, 12)
    out = linear(x, W, b, (f,))
    x.add_(1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        out.sum().backward()


def test_parameters_get_their_gradient_without_a_copy():
    W, b, _ = make()
    A, B = nn.Parameter(torch.randn(3, 12)), nn.Parameter(torch.randn(7, 3))
    linear(torch.randn(4, 12), W, b, (Factors(A, B),)).sum().backward()
    assert A.grad.shape == A.shape
    assert B.grad.is_contiguous()


def test_plain_switch(monkeypatch):
    called = []
    monkeypatch.setattr(low_rank._LowRank, "apply", lambda *a, **k: called.append(1) or torch.zeros(4, 7))
    W, b, (f,) = make()
    x = torch.randn(4, 12)
    linear(x, W, b, (f,))
    with ops.plain():
        linear(x, W, b, (f,))
        with ops.plain(False):
            linear(x, W, b, (f,))
    ops.use_plain()
    linear(x, W, b, (f,))
    ops.use_plain(False)
    linear(x, W, b, (f,))
    assert len(called) == 2
