# SPDX-License-Identifier: Apache-2.0
"""LoftQ: LoRA-Fine-Tuning-Aware Quantization (arXiv 2310.08659): W ~ Q + B A with Q quantised, by alternating.

Quantisation here is simulated in float: NF4 in blocks of 64 (QLoRA, arXiv 2305.14314) or int8 by rows. No
quantisation package is needed.
"""

import torch

# The 16 levels of NF4: quantiles of N(0, 1), scaled to [-1, 1] (QLoRA, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495,
    0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_BLOCK = 64


def loftq_factors(
    W: torch.Tensor, r: int, bits: int = 4, iterations: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q [out, in], A [r, in], B [out, r] for W [out, in]; Q holds the dequantised values."""
    if bits not in (4, 8):
        raise ValueError(f"LoftQ supports loftq_bits 4 and 8, got {bits}.")
    if iterations <= 0:
        raise ValueError(f"`loftq_iter` must be positive, got {iterations}.")
    rest = W
    Q = A = B = W
    for _ in range(iterations):
        Q = nf4(rest) if bits == 4 else int8(rest)
        U, S, Vh = torch.linalg.svd(W - Q, full_matrices=False)
        root = S[:r].sqrt()
        A, B = root[:, None] * Vh[:r], U[:, :r] * root
        rest = W - B @ A
    return Q, A, B


def nf4(W: torch.Tensor) -> torch.Tensor:
    """W rounded to NF4 and back; one scale for each 64 consecutive entries."""
    flat = W.reshape(-1)
    missing = -len(flat) % _BLOCK
    blocks = torch.nn.functional.pad(flat, (0, missing)).view(-1, _BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(_NF4, dtype=W.dtype, device=W.device)
    edges = (levels[1:] + levels[:-1]) / 2
    code = torch.bucketize((blocks / scale.clamp(min=torch.finfo(W.dtype).tiny)).contiguous(), edges)
    return (levels[code] * scale).view(-1)[: len(flat)].view(W.shape)


def int8(W: torch.Tensor) -> torch.Tensor:
    """W rounded to int8 and back; one scale a row."""
    scale = W.abs().amax(1, keepdim=True).clamp(min=torch.finfo(W.dtype).tiny) / 127
    return (W / scale).round() * scale
