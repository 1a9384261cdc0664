"""Weights made of few parameters: merged wide ranks, random hidden states, triplets, recomputed forms, wavelet sums.

Each op is compared with its plain path in value and gradient, and differentiated numerically, twice.
"""

import pytest
import torch
import torch.nn.functional as F

import peft
from peft.ops import dense, dispatch, low_rank, sampled, wavelet
from peft.ops.checks import compare


def draw(*shape, seed=0, grad=True):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return t.requires_grad_(grad)


def check(op, *leaves):
    compare(op, leaves, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(op, leaves)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen A", "trained A"])
def test_merged(trained):
    A, W = draw(5, 8, grad=trained), draw(6, 8, seed=1, grad=False)
    x, b, B = draw(2, 9, 8, seed=2), draw(6, seed=3), draw(6, 5, seed=4)
    if trained:
        check(lambda x, b, A, B: low_rank.merged(x, W, b, A, B), x, b, A, B)
    else:
        check(lambda x, b, B: low_rank.merged(x, W, b, A, B), x, b, B)


def test_wide_ranks_over_a_frozen_matrix_are_merged():
    """By `linear` itself: fewer products than the thin form, and the sum is kept only while it is smaller than x."""
    A, W, d = draw(16, 32, grad=False), draw(24, 32, seed=1, grad=False), draw(16, seed=2)
    B = draw(24, 16, seed=3)
    for rows, merged in ((100, True), (4, False)):
        x = draw(rows, 32, seed=4)
        factors = (low_rank.Factors(A, B, d),)
        y = low_rank.linear(x, W, None, factors)
        assert ("Merged" in type(y.grad_fn).__name__) == merged
        assert torch.allclose(y, x @ W.T + (x @ A.T * d) @ B.T)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            low_rank.linear(x, W, None, factors)
        assert any(t.shape == W.shape and not torch.equal(t, W) for t in kept) == merged
    with torch.autocast("cpu", torch.bfloat16):
        assert "Merged" not in type(low_rank.linear(draw(100, 32).float(), W.float(), None, factors).grad_fn).__name__


def test_sampled():
    noise = draw(2, 3, 4, seed=3, grad=False)
    check(lambda z, d, B: sampled.multiply(z, d, noise, B), draw(2, 3, 8), draw(8, seed=1), draw(5, 4, seed=2))


def test_triplets():
    check(dense.triplets, draw(6, 3), draw(3, seed=1), draw(3, 5, seed=2))


def test_recomputed_keeps_its_inputs_only():
    a, b = draw(3, 4), draw(3, 4, seed=1)
    check(lambda a, b: dispatch.recomputed(lambda a, b: (a * b).sin() * a, a, b), a, b)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = dispatch.recomputed(lambda a, b: (a * b).sin(), a, b)
    assert set(kept) == {a.data_ptr(), b.data_ptr()}
    grads = torch.autograd.grad(out.sum(), (a, b))
    assert not any(g.requires_grad for g in grads)


@pytest.mark.parametrize("name", ["db1", "db3"])
def test_wavelet_matrix(name):
    e = torch.arange(20)
    where = wavelet.basis(e % 6, e * 3 % 8, (6, 8), name)
    check(lambda c: wavelet.matrix(c, where, 0.5), draw(20))


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("LoHaConfig", {"r": 2}),
        ("FrodConfig", {"sparse_rate": 0.1, "progressbar": False}),
        ("VeraConfig", {"r": 8}),
        ("RandLoraConfig", {"r": 4}),
        ("OSFConfig", {}),
    ],
)
def test_layers_agree_with_the_plain_path(config, options):
    """Layers so wide and thin that they take every special form, against the merged weight and its gradients."""
    for shape in ((16, 64), (64, 16), (32, 32)):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(*shape))
        model = peft.get_peft_model(model, getattr(peft, config)(target_modules=["0"], **options))
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.1 * torch.randn(p.shape)
        x = torch.randn(200, shape[0], requires_grad=True)
        leaves = (x, *(p for p in model.parameters() if p.requires_grad))
        g = torch.randn(200, shape[1])
        got = torch.autograd.grad(model(x), leaves, g)
        layer = model.base_model.model[0]
        weight = layer.get_base_layer().weight + layer.delta_weight("default")
        want = torch.autograd.grad(F.linear(x, weight, layer.get_base_layer().bias), leaves, g)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("transform", [True, False])
def test_waveft_of_a_few_rows_transforms_the_rows(transform):
    torch.manual_seed(0)
    config = peft.WaveFTConfig(target_modules=["0"], n_frequency=20, init_weights=False, use_idwt=transform)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 24)), config)
    c, x = model.base_model.model[0].waveft_spectrum["default"], torch.randn(64, 32, requires_grad=True)
    many = model(x)
    few = torch.cat([model(rows) for rows in x.split(2)])
    torch.testing.assert_close(few, many)
    want = torch.autograd.grad(many.square().sum(), (x, c))
    torch.testing.assert_close(torch.autograd.grad(few.square().sum(), (x, c)), want, rtol=1e-4, atol=1e-4)
