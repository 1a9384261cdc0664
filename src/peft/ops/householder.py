# SPDX-License-Identifier: Apache-2.0
r"""Products of Householder reflections H = H_0 H_1 ... H_{r-1}, H_i = I - 2 u_i u_iᵀ, in compact WY form.

With S = striu(uᵀ u) + diag(uᵀ u) / 2 (upper triangular), H = I - u S⁻¹ uᵀ: nothing of size n x n,
no loop. For orthonormal U, H = I - 2 U Uᵀ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import Fused, derived, fusable, is_plain, settled, wide
from .low_rank import Factors, accumulate


def normalise(u: Tensor) -> Tensor:
    """u [n, r] -> unit columns."""
    return u / u.norm(dim=0)


def gram_schmidt(u: Tensor) -> Tensor:
    """u [n, r] -> orthonormal columns that span the same nested spaces, each with the sign of Gram-Schmidt."""
    Q, R = torch.linalg.qr(wide(u))
    signs = torch.where(torch.diagonal(R) < 0, -1.0, 1.0).to(Q.dtype)
    return (Q * signs).to(u.dtype)


def wy(u: Tensor, orthonormal: bool = False) -> tuple[Tensor, Tensor]:
    """Vectors u [n, r] -> (U, P), both [n, r], with H = I - P Uᵀ, P = U S⁻¹. At least float32, as the triangular
    system needs it. `orthonormal`: orthonormalise the vectors first.

    The lengths of the vectors cancel, so U is u itself with S = striu(uᵀ u) + diag(uᵀ u) / 2.
    """
    u = wide(u)
    if orthonormal:
        U = gram_schmidt(u)
        return U, 2 * U
    with settled(u):
        return u, (_Solved.apply(u) if fusable(u) else _solved(u))  # type: ignore[return-value]


def _solved(u: Tensor) -> Tensor:
    gram = u.t() @ u
    S = torch.triu(gram, 1) + torch.diag(0.5 * gram.diagonal())
    return torch.linalg.solve_triangular(S, u, upper=True, left=False)


class _Solved(Fused):
    """u [n, r] -> P = u S⁻¹; keeps S [r, r] and P, which the product with it keeps anyway."""

    @staticmethod
    def forward(ctx: Any, u: Tensor):
        S = torch.triu(u.t() @ u)
        S.diagonal().mul_(0.5)
        P = torch.linalg.solve_triangular(S, u, upper=True, left=False)
        ctx.save_for_backward(u, S, P)
        return P

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        u, S, P = ctx.saved_tensors
        if torch.is_grad_enabled():
            return derived(_solved, (u,), (True,), grads[0])
        du = torch.linalg.solve_triangular(S.t(), grads[0], upper=False, left=False)
        dS = torch.triu(P.t() @ du)  # of opposite sign; the halved diagonal counts twice in dS + dSᵀ, that is once
        return du.addmm_(u, dS + dS.t().tril(-1), alpha=-1)


def dense(u: Tensor, orthonormal: bool = False) -> Tensor:
    """H [n, n] itself, by the definition."""
    U = gram_schmidt(u) if orthonormal else normalise(u)
    H = torch.eye(u.shape[0], dtype=u.dtype, device=u.device)
    for column in U.t():
        H = H - 2 * torch.outer(H @ column, column)
    return H


def reflect(x: Tensor, u: Tensor, orthonormal: bool = False) -> Tensor:
    """x [..., n], u [n, r] -> x Hᵀ = x - ((x U) Kᵀ) Uᵀ in x's dtype: the input of a layer with the weight W H.

    One autograd function that keeps x, x U and the factors; 2·n·r multiplications a row.
    """
    if is_plain():
        return (x.to(u.dtype) @ dense(u, orthonormal).t()).to(x.dtype)
    U, P = wy(u, orthonormal)
    return accumulate(x, x, (Factors(U.t(), P, -1.0),))


def reflect_weight(W: Tensor, u: Tensor, orthonormal: bool = False) -> Tensor:
    """W [out, n] -> W H in W's dtype, computed in the factors' one. 2·out·n·r multiplications."""
    dtype = torch.promote_types(W.dtype, u.dtype)
    if is_plain():
        H = dense(u, orthonormal)
        return (W.to(dtype) @ H.to(dtype)).to(W.dtype)
    U, P = wy(u, orthonormal)
    w = W.to(torch.promote_types(dtype, U.dtype))
    return torch.addmm(w, w @ P.to(w.dtype), U.t().to(w.dtype), alpha=-1).to(W.dtype)
