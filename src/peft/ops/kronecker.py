# SPDX-License-Identifier: Apache-2.0
r"""Kronecker products (LoKr): x (w1 ⊗ w2)ᵀ for w1 [l, m], w2 = [k, n] or b-then-a factors, without forming the product.

With X = x viewed as [.., m, n]: y = w1 (X w2ᵀ), viewed as [.., l·k].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import is_plain


def apply(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """x [.., m·n], w1 [l, m], w2 [k, n] -> [.., l·k]. The fused form keeps x alone and repeats X w2ᵀ in backward."""
    if is_plain() or not torch.is_grad_enabled() or not (x.requires_grad or w1.requires_grad or w2.requires_grad):
        return plain(x, w1, w2)
    return _Kronecker.apply(x, w1, w2)  # type: ignore[return-value]


def plain(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return torch.matmul(w1, F.linear(x.unflatten(-1, (w1.shape[1], w2.shape[1])), w2)).flatten(-2)


class _Kronecker(torch.autograd.Function):
    """The backward is made of differentiable ops, so it can be differentiated again."""

    @staticmethod
    def forward(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return plain(x, w1, w2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, w1, w2 = ctx.saved_tensors
        (l, m), (k, n) = w1.shape, w2.shape  # noqa: E741 - the sizes' names in the docstring
        G = grads[0].reshape(-1, l, k)
        H = torch.matmul(w1.t(), G)  # [T, m, k], the gradient of X w2ᵀ
        dx = dw1 = dw2 = None
        if ctx.needs_input_grad[0]:
            dx = F.linear(H, w2.t()).view(x.shape)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            X = x.reshape(-1, m, n)
            if ctx.needs_input_grad[2]:
                dw2 = H.reshape(-1, k).t() @ X.reshape(-1, n)
            if ctx.needs_input_grad[1]:
                Z = F.linear(X, w2)
                dw1 = G.transpose(0, 1).reshape(l, -1) @ Z.transpose(0, 1).reshape(m, -1).t()
        return dx, dw1, dw2
