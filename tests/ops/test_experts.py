import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from peft import ops
from peft.ops.experts import Added, LowRankWeight, added, combine, delta, grouped_mm

E, IN, OUT, RANK = 5, 8, 4, 2


def make(transposed=False, dtype=torch.float64, k=1, p=0.0):
    W = torch.randn(E, IN, OUT, dtype=dtype) if transposed else torch.randn(E, OUT, IN, dtype=dtype)
    leaves, parts = [], []
    for i in range(k):
        A, B = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((E * RANK, IN), (OUT, E * RANK)))
        leaves += [A, B]
        parts.append(added(A.to(dtype), B.to(dtype), 0.5 + i, experts=E, transposed=transposed, dropout=p))
    return W, leaves, parts


def dense(W, parts):
    return W + sum(delta(p) for p in parts)


def check(got, want, leaves):
    assert not isinstance(got, LowRankWeight)
    near = {"rtol": 1e-4, "atol": 1e-4} if want.dtype == torch.float32 else {}
    torch.testing.assert_close(got, want, **near)
    d = torch.randn(want.shape, dtype=want.dtype)
    grads = (torch.autograd.grad(out, leaves, d, retain_graph=True) for out in (got, want))
    torch.testing.assert_close(*grads, **near)


@pytest.mark.parametrize("transposed", [False, True])
def test_layout_of_adapter_files(transposed):
    A, B = torch.randn(E * RANK, IN), torch.randn(OUT, E * RANK)
    got = delta(added(A, B, 2.0, experts=E, transposed=transposed))
    for e in range(E):
        want = 2.0 * B.reshape(OUT, RANK, E)[:, :, e] @ A.reshape(E, RANK, IN)[e]
        torch.testing.assert_close(got[e], want.T if transposed else want)
    flat = delta(added(A[:RANK], B[:, :RANK], 2.0, transposed=transposed))
    torch.testing.assert_close(flat.T if transposed else flat, 2.0 * B[:, :RANK] @ A[:RANK])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("plain", [False, True])
def test_every_product_equals_the_dense_one(transposed, k, plain):
    W, leaves, parts = make(transposed, k=k)
    D, x = dense(W, parts), torch.randn(7, IN, dtype=torch.float64, requires_grad=True)
    leaves = [x, *leaves]
    with ops.plain(plain):
        w = LowRankWeight(W, parts)
        assert w.shape == W.shape
        assert (w.dtype, w.device, w.dim(), len(w)) == (W.dtype, W.device, 3, E)
        torch.testing.assert_close(w.dense(), D)
        i, ids = torch.tensor(3), torch.tensor([0, 3, 3, 1, 2, 0, 4])
        if transposed:
            check(x @ w[i], x @ D[3], leaves)
            check(torch.matmul(x, w[3]), x @ D[3], leaves)
            check(F.linear(x, w[3].T), x @ D[3], leaves)
            check(torch.bmm(x.unsqueeze(1), w[ids]).squeeze(1), torch.bmm(x.unsqueeze(1), D[ids]).squeeze(1), leaves)
            batch = x[None].expand(E, 7, IN)
            check(torch.bmm(batch, w), torch.bmm(batch, D), leaves)
            check(torch.matmul(batch, w), torch.bmm(batch, D), leaves)
        else:
            check(F.linear(x, w[i]), F.linear(x, D[3]), leaves)
            check(F.linear(x, w[-1], torch.ones(OUT, dtype=torch.float64)), F.linear(x, D[-1]) + 1, leaves)
            check(F.linear(x.view(7, 1, IN), weight=w.select(0, 2)), F.linear(x.view(7, 1, IN), D[2]), leaves)
            check(x @ w[1].t(), x @ D[1].t(), leaves)
            check(
                torch.bmm(w[ids], x.unsqueeze(-1)).squeeze(-1), torch.bmm(D[ids], x.unsqueeze(-1)).squeeze(-1), leaves
            )
            check(x @ w.transpose(1, 2)[0], x @ D[0].T, leaves)
            check(x @ w.mT[0], x @ D[0].T, leaves)


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_product(transposed):
    W, leaves, parts = make(transposed)
    D, x = dense(W, parts), torch.randn(9, IN, dtype=torch.float64, requires_grad=True)
    offs = torch.tensor([2, 2, 5, 6, 8], dtype=torch.int32)  # an empty group; the last row belongs to none
    w = LowRankWeight(W, parts)
    M, stack = (w, D) if transposed else (w.transpose(-2, -1), D.transpose(-2, -1))

    def fallback(x, m, offs):
        if isinstance(m, LowRankWeight):
            return LowRankWeight.__torch_function__(fallback, (), (x, m), {"offs": offs})
        return grouped_mm(x, m, offs, offs.tolist())

    fallback.__name__ = "grouped_mm_fallback"
    got = fallback(x, M, offs=offs)
    want = torch.cat(
        [x[s:e] @ m for s, e, m in zip([0, 2, 2, 5, 6], offs.tolist(), stack, strict=True)] + [x.new_zeros(1, OUT)]
    )
    check(got, want, [x, *leaves])


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_transformers_experts(implementation):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    from transformers import MixtralConfig

    config = MixtralConfig(hidden_size=IN, intermediate_size=8, num_local_experts=E, num_experts_per_tok=2)
    config._experts_implementation = implementation
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64  # what the kernels take
    module = mixtral.MixtralExperts(config).to(dtype)
    for p in module.parameters():
        torch.nn.init.normal_(p.requires_grad_(False))
    factors, parts = [], {}
    for name, p in module.named_parameters():
        A = torch.randn(E * RANK, p.shape[2], dtype=dtype, requires_grad=True)
        B = torch.randn(p.shape[1], E * RANK, dtype=dtype, requires_grad=True)
        factors += [A, B]
        parts[name] = (p, [added(A, B, 0.5, experts=E)])
    x = torch.randn(10, IN, dtype=dtype, requires_grad=True)
    chosen, weights = torch.randint(0, E - 1, (10, 2)), torch.rand(10, 2, dtype=dtype)
    proxies = {n: LowRankWeight(p, d) for n, (p, d) in parts.items()}
    stacks = {n: dense(p, d) for n, (p, d) in parts.items()}
    got = torch.func.functional_call(module, proxies, (x, chosen, weights))
    want = torch.func.functional_call(module, stacks, (x, chosen, weights))
    check(got, want, [x, *factors])


