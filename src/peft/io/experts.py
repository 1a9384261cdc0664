# SPDX-License-Identifier: Apache-2.0
"""LoRA factors of single experts -> factors of the stacked parameter that holds all experts.

For E experts and fused projections k (gate and up) with A_e^k [r, in], B_e^k [out, r]: A_e = [A_e^1; A_e^2] along the
rank, B_e = blockdiag(B_e^1, B_e^2), so that B_e A_e is the stack of the single deltas. The experts are then folded into
the rank: expert-major rows of A, rank-major columns of B.
"""

from collections.abc import Sequence

import torch


def fold_a(stacks: Sequence[torch.Tensor]) -> torch.Tensor:
    """[E, r, in] for each projection -> [E * sum(r), in]."""
    return torch.cat(list(stacks), dim=1).flatten(0, 1).contiguous()


def fold_b(stacks: Sequence[torch.Tensor]) -> torch.Tensor:
    """[E, out, r] for each projection -> [sum(out), sum(r) * E]."""
    blocks = (
        torch.stack([torch.block_diag(*parts) for parts in zip(*stacks, strict=True)]) if len(stacks) > 1 else stacks[0]
    )
    return blocks.permute(2, 0, 1).flatten(0, 1).T.contiguous()
