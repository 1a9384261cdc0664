# SPDX-License-Identifier: Apache-2.0
r"""Kronecker products (LoKr): x (w1 ⊗ w2)ᵀ for w1 [l, m], w2 [k, n], without forming the product.

With X = x viewed as [.., m, n]: y = w1 (X w2ᵀ), viewed as [.., l·k].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import recomputed


def apply(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """x [.., m·n], w1 [l, m], w2 [k, n] -> [.., l·k]. Keeps its inputs alone."""
    return recomputed(_plain, x, w1, w2)


def _plain(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return torch.matmul(w1, F.linear(x.unflatten(-1, (w1.shape[1], w2.shape[1])), w2)).flatten(-2)
