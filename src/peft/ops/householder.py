# SPDX-License-Identifier: Apache-2.0
r"""Products of Householder reflections H = H_0 H_1 ... H_{r-1}, H_i = I - 2 u_i u_iᵀ, in compact WY form.

With unit columns U [n, r] and S = striu(Uᵀ U) + I/2 (upper triangular), H = I - U S⁻¹ Uᵀ: nothing of size n x n,
no loop. For orthonormal U, S = I/2 and H = I - 2 U Uᵀ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import is_plain
from .low_rank import Factors, accumulate


def normalise(u: Tensor) -> Tensor:
    """u [n, r] -> unit columns."""
    return u / u.norm(dim=0)


def gram_schmidt(u: Tensor) -> Tensor:
    """u [n, r] -> orthonormal columns that span the same nested spaces, each with the sign of Gram-Schmidt."""
    work = u.float() if u.dtype in (torch.float16, torch.bfloat16) else u
    Q, R = torch.linalg.qr(work)
    signs = torch.where(torch.diagonal(R) < 0, -1.0, 1.0).to(work.dtype)
    return (Q * signs).to(u.dtype)


def wy(u: Tensor, orthonormal: bool = False) -> tuple[Tensor, Tensor]:
    """Vectors u [n, r] -> (U, K) with H = I - U K Uᵀ, U of unit columns, K [r, r] upper triangular.

    `orthonormal`: orthonormalise the vectors first. At least float32, as the triangular system needs it.
    """
    u = u.float() if u.dtype in (torch.float16, torch.bfloat16) else u
    identity = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
    if orthonormal:
        return gram_schmidt(u), 2 * identity
    U = normalise(u)
    S = torch.triu(U.t() @ U, 1) + 0.5 * identity
    return U, torch.linalg.solve_triangular(S, identity, upper=True)


def dense(u: Tensor, orthonormal: bool = False) -> Tensor:
    """H [n, n] itself, by the definition."""
    U = gram_schmidt(u) if orthonormal else normalise(u)
    H = torch.eye(u.shape[0], dtype=u.dtype, device=u.device)
    for i in range(u.shape[1]):
        H = H - 2 * torch.outer(H @ U[:, i], U[:, i])
    return H


def reflect(x: Tensor, u: Tensor, orthonormal: bool = False) -> Tensor:
    """x [..., n], u [n, r] -> x Hᵀ = x - ((x U) Kᵀ) Uᵀ in x's dtype: the input of a layer with the weight W H.

    One autograd function that keeps x, x U and the factors; 2·n·r multiplications a row.
    """
    if is_plain():
        return (x.to(u.dtype) @ dense(u, orthonormal).t()).to(x.dtype)
    U, K = wy(u, orthonormal)
    return accumulate(x, x, (Factors(U.t(), U @ K, -1.0),))


def reflect_weight(W: Tensor, u: Tensor, orthonormal: bool = False, transpose: bool = False) -> Tensor:
    """W [out, n] -> W H (W Hᵀ if `transpose`) in W's dtype, computed in the factors' one. 2·out·n·r multiplications."""
    dtype = torch.promote_types(W.dtype, u.dtype)
    if is_plain():
        H = dense(u, orthonormal)
        return (W.to(dtype) @ (H.t() if transpose else H).to(dtype)).to(W.dtype)
    U, K = wy(u, orthonormal)
    w = W.to(torch.promote_types(dtype, U.dtype))
    U, K = U.to(w.dtype), K.to(w.dtype)
    return torch.addmm(w, (w @ U) @ (K.t() if transpose else K), U.t(), alpha=-1).to(W.dtype)
