# SPDX-License-Identifier: Apache-2.0
"""Mixed batches of low-rank adapters: every row has factors of its own, and all rows are done by two batched products.

y_n <- y_n + s_n · (x_n A_nᵀ) B_nᵀ. The factors are gathered, row by row, into [n, r, in] and [n, out, r]: four
operators whatever the number of adapters, where a loop takes six for each adapter (the kernels of Punica, arXiv
2310.18547, and S-LoRA, 2311.03285, gather inside).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import is_plain
from .low_rank import Factors


def pays(x: Tensor, y: Tensor, factors: list[Factors]) -> bool:
    """Whether gathering the factors of several adapters is cheaper than a loop over these: it copies r (in + out)
    numbers for each row.
    """
    if len(factors) < 2 or is_plain():
        return False
    rows, width, rank = len(x), x.shape[-1], factors[0].A.shape[0]
    tokens = x.numel() // (rows * width)
    return rows <= 4 * len(factors) or rank <= tokens or rows * rank * (width + y.shape[-1]) <= width * y.shape[-1]


def accumulate(y: Tensor, x: Tensor, factors: list[Factors], index: Tensor | None = None) -> Tensor:
    """y [N, ..., out] plus the adapters' output on x [N, ..., in]; `factors` [n] belong to the rows `index` [n], or to
    all of them. Out of place; products in y's dtype.
    """
    dtype, base = y.dtype, y if index is None else y[index]
    h = (x if index is None else x[index]).to(dtype)
    n, alpha = len(factors), factors[0].scale
    As, Bs = [f.A for f in factors], [f.B for f in factors]
    if len(ranks := {A.shape[0] for A in As}) > 1:
        As, Bs = [_padded(A, max(ranks), 0) for A in As], [_padded(B, max(ranks), 1) for B in Bs]
    z = torch.bmm(h.reshape(n, -1, h.shape[-1]), torch.stack(As).to(dtype).mT)
    if isinstance(alpha, Tensor) or any(isinstance(f.scale, Tensor) or f.scale != alpha for f in factors):
        z, alpha = z * torch.stack([_scales(f, z) for f in factors]).unsqueeze(1), 1.0
    rows = base.reshape(n, -1, base.shape[-1])
    out = torch.baddbmm(rows, z, torch.stack(Bs).to(dtype).mT, alpha=alpha).view(base.shape)
    return out if index is None else y.index_copy(0, index, out)


def _padded(factor: Tensor, rank: int, axis: int) -> Tensor:
    lacking = rank - factor.shape[axis]
    return F.pad(factor, (0, 0, 0, lacking) if axis == 0 else (0, lacking))


def _scales(f: Factors, z: Tensor) -> Tensor:
    """The scale of one adapter as [rank], the rank being that of z [n, L, rank]."""
    scale, rank = torch.as_tensor(f.scale, dtype=z.dtype, device=z.device), z.shape[-1]
    return F.pad(scale, (0, rank - len(scale))) if scale.dim() else scale.expand(rank)
