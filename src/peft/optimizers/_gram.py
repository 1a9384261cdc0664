# SPDX-License-Identifier: Apache-2.0
"""Inverses of many small Gram matrices in few calls."""

from collections.abc import Sequence

import torch
from torch import nn


def refuse_block_diagonal(model: nn.Module, what: str) -> None:
    """The Gram matrix of a factor that is stored as blocks is not that of its tensor."""
    from ..tuners.lora.variants.bdlora import BlockDiagonal

    for name, module in model.named_modules():
        if isinstance(module, BlockDiagonal):
            raise ValueError(
                f"{what} needs dense factors, but {name!r} is block-diagonal (use_bdlora). Take another optimizer, "
                "for instance `create_loraplus_optimizer`."
            )


def regularised_inverses(factors: Sequence[torch.Tensor], reg: float) -> list[torch.Tensor]:
    """(F F^T + reg I)^+ [r, r] of each F [r, n]; those of one size are inverted as one batch, in at least float32."""
    grams = []
    for F in factors:
        wide = F.detach().to(torch.promote_types(F.dtype, torch.float32))
        grams.append(wide @ wide.T)
    groups: dict[tuple, list[int]] = {}
    for i, gram in enumerate(grams):
        groups.setdefault((gram.shape[0], gram.device, gram.dtype), []).append(i)
    inverses: list[torch.Tensor] = list(grams)
    for (rank, device, dtype), members in groups.items():
        stacked = torch.stack([grams[i] for i in members]) + reg * torch.eye(rank, device=device, dtype=dtype)
        for i, inverse in zip(members, torch.linalg.pinv(stacked, hermitian=True), strict=True):
            inverses[i] = inverse
    return inverses
