import pytest
import torch
import torch.nn.functional as F
from tests.versions import since
from torch.utils.flop_counter import FlopCounterMode

from peft import ops
from peft.ops.experts import LowRankWeight, added, allowed

E, IN, OUT, RANK = 5, 8, 4, 2


def make(transposed=False, dtype=torch.float64, k=1):
    W = torch.randn(E, IN, OUT, dtype=dtype) if transposed else torch.randn(E, OUT, IN, dtype=dtype)
    leaves, parts = [], []
    for i in range(k):
        A, B = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((E * RANK, IN), (OUT, E * RANK)))
        leaves += [A, B]
        parts.append(added(A.to(dtype), B.to(dtype), 0.5 + i, E, transposed))
    return W, leaves, parts


def delta(part):
    return part.L @ part.R * part.scale


def dense(W, parts):
    return W + sum(map(delta, parts))


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
    got = delta(added(A, B, 2.0, E, transposed))
    for e in range(E):
        want = 2.0 * B.reshape(OUT, RANK, E)[:, :, e] @ A.reshape(E, RANK, IN)[e]
        torch.testing.assert_close(got[e], want.T if transposed else want)


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


def grouped(x, m, offs):
    ends = offs.tolist()
    parts = [x[s:e] @ w for s, e, w in zip([0, *ends[:-1]], ends, m, strict=True)]
    return torch.cat([*parts, x.new_zeros(len(x) - ends[-1], m.shape[-1])])


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
        return grouped(x, m, offs)

    fallback.__name__ = "grouped_mm_fallback"
    got = fallback(x, M, offs=offs)
    want = grouped(x, stack, offs)
    check(got, want, [x, *leaves])


@since("transformers", "5", "fused experts")
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
        parts[name] = (p, [added(A, B, 0.5, E)])
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
    parts = [added(A, B, 1.0, 64)]
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
    w = LowRankWeight(W.bfloat16(), [added(A, B, 0.5, E)])
    got = F.linear(x, w[2])
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), x.double() @ dense(W, parts)[2].T, rtol=5e-2, atol=0.2)
    got.sum().backward()
    assert A.grad.dtype == torch.float32
    assert (A.grad.view(E, RANK, IN)[[0, 1, 3, 4]] == 0).all()
    assert (A.grad.view(E, RANK, IN)[2] != 0).any()


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
    assert w.data_ptr() == W.data_ptr()


@since("transformers", "5", "fused experts")
def test_what_may_compute_with_it():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    from transformers import MixtralConfig

    config = MixtralConfig(hidden_size=IN, intermediate_size=8, num_local_experts=E, num_experts_per_tok=2)
    module = mixtral.MixtralExperts(config)
    W = module.down_proj
    answers = {}
    for name in ("eager", "batched_mm", "grouped_mm", "sonicmoe", "deepgemm", None):
        config._experts_implementation = name
        answers[name] = allowed(module, W)
    assert [n for n, yes in answers.items() if yes] == ["eager", "batched_mm", "grouped_mm"]
    config._experts_implementation = "eager"
    assert not allowed(module, W[0]) and not allowed(module, W.to("meta"))
    with ops.plain():
        assert not allowed(module, W)
    assert not torch.func.vmap(lambda x: x * allowed(module, W))(torch.ones(2)).any()
    module.forward = lambda *args: None  # a kernel of somebody else
    assert not allowed(module, W)
    del module.forward
    module.config = None
    assert not allowed(module, W)

    class Own(mixtral.MixtralExperts):
        def forward(self, *args):
            return super().forward(*args)

    assert not allowed(Own(config), W) and allowed(mixtral.MixtralExperts(config), W)


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_kernel_with_thin_and_unaligned_factors(rank, transposed):
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped product")
    storage = torch.randn(1 + E * rank * IN)
    A, B = storage[1:].view(E * rank, IN).requires_grad_(), torch.randn(OUT, E * rank, requires_grad=True)
    W = torch.randn(E, IN, OUT) if transposed else torch.randn(E, OUT, IN)
    part = added(A, B, 0.5, E, transposed)
    x, offs = torch.randn(8, IN, requires_grad=True), torch.tensor([2, 2, 5, 6, 8], dtype=torch.int32)
    w, D = LowRankWeight(W, [part]), dense(W, [part])
    if not transposed:
        w, D = w.transpose(-2, -1), D.transpose(-2, -1)
    check(F.grouped_mm(x, w, offs=offs), grouped(x, D, offs), [x, A, B])


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: F.linear(x, w[torch.tensor([True, False, True, False, False])][1]),
        lambda x, w: F.linear(x, w[torch.tensor([[0, 1], [2, 3]])][1, 0]),
        lambda x, w: F.linear(x, w[2:4][1]),
        lambda x, w: F.linear(w[1], x),
        lambda x, w: torch.matmul(w[0], other=x.t()),
        lambda x, w: w[0] @ w[1].t(),
        lambda x, w: w[0] @ x[0],
        lambda x, w: w @ x[0],
        lambda x, w: x[0] @ w[0].t(),
        lambda x, w: w.to(torch.float64, copy=True)[0] @ x[0],
        lambda x, w: w.transpose(0, 1)[0] @ x[0],
    ],
)
def test_uses_that_are_not_products_of_experts_are_dense(use):
    """Value and gradients are those of the sum."""
    W, leaves, parts = make()
    x = torch.randn(7, IN, dtype=torch.float64, requires_grad=True)
    got, want = use(x, LowRankWeight(W, parts)), use(x, dense(W, parts))
    torch.testing.assert_close(got.dense() if isinstance(got, LowRankWeight) else got, want)
    check(torch.as_tensor(got), want, leaves)


def test_a_grouped_product_without_ends_is_dense():
    W, leaves, parts = make(transposed=True)
    x = torch.randn(E, 7, IN, dtype=torch.float64)

    def fallback(x, m, offs=None):
        if isinstance(m, LowRankWeight):
            return LowRankWeight.__torch_function__(fallback, (), (x, m), {"offs": offs})
        return x @ m

    fallback.__name__ = "grouped_mm_fallback"
    check(fallback(x, LowRankWeight(W, parts)), x @ dense(W, parts), leaves)


def test_code_below_torch_functions_does_not_take_it():
    W, _, parts = make()
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match=r"use its dense\(\) form"):
        LowRankWeight(W, parts) + 1
