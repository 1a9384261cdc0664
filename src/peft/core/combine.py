# SPDX-License-Identifier: Apache-2.0
"""Weighted combination of adapters: task arithmetic, pruning, TIES, DARE, concatenation, truncated SVD.

Task arithmetic, arXiv 2212.04089: sum_i w_i T_i. TIES, 2306.01708: prune by magnitude, elect a sign per entry, average
the entries that agree. DARE, 2311.03099: drop entries at random and rescale. LoRA factors: delta_i = s_i B_i A_i.

Everything here works on tensors; which layers and adapters they come from is the tuner's business. Random masks are
drawn from the default generator, one Bernoulli draw per tensor in list order: seeded results are the published ones.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from ..config import nearest

SignMethod = Literal["total", "frequency"]
Factors = tuple[torch.Tensor, torch.Tensor, float]  # A [r, in, *kernel], B [out, r, *1], scaling


# ---- operators on lists of tensors of one shape
def reshape_weight_task_tensors(task_tensors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Append dimensions of size 1 to `weights` [n] until it broadcasts over `task_tensors` [n, ...]."""
    return weights.view(weights.shape + (1,) * (task_tensors.dim() - weights.dim()))


def magnitude_based_pruning(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the `int(density * numel)` entries of largest magnitude, zero the others."""
    kept = torch.topk(tensor.abs().reshape(-1), k=int(density * tensor.numel())).indices
    mask = torch.zeros_like(tensor).reshape(-1)
    mask[kept] = 1
    return tensor * mask.reshape(tensor.shape)


def random_pruning(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
    """Keep each entry with probability `density`; with `rescale`, divide by it so that the expectation is kept."""
    pruned = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return pruned / density if rescale else pruned


def prune(
    tensor: torch.Tensor, density: float, method: Literal["magnitude", "random"], rescale: bool = False
) -> torch.Tensor:
    """Zero a part of `tensor`; a density of 1 or more keeps everything."""
    if not isinstance(density, (int, float)):
        raise TypeError(f"This combination needs a density, a number from 0 to 1 (the kept share); got {density!r}.")
    if density >= 1:
        warnings.warn(
            f"The density {density} is greater than or equal to 1, no pruning will be performed.", stacklevel=3
        )
        return tensor
    if density < 0:
        raise ValueError(f"Density should be >= 0, got {density}")
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "random":
        return random_pruning(tensor, density, rescale=rescale)
    raise ValueError(f"Unknown method {method}; use 'magnitude' or 'random'.")


def calculate_majority_sign_mask(tensor: torch.Tensor, method: SignMethod = "total") -> torch.Tensor:
    """True where an entry of `tensor` [n, ...] has the elected sign: that of the sum over n, or of the sum of signs."""
    sign = tensor.sign()
    if method == "total":
        votes = tensor.sum(dim=0)
    elif method == "frequency":
        votes = sign.sum(dim=0)
    else:
        raise RuntimeError(f'Unimplemented mask method "{method}"; use "total" or "frequency".')
    return sign == torch.where(votes >= 0, 1, -1)


def disjoint_merge(task_tensors: torch.Tensor, majority_sign_mask: torch.Tensor) -> torch.Tensor:
    """Mean over n of the entries selected by the mask; 0 where there are none."""
    kept = (task_tensors * majority_sign_mask).sum(dim=0)
    return kept / majority_sign_mask.sum(dim=0).clamp(min=1)


def _weighted(tensors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return tensors * reshape_weight_task_tensors(tensors, weights)


def task_arithmetic(task_tensors: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """sum_i w_i T_i."""
    return _weighted(torch.stack(task_tensors), weights).sum(dim=0)


def magnitude_prune(task_tensors: list[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    """Task arithmetic of the tensors pruned by magnitude."""
    return task_arithmetic([prune(t, density, "magnitude") for t in task_tensors], weights)


def dare_linear(task_tensors: list[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    """Task arithmetic of the tensors pruned at random and rescaled."""
    return task_arithmetic([prune(t, density, "random", rescale=True) for t in task_tensors], weights)


def _elect_and_merge(pruned: torch.Tensor, weights: torch.Tensor, method: SignMethod) -> torch.Tensor:
    mask = calculate_majority_sign_mask(pruned, method)  # the election is unweighted
    return disjoint_merge(_weighted(pruned, weights), mask)


def ties(
    task_tensors: list[torch.Tensor], weights: torch.Tensor, density: float, majority_sign_method: SignMethod = "total"
) -> torch.Tensor:
    """Prune by magnitude, then average the entries of the elected sign."""
    pruned = torch.stack([prune(t, density, "magnitude") for t in task_tensors])
    return _elect_and_merge(pruned, weights, majority_sign_method)


def dare_ties(
    task_tensors: list[torch.Tensor], weights: torch.Tensor, density: float, majority_sign_method: SignMethod = "total"
) -> torch.Tensor:
    """Prune at random and rescale, then average the entries of the elected sign."""
    pruned = torch.stack([prune(t, density, "random", rescale=True) for t in task_tensors])
    return _elect_and_merge(pruned, weights, majority_sign_method)


# ---- combination types of `add_weighted_adapter`
_OPERATORS: dict[str, Callable[..., torch.Tensor]] = {
    "linear": lambda tensors, weights, density, sign: task_arithmetic(tensors, weights),
    "ties": ties,
    "dare_linear": lambda tensors, weights, density, sign: dare_linear(tensors, weights, density),
    "dare_ties": dare_ties,
    "magnitude_prune": lambda tensors, weights, density, sign: magnitude_prune(tensors, weights, density),
}
_BY_SVD = {"svd": "linear", **{f"{name}_svd": name for name in _OPERATORS if name != "linear"}}
# Exact at the sum of the source ranks: "cat" stacks the factors, "linear_exact" balances their singular vectors.
_EXACT = ("cat", "linear_exact")
COMBINATION_TYPES = (*_OPERATORS, *_BY_SVD, *_EXACT)


def resolve_combination(kind: str, ranks: Sequence[int], svd_rank: int | None = None) -> tuple[str, int]:
    """Check a combination type against the ranks of its sources; the type to use and the rank of the result."""
    if not ranks:
        raise ValueError("There is nothing to combine: the list of adapters is empty.")
    if kind not in COMBINATION_TYPES:
        hint = nearest(kind, COMBINATION_TYPES)
        raise ValueError(f"Invalid combination_type: {kind}.{hint} Use one of {', '.join(COMBINATION_TYPES)}.")
    if svd_rank is not None and kind not in _BY_SVD:
        warnings.warn(f"svd_rank has no effect with combination_type={kind!r}.", stacklevel=3)
    if len(ranks) == 1:
        return "linear", ranks[0]
    if kind in _OPERATORS:
        if len(set(ranks)) != 1:
            raise ValueError(
                f"All adapters must have the same r value when using combination_type linear, ties, dare_linear, "
                f"dare_ties or magnitude_prune; got {list(ranks)}. Use 'cat', 'linear_exact' or one of the svd types."
            )
        return kind, ranks[0]
    if kind in _BY_SVD:
        return kind, svd_rank or max(ranks)
    return kind, sum(ranks)


def combine_tensors(
    kind: str,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    density: float | None = None,
    majority_sign_method: SignMethod = "total",
) -> torch.Tensor:
    """Apply the operator of a combination type (of its elementwise part, for svd types) to tensors of one shape."""
    weight = torch.tensor(list(weights), dtype=torch.float32, device=tensors[0].device)
    return _OPERATORS[_BY_SVD.get(kind, kind)](list(tensors), weight, density, majority_sign_method)


def combine_factors(
    kind: str,
    factors: Sequence[Factors],
    weights: Sequence[float],
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: SignMethod = "total",
    clamp: float | None = None,
    driver: str | None = None,
    deltas: Sequence[torch.Tensor] | None = None,
    transposed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors A [rank, in, *kernel] and B [out, rank, *1] of a combination, for a scaling of 1.

    `rank` (svd types, linear_exact): default the largest source rank, or the sum of them. `deltas`: dense delta weights
    to use instead of `s B A` where a delta is more than that (scaling included, storage orientation; `transposed`
    says that this is [in, out]). `clamp` and `driver` are those of `svd_factors`.
    """
    if not factors:
        raise ValueError("There is nothing to combine: no source adapter is present in this layer.")
    if len(weights) != len(factors):
        raise ValueError(f"One weight per adapter is needed: got {len(weights)} weights for {len(factors)} adapters.")
    ranks = [A.shape[0] for A, _, _ in factors]
    options = {"density": density, "majority_sign_method": majority_sign_method}
    if kind in _OPERATORS:
        A, B = _combine_separately(kind, factors, weights, **options)
    elif kind == "cat":
        A = torch.cat([a * (w * s) for w, (a, _, s) in zip(weights, factors, strict=True)], dim=0)
        B = torch.cat([b for _, b, _ in factors], dim=1)
    elif kind == "linear_exact":
        A, B = split_svd(*low_rank_svd(factors, weights), rank or sum(ranks), balanced=True)
    elif kind == "svd" and deltas is None and clamp is None and (rank or 0) <= sum(ranks):
        A, B = split_svd(*low_rank_svd(factors, weights), rank or max(ranks))
    else:
        if deltas is None:
            deltas, transposed = [s * (_matrix(b) @ _matrix(a)) for a, b, s in factors], False
        delta = combine_tensors(kind, deltas, weights, **options).flatten(start_dim=1)
        A, B = svd_factors(delta.T if transposed else delta, rank or max(ranks), clamp=clamp, driver=driver)
    like_a, like_b, _ = factors[0]
    A, B = A.reshape(-1, *like_a.shape[1:]), B.reshape(like_b.shape[0], -1, *like_b.shape[2:])
    return A.to(like_a.dtype).contiguous(), B.to(like_b.dtype).contiguous()


def _combine_separately(
    kind: str, factors: Sequence[Factors], weights: Sequence[float], **options
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator on the A's and on the B's, each with the square root of the weight (published; not exact)."""
    strength = [w * s for w, (_, _, s) in zip(weights, factors, strict=True)]
    root = [abs(v) ** 0.5 for v in strength]
    signed = [-r if v < 0 else r for v, r in zip(strength, root, strict=True)]
    A = combine_tensors(kind, [a for a, _, _ in factors], signed, **options)
    return A, combine_tensors(kind, [b for _, b, _ in factors], root, **options)


def _matrix(factor: torch.Tensor) -> torch.Tensor:
    return factor.detach().float().flatten(start_dim=1)  # A: [r, in * kernel], B: [out, r], its kernel has size 1


def low_rank_svd(
    factors: Sequence[Factors], weights: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exact SVD of sum_i w_i s_i B_i A_i without forming it: U [out, k], S [k], Vh [k, in].

    With R the sum of ranks: QR of the stacked factors, SVD of an R x R core; O((out + in) R^2), not O(out in min).
    """
    B = torch.cat([_matrix(b) * (w * s) for w, (_, b, s) in zip(weights, factors, strict=True)], dim=1)
    A = torch.cat([_matrix(a) for a, _, _ in factors], dim=0)
    Q_out, R_out = torch.linalg.qr(B)
    Q_in, R_in = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_out @ R_in.T, full_matrices=False)
    return Q_out @ U, S, Vh @ Q_in.T


def svd_factors(
    delta: torch.Tensor, rank: int, *, clamp: float | None = None, driver: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors A [rank, in], B [out, rank] of a dense delta [out, in] by truncated SVD; B carries the singular values.

    `clamp` q limits both to +- the q-quantile of all their entries. `driver` as in `torch.linalg.svd`.
    """
    U, S, Vh = torch.linalg.svd(delta.detach().float(), full_matrices=False, driver=driver)
    A, B = split_svd(U, S, Vh, rank)
    if clamp is not None:
        limit = _quantile(torch.cat([B.flatten(), A.flatten()]), clamp)
        A, B = A.clamp(-limit, limit), B.clamp(-limit, limit)
    return A, B


def split_svd(
    U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor, rank: int, *, balanced: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B [out, rank] of an SVD, cut, or padded with zeros where there are fewer singular values.

    B carries the singular values, or each factor their square root when `balanced`.
    """
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    A, B = (S.sqrt()[:, None] * Vh, U * S.sqrt()) if balanced else (Vh, U * S)
    missing = rank - S.shape[0]
    if missing > 0:
        A = torch.nn.functional.pad(A, (0, 0, 0, missing))
        B = torch.nn.functional.pad(B, (0, missing))
    return A, B


def _quantile(values: torch.Tensor, q: float) -> float:
    """`torch.quantile` (linear interpolation) without its limit of 2^24 entries."""
    if not 0 <= q <= 1:
        raise ValueError(f"svd_clamp is a quantile and must be in [0, 1], got {q}.")
    position = q * (values.numel() - 1)
    low = int(position)
    ordered = values.sort().values
    high = min(low + 1, values.numel() - 1)
    return torch.lerp(ordered[low], ordered[high], position - low).item()
