# SPDX-License-Identifier: Apache-2.0
"""Principal components of data that arrives in batches.

Incremental Learning for Robust Visual Tracking, Ross et al. 2008: the SVD of [S V^T; X - mean(X); c (mean - mean(X))]
with c = sqrt(n_old n / (n_old + n)) equals that of all data seen, up to the components dropped before. Running mean and
variance: Youngs and Cramer 1971, in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(eq=False, repr=False)
class IncrementalPCA:
    """PCA fitted batch by batch; memory is that of one batch plus the components.

    `n_components`: None takes as many as the first batch allows. `lowrank` uses `torch.svd_lowrank` with `lowrank_q`
    (default twice the components) and `lowrank_niter`, seeded by `lowrank_seed` without touching the global generator.
    """

    n_components: int | None = None
    copy: bool | None = True
    batch_size: int | None = None
    svd_driver: str | None = None
    lowrank: bool = False
    lowrank_q: int | None = None
    lowrank_niter: int = 4
    lowrank_seed: int | None = None

    def __post_init__(self) -> None:
        self.mean_: torch.Tensor | None = None
        self.var_: torch.Tensor | None = None
        self.n_features_: int | None = None
        if self.lowrank:
            if self.n_components is None:
                raise ValueError("n_components must be specified when using lowrank mode with lowrank_q=None.")
            if self.lowrank_q is None:
                self.lowrank_q = self.n_components * 2
            elif self.lowrank_q < self.n_components:
                raise ValueError("lowrank_q must be greater than or equal to n_components.")

    def _svd(self, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not self.lowrank:
            return torch.linalg.svd(X, full_matrices=False, driver=self.svd_driver)
        assert self.lowrank_q is not None
        with torch.random.fork_rng(enabled=self.lowrank_seed is not None):
            if self.lowrank_seed is not None:
                torch.manual_seed(self.lowrank_seed)
            U, S, V = torch.svd_lowrank(X, q=self.lowrank_q, niter=self.lowrank_niter)
        return U, S, V.mH

    def _validate_data(self, X: torch.Tensor) -> torch.Tensor:
        if not isinstance(X, torch.Tensor):
            X = torch.tensor(X, dtype=torch.float32)
        elif self.copy:
            X = X.clone()
        n_samples, n_features = X.shape
        if self.n_components is not None and self.n_components > n_features:
            raise ValueError(
                f"n_components={self.n_components} invalid for n_features={n_features}, "
                "need more rows than columns for IncrementalPCA processing."
            )
        if self.n_components is not None and self.n_components > n_samples:
            raise ValueError(
                f"n_components={self.n_components} must be less or equal to the batch number of samples {n_samples}."
            )
        return X if X.dtype in (torch.float32, torch.float64) else X.to(torch.float32)

    @staticmethod
    def gen_batches(n: int, batch_size: int, min_batch_size: int = 0) -> Iterator[slice]:
        """Slices of `batch_size` over n; a rest shorter than `min_batch_size` is joined to the batch before it."""
        start = 0
        for _ in range(n // batch_size):
            end = start + batch_size
            if end + min_batch_size > n:
                continue  # what follows would be too short
            yield slice(start, end)
            start = end
        if start < n:
            yield slice(start, n)

    def fit(self, X: torch.Tensor, check_input: bool = True) -> "IncrementalPCA":
        """Fit all rows of X [n, features] in batches of `batch_size` (default 5 times the features)."""
        if check_input:
            X = self._validate_data(X)
        n_samples, n_features = X.shape
        if self.batch_size is None:
            self.batch_size = 5 * n_features
        for batch in self.gen_batches(n_samples, self.batch_size, min_batch_size=self.n_components or 0):
            self.partial_fit(X[batch], check_input=False)
        return self

    def partial_fit(self, X: torch.Tensor, check_input: bool = True) -> "IncrementalPCA":
        """Update the fit with one batch [n, features]."""
        first = not hasattr(self, "components_")
        if check_input:
            X = self._validate_data(X)
        n_samples, n_features = X.shape
        if first:
            self.mean_ = self.var_ = None
            self.n_samples_seen_ = torch.tensor([0], device=X.device)
            self.n_features_ = n_features
            if not self.n_components:
                self.n_components = min(n_samples, n_features)
        if n_features != self.n_features_:
            raise ValueError(
                "Number of features of the new batch does not match the number of features of the first batch."
            )
        assert self.n_components is not None
        mean, var, seen = self._updated_moments(X)
        if self.mean_ is None:
            X = X - mean.to(X.dtype)
        else:
            batch_mean = X.mean(dim=0)
            shift = torch.sqrt(self.n_samples_seen_.double() / seen * n_samples) * (self.mean_ - batch_mean)
            X = torch.vstack((self.singular_values_.view(-1, 1) * self.components_, X - batch_mean, shift))
        U, S, Vh = self._svd(X)
        U, Vh = self._fix_signs(U, Vh)
        variance = S**2 / (seen - 1)
        ratio = S**2 / torch.sum(var * seen)
        k = self.n_components
        self.n_samples_seen_, self.mean_, self.var_ = seen, mean, var
        self.components_, self.singular_values_ = Vh[:k], S[:k]
        self.explained_variance_, self.explained_variance_ratio_ = variance[:k], ratio[:k]
        self.noise_variance_ = variance[k:].mean() if len(variance) > k else torch.tensor(0.0, device=X.device)
        return self

    def _updated_moments(self, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(mean, variance, count) of everything seen including X, float64."""
        count, seen = X.shape[0], self.n_samples_seen_
        total = seen + count
        if self.mean_ is None or self.var_ is None:
            mean = X.mean(dim=0, dtype=torch.float64)
            return mean, (X - mean).square().mean(dim=0), total
        old_sum = self.mean_ * seen
        new_sum = X.sum(dim=0, dtype=torch.float64)
        new_unnormalised = X.var(dim=0, correction=0) * count
        old_unnormalised = self.var_ * seen
        ratio = seen.double() / count
        unnormalised = old_unnormalised + new_unnormalised + ratio / total * (old_sum / ratio - new_sum).square()
        return (old_sum + new_sum) / total, unnormalised / total, total

    @staticmethod
    def _fix_signs(U: torch.Tensor, Vh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Signs that do not depend on the SVD routine: the largest entry of each right vector is positive."""
        largest = Vh.abs().argmax(dim=1, keepdim=True)
        signs = Vh.gather(1, largest).sign()
        return U * signs.T[:, : U.shape[1]], Vh * signs

    def transform(self, X: torch.Tensor) -> torch.Tensor:
        """Coordinates [n, components] of the rows of X."""
        if self.mean_ is None:
            raise RuntimeError("This PCA has seen no data yet: call fit or partial_fit first.")
        X = X - self.mean_
        return torch.mm(X.double(), self.components_.T.double()).to(X.dtype)