def test_cost_follows_the_tokens_and_no_weight_sized_tensor_is_kept():
    W = torch.randn(64, 48, 32)
    A, B = torch.randn(64 * 2, 32, requires_grad=True), torch.randn(48, 64 * 2, requires_grad=True)
    parts = [added(A, B, experts=64)]
    x, kept = torch.randn(3, 32), []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        FlopCounterMode(display=False) as flops,
    ):
        F.linear(x, LowRankWeight(W, parts)[7]).sum().backward()
    assert flops.get_total_flops() < 4 * 2 * 3 * 48 * 32
    assert max(t.numel() for t in kept) <= 48 * 32


def test_float32_factors_over_a_half_stack():
    W, leaves, parts = make()
    A, B = (t.detach().float().requires_grad_() for t in leaves)
    x = torch.randn(7, IN).bfloat16()
    w = LowRankWeight(W.bfloat16(), [added(A, B, 0.5, experts=E)])
    got = F.linear(x, w[2])
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), x.double() @ dense(W, parts)[2].T, rtol=5e-2, atol=0.2)
    got.sum().backward()
    assert A.grad.dtype == torch.float32
    assert (A.grad.view(E, RANK, IN)[[0, 1, 3, 4]] == 0).all()
    assert (A.grad.view(E, RANK, IN)[2] != 0).any()


@pytest.mark.parametrize("transposed", [False, True])
def test_dropout_on_the_input(transposed):
    W, _, parts = make(transposed, p=0.5)
    w = LowRankWeight(W, parts)
    x = torch.randn(1, IN, dtype=torch.float64).expand(20000, IN)
    got = x @ w[0] if transposed else F.linear(x, w[0])
    D = dense(W, parts)
    want = x[0] @ D[0] if transposed else D[0] @ x[0]
    torch.testing.assert_close(got.mean(0), want, rtol=0.05, atol=0.15)
    assert not torch.allclose(got[0], got[1])


def test_any_other_use_is_dense():
    W, _, parts = make()
    w, D = LowRankWeight(W, parts), dense(W, parts)
    uses = [
        lambda t: t + 1,
        lambda t: t.sum(),
        lambda t: torch.stack([t, t]),
        lambda t: t[1:3],
        lambda t: t.float(),
        lambda t: torch.einsum("eoi->io", t),
        lambda t: t.permute(2, 0, 1),
        lambda t: t.view(E, -1),
    ]
    for fun in uses:
        torch.testing.assert_close(fun(w), fun(D))
    assert w.to(torch.float64) is w
    assert isinstance(w.to(torch.float32), LowRankWeight)
    assert "ranks=[2]" in repr(w)
    assert isinstance(w.detach(), (torch.Tensor, LowRankWeight))


def test_two_dimensional_parameter():
    W, A, B = torch.randn(4, 6), torch.randn(2, 6, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    x = torch.randn(3, 6)
    w = LowRankWeight(W, [added(A, B, 0.5)])
    check(F.linear(x, w), F.linear(x, W + 0.5 * B @ A), [A, B])
    assert Added(B, A).scale == 1.0


def test_tracers_and_the_plain_path_get_the_dense_sum():
    W, leaves, parts = make()
    assert isinstance(combine(W, parts), LowRankWeight)
    with ops.plain():
        torch.testing.assert_close(combine(W, parts), dense(W, parts))
    torch._dynamo.reset()
    A, B = leaves
    x = torch.randn(3, IN, dtype=torch.float64)

    def fun(A, B):
        return F.linear(x, combine(W, [added(A, B, 0.5, experts=E)])[1]).square().sum()

    want = torch.autograd.grad(fun(A, B), leaves)
    torch.testing.assert_close(
        torch.autograd.grad(torch.compile(fun, fullgraph=True, backend="aot_eager")(A, B), leaves), want
    )
    torch.testing.assert_close(torch.func.grad(fun, argnums=(0, 1))(A, B), want)


def test_grouped_kernel_of_the_device_with_padding():
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped product")
    x, M = torch.randn(9, 6, requires_grad=True), torch.randn(3, 6, 2, requires_grad=True)
    offs = torch.tensor([2, 2, 7], dtype=torch.int32)
    check(grouped_mm(x, M, offs), grouped_mm(x, M, offs, offs.tolist()), [x, M])
