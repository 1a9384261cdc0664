# SPDX-License-Identifier: Apache-2.0
"""Weighted combination. tests/data/combine.json: factors and the published results for them (seed 5, density 0.5)."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from peft.core import combine
from peft.core.combine import combine_factors, prune, resolve_combination
from peft.utils import merge_utils

DATA = json.loads((Path(__file__).parents[1] / "data" / "combine.json").read_text())


def factors_of(layer):
    return [
        (torch.tensor(A).reshape(shape_a), torch.tensor(B).reshape(shape_b), scaling)
        for shape_a, A, shape_b, B, scaling in DATA["factors"][layer]
    ]


def matrix(A, B):
    return B.flatten(1) @ A.flatten(1)


@pytest.mark.parametrize("case", DATA["cases"], ids=lambda c: f"{c[0]}-{c[1]}-{c[2][0]}-{c[4]}")
def test_published_combination(case):
    layer, kind, weights, sign, clamp, want_a, want = case
    factors = factors_of(layer)
    deltas = None
    if kind.endswith("_svd"):  # masks are drawn in the orientation in which the layer stores its weight
        deltas = [s * (B.flatten(1) @ A.flatten(1)) for A, B, s in factors]
        if layer == "emb":
            deltas = [d.T for d in deltas]
        if layer == "conv":
            deltas = [d.reshape(3, 2, 2, 2) for d in deltas]
    torch.manual_seed(5)
    A, B = combine_factors(
        kind, factors, weights, density=0.5, majority_sign_method=sign, clamp=clamp, deltas=deltas,
        transposed=layer == "emb",
    )  # fmt: skip
    assert A.shape == factors[0][0].shape and B.shape == factors[0][1].shape
    if want_a is None:
        torch.testing.assert_close(matrix(A, B).flatten(), torch.tensor(want), atol=3e-6, rtol=1e-5)
    else:
        torch.testing.assert_close(A.flatten(), torch.tensor(want_a), atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(B.flatten(), torch.tensor(want), atol=2e-6, rtol=1e-5)


# ---- operators: values of the published functions for these three tensors and weights

T = torch.arange(-4.0, 5.0).reshape(3, 3)
TENSORS = [T, -T / 2, T.flip(0) + 0.5]
WEIGHTS = torch.tensor([1.0, 2.0, -0.5])


@pytest.mark.parametrize(
    ("function", "extra", "want"),
    [
        ("magnitude_prune", (0.4,), [0.0, -1.75, -2.25, 0.0, 0.0, 0.0, 1.75, 0.0, 0.0]),
        ("task_arithmetic", (), [-1.25, -1.75, -2.25, 0.25, -0.25, -0.75, 1.75, 1.25, 0.75]),
        ("ties", (0.6,), [1.375, 0.625, -2.25, 0.0, 0.0, 0.0, -0.125, -0.875, 4.0]),
        ("ties", (0.6, "frequency"), [1.375, 0.625, -2.25, 0.0, 0.0, 0.0, -0.125, -0.875, 4.0]),
        (
            "dare_ties",
            (0.6,),
            [-6.666667, -2.916667, 3.333333, 1.666667, 0.0, 1.666667, -0.208333, 2.083333, 6.666667],
        ),
        ("dare_linear", (0.6,), [-6.666667, -7.916667, 3.333333, 2.083333, 0.0, 0.0, 2.916667, 2.083333, 0.0]),
    ],
)
def test_operators(function, extra, want):
    torch.manual_seed(7)
    got = getattr(merge_utils, function)(TENSORS, WEIGHTS, *extra)
    torch.testing.assert_close(got.flatten(), torch.tensor(want), atol=1e-6, rtol=1e-6)


def test_majority_sign_mask():
    votes = torch.tensor([[3.0, -1.0, 0.0], [-1.0, -1.0, 0.0], [-1.0, 5.0, 1.0]])
    total = merge_utils.calculate_majority_sign_mask(votes)
    assert total.tolist() == [[True, False, False], [False, False, False], [False, True, True]]
    frequency = merge_utils.calculate_majority_sign_mask(votes, "frequency")
    assert frequency.tolist() == [[False, True, False], [True, True, False], [True, False, True]]
    with pytest.raises(RuntimeError, match='Unimplemented mask method "x"'):
        merge_utils.calculate_majority_sign_mask(votes, "x")
    merged = merge_utils.disjoint_merge(votes, frequency)
    assert merged.tolist() == [-1.0, -1.0, 1.0]


def test_prune_limits_and_errors():
    with pytest.warns(UserWarning, match="greater than or equal to 1, no pruning"):
        assert prune(T, 1.0, "magnitude") is T
    with pytest.raises(ValueError, match="Density should be >= 0, got -0.1"):
        prune(T, -0.1, "magnitude")
    with pytest.raises(ValueError, match="Unknown method foo"):
        prune(T, 0.5, "foo")
    with pytest.raises(TypeError, match="density"):
        prune(T, None, "magnitude")
    assert prune(T, 0.4, "magnitude").flatten().tolist() == [-4, -3, 0, 0, 0, 0, 0, 0, 4]
    assert int((prune(torch.ones(3, 3), 0.5, "magnitude") != 0).sum()) == 4  # exactly int(0.5 * 9), ties included
    assert merge_utils.reshape_weight_task_tensors(torch.zeros(2, 3, 4), torch.ones(2)).shape == (2, 1, 1)


# ---- exact combination of low-rank factors


def random_factors(out, inp, ranks, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [
        (torch.randn(r, inp, generator=g).to(dtype), torch.randn(out, r, generator=g).to(dtype), 0.5 + i)
        for i, r in enumerate(ranks)
    ]


WEIGHTS3 = [0.7, -1.3, 0.4]


def exact(factors):
    return sum(w * s * (B.double() @ A.double()) for w, (A, B, s) in zip(WEIGHTS3, factors, strict=True))


@pytest.mark.parametrize("kind", ["cat", "linear_exact"])
def test_exact_types_represent_the_sum(kind):
    factors = random_factors(20, 30, [2, 3, 4])
    A, B = combine_factors(kind, factors, WEIGHTS3)
    assert A.shape == (9, 30) and B.shape == (20, 9)
    torch.testing.assert_close(B.double() @ A.double(), exact(factors), atol=2e-5, rtol=1e-5)
    if kind == "linear_exact":  # balanced: both factors have the square roots of the singular values as norms
        torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), atol=1e-4, rtol=1e-4)


def test_svd_through_qr_equals_dense_svd():
    factors = random_factors(40, 30, [4, 4, 4])
    A, B = combine_factors("svd", factors, WEIGHTS3, rank=5)
    dense_a, dense_b = combine.svd_factors(exact(factors).float(), 5)
    torch.testing.assert_close(B @ A, dense_b @ dense_a, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(B.norm(dim=0), torch.linalg.svdvals(exact(factors))[:5].float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(A @ A.T, torch.eye(5), atol=1e-5, rtol=0)


def test_qr_path_never_forms_the_dense_matrix(monkeypatch):
    monkeypatch.setattr(combine, "svd_factors", None)
    A, B = combine_factors("svd", random_factors(40, 30, [4, 4, 4]), WEIGHTS3)
    assert A.shape == (4, 30) and B.shape == (40, 4)


def test_rank_above_what_the_layer_has_is_padded_with_zeros():
    factors = random_factors(3, 5, [2, 2, 2])
    for kind, rank in (("svd", 8), ("svd", 6), ("linear_exact", None)):
        A, B = combine_factors(kind, factors, WEIGHTS3, rank=rank)
        n = rank or 6
        assert A.shape == (n, 5) and B.shape == (3, n)
        torch.testing.assert_close(B @ A, exact(factors).float(), atol=1e-5, rtol=1e-4)


def test_low_precision_sources_are_combined_in_float32():
    factors = random_factors(8, 8, [2, 2, 2], torch.bfloat16)
    A, B = combine_factors("svd", factors, WEIGHTS3, rank=6)
    assert A.dtype == B.dtype == torch.bfloat16
    error = (B.double() @ A.double() - exact(factors)).abs().max() / exact(factors).abs().max()
    assert error < 0.02


def test_combine_errors():
    factors = random_factors(4, 4, [2, 2, 2])
    with pytest.raises(ValueError, match="2 weights for 3 adapters"):
        combine_factors("linear", factors, [1.0, 2.0])
    with pytest.raises(ValueError, match="no source adapter"):
        combine_factors("svd", [], [])
    with pytest.raises(TypeError, match="density"):
        combine_factors("ties", factors, WEIGHTS3)
    with pytest.raises(ValueError, match="svd_clamp"):
        combine_factors("svd", factors, WEIGHTS3, clamp=2.0)


def test_resolve_combination():
    assert resolve_combination("svd", [2, 4]) == ("svd", 4)
    assert resolve_combination("ties_svd", [2, 4], 3) == ("ties_svd", 3)
    assert resolve_combination("cat", [2, 4]) == ("cat", 6)
    assert resolve_combination("linear_exact", [2, 4]) == ("linear_exact", 6)
    assert resolve_combination("ties", [4, 4]) == ("ties", 4)
    assert resolve_combination("cat", [3]) == ("linear", 3)
    with pytest.raises(ValueError, match="same r value"):
        resolve_combination("linear", [2, 4])
    with pytest.raises(ValueError, match="Did you mean 'dare_ties'"):
        resolve_combination("dare_tie", [2, 2])
    with pytest.raises(ValueError, match="empty"):
        resolve_combination("linear", [])
    with pytest.warns(UserWarning, match="svd_rank has no effect"):
        resolve_combination("cat", [2, 4], 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_combination("svd", [2, 4], 3)


def test_quantile_equals_torch():
    values = torch.randn(501, generator=torch.Generator().manual_seed(1))
    for q in (0.0, 0.1, 0.9, 1.0):
        assert combine._quantile(values, q) == pytest.approx(torch.quantile(values, q).item(), abs=1e-6)
