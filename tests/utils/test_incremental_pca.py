# SPDX-License-Identifier: Apache-2.0
"""IncrementalPCA against the PCA of all data at once."""

import pytest
import torch

from peft.utils.incremental_pca import IncrementalPCA


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(0)
    return torch.randn(103, 8, generator=g) @ torch.randn(8, 8, generator=g) + 3


def full_pca(X):
    centred = X.double() - X.double().mean(dim=0)
    return torch.linalg.svd(centred, full_matrices=False)[1:]


def test_all_components_equal_those_of_all_data(data):
    pca = IncrementalPCA(batch_size=20).fit(data)
    S, Vh = full_pca(data)
    torch.testing.assert_close(pca.singular_values_.double(), S, atol=1e-4, rtol=1e-5)
    signs = (pca.components_.double() * Vh).sum(dim=1)
    torch.testing.assert_close(signs.abs(), torch.ones(8, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(pca.mean_, data.double().mean(dim=0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(pca.var_, data.double().var(dim=0, correction=0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pca.explained_variance_.double(), S**2 / 102, atol=1e-4, rtol=1e-5)
    assert pca.explained_variance_ratio_.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert pca.n_components == 8 and pca.n_samples_seen_.tolist() == [103] and pca.noise_variance_ == 0


def test_signs_do_not_depend_on_the_svd(data):
    pca = IncrementalPCA(n_components=4, batch_size=30).fit(data)
    largest = pca.components_.gather(1, pca.components_.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()


def test_few_components_and_transform(data):
    pca = IncrementalPCA(n_components=3, batch_size=20).fit(data)
    _, Vh = full_pca(data)
    overlap = torch.linalg.svdvals(pca.components_.double() @ Vh[:3].T)
    assert overlap.min() > 0.99
    coordinates = pca.transform(data[:5])
    assert coordinates.shape == (5, 3) and coordinates.dtype == torch.float64
    want = (data[:5].double() - pca.mean_) @ pca.components_.double().T
    torch.testing.assert_close(coordinates, want)
    assert pca.noise_variance_ > 0


def test_partial_fit_and_dtypes(data):
    pca = IncrementalPCA(n_components=2)
    assert pca.partial_fit(data[:30].bfloat16()) is pca
    assert pca.transform(data[:2]).shape == (2, 2)
    pca.partial_fit(data[30:50].double())
    assert pca.n_samples_seen_.tolist() == [50]
    from_list = IncrementalPCA(n_components=1).fit([[1.0, 2.0], [3.0, 4.0]])
    torch.testing.assert_close(from_list.components_.float(), torch.full((1, 2), 0.5**0.5))


def test_lowrank_is_seeded_and_leaves_the_generator_alone(data):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = IncrementalPCA(n_components=3, lowrank=True, lowrank_seed=3, batch_size=25).fit(data)
    assert torch.equal(torch.get_rng_state(), before) and first.lowrank_q == 6
    second = IncrementalPCA(n_components=3, lowrank=True, lowrank_seed=3, batch_size=25).fit(data)
    assert torch.equal(first.components_, second.components_)
    exact = IncrementalPCA(n_components=3, batch_size=25).fit(data)
    torch.testing.assert_close(first.singular_values_, exact.singular_values_, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        ((10, 3, 0), [(0, 3), (3, 6), (6, 9), (9, 10)]),
        ((10, 3, 2), [(0, 3), (3, 6), (6, 10)]),
        ((10, 5, 0), [(0, 5), (5, 10)]),
        ((3, 5, 0), [(0, 3)]),
        ((12, 5, 3), [(0, 5), (5, 12)]),
        ((5, 5, 5), [(0, 5)]),
    ],
)
def test_batches(arguments, want):
    assert [(s.start, s.stop) for s in IncrementalPCA.gen_batches(*arguments)] == want


def test_errors(data):
    with pytest.raises(ValueError, match="n_components must be specified"):
        IncrementalPCA(lowrank=True)
    with pytest.raises(ValueError, match="lowrank_q"):
        IncrementalPCA(n_components=4, lowrank=True, lowrank_q=2)
    with pytest.raises(ValueError, match="n_components=9 invalid for n_features=8"):
        IncrementalPCA(n_components=9).fit(data)
    with pytest.raises(ValueError, match="n_components=5 must be less or equal"):
        IncrementalPCA(n_components=5).partial_fit(data[:3])
    with pytest.raises(ValueError, match="Number of features"):
        IncrementalPCA(n_components=2).partial_fit(data).partial_fit(data[:, :4])
    with pytest.raises(RuntimeError, match="no data"):
        IncrementalPCA(n_components=2).transform(data)
