# SPDX-License-Identifier: Apache-2.0
"""Dropout whose mask is regenerated from a seed, so that backward keeps a number instead of an activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import fusable

_LONG = 2048
_SEEDED = frozenset(("cpu", "cuda", "xpu"))  # devices whose generators are known to fill 64-bit integers


def draw_seed() -> int:
    """A seed from the global CPU generator: activation checkpointing, which restores it, replays the same mask."""
    return int(torch.randint(2**62, (), dtype=torch.int64, device="cpu"))


def seedable(x: Tensor) -> bool:
    """Whether the mask of `x` may come from a seed: eager, on a device with a generator, not being graph-captured."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False  # a captured seed would replay one mask for ever; the built-in op advances the device generator
    return x.device.type in _SEEDED and fusable(x)


def keep_mask(seed: int, p: float, like: Tensor) -> Tensor:
    """The 0/1 mask of `seed` in the dtype and shape of `like`; entries are kept with probability 1 - p.

    On a CPU each entry of a long mask costs 16 random bits, a sixth of the time of `bernoulli_`, and does not depend on
    the dtype; p is therefore rounded to a multiple of 2^-16, and `rescale` accounts for it.
    """
    n, dropped = like.numel(), _dropped_of_65536(p)
    if dropped >= 65536:
        return torch.zeros_like(like)
    generator = torch.Generator(like.device).manual_seed(seed)
    if n < _LONG or not like.is_cpu:  # one kernel, where what counts is how many there are
        mask = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return mask.bernoulli_(1 - dropped / 65536, generator=generator)
    words = torch.empty((n + 3) // 4, dtype=torch.int64, device=like.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[:n]
    mask = torch.empty(n, dtype=like.dtype, device=like.device)
    torch.ge(bits, dropped - 32768, out=mask)
    return mask.view(like.shape)


def rescale(p: float) -> float:
    """What kept entries are multiplied by; where nothing is kept the factor does not matter."""
    kept = 65536 - _dropped_of_65536(p)
    return 65536 / kept if kept else 1.0


def _dropped_of_65536(p: float) -> int:
    return max(1, round(p * 65536)) if p > 0.0 else 0


def drop(x: Tensor, p: float) -> Tensor:
    """Dropout of `x` by ordinary ops, with a fresh seed where one can be used."""
    return dropout(x, p, draw_seed() if p > 0.0 and seedable(x) else None)


def dropout(x: Tensor, p: float, seed: int | None) -> Tensor:
    """Plain differentiable dropout of `x`: by `seed`, or by the framework's own op where a seed cannot be used."""
    if p <= 0.0:
        return x
    if seed is None:
        return F.dropout(x, p, training=True)
    return x * keep_mask(seed, p, x).mul_(rescale(p))
