# SPDX-License-Identifier: Apache-2.0
"""Integer weights packed into 32-bit words (GPTQ, AWQ), and weights looked up in codebooks (AQLM).

GPTQ: W[o, i] = (q[i, o] - z[g, o]) s[g, o] with g = g_idx[i]; q packed along `in`, z along `out`.
AWQ: the same with g = i // group_size; q and z packed along `out`, eight values in the order 0 2 4 6 1 3 5 7.
AQLM: groups of `out_group_size` x `in_group_size` weights are a sum of codebook entries, times a scale of the row.

Only layers that keep these layouts: most kernels for GPUs rearrange them. Merging keeps the grid of every group and
widens its step where merged weights would lie outside. Codebooks come from optimisation over data, so an AQLM weight
is not written.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .base import QuantisedStorage
from .forward_only import label_of

PLAIN = {
    "gptq": ("TorchLinear", "TorchQuantLinear", "TritonV2Linear", "TritonV2QuantLinear"),
    "awq": ("AwqTorchLinear", "AwqTorchQuantLinear", "AwqGEMMLinear", "AwqGEMMQuantLinear", "WQLinear_GEMM"),
    "aqlm": ("QuantizedLinear",),
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # value that each place of a word holds


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, n] words -> [rows, n * 32 / bits] values; values of 3 bits run on from word to word."""
    step = bits if 32 % bits == 0 else 1
    digits = (words.unsqueeze(-1) >> _shifts(32, step, words)) & (2**step - 1)
    digits = digits.reshape(len(words), -1, bits // step)
    return (digits << _shifts(bits, step, words)).sum(-1, dtype=words.dtype)


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `unpack`, as int32."""
    step = bits if 32 % bits == 0 else 1
    values = values.to(torch.int32)
    digits = (values.unsqueeze(-1) >> _shifts(bits, step, values)) & (2**step - 1)
    digits = digits.reshape(len(values), -1, 32 // step)
    return (digits << _shifts(32, step, values)).sum(-1, dtype=torch.int32).contiguous()  # the highest bit wraps around


def _shifts(end: int, step: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(0, end, step, device=like.device, dtype=like.dtype)


class GptqStorage(QuantisedStorage):
    label = "gptq"

    def codes(self, module: Any, words: torch.Tensor) -> torch.Tensor:
        """[in, out]"""
        return unpack(words.T, module.bits).T

    def zeros(self, module: Any) -> torch.Tensor:
        """[groups, out]"""
        return unpack(module.qzeros, module.bits)

    def words(self, module: Any, codes: torch.Tensor) -> torch.Tensor:
        return pack(codes.T, module.bits).T.contiguous()

    def groups(self, module: Any) -> torch.Tensor:
        return module.g_idx.long()

    def snapshot(self, module: Any, name: str = "weight") -> Any:
        return module.qweight, module.scales

    def restore(self, module: Any, saved: Any, name: str = "weight") -> nn.Module:
        module.qweight, module.scales = saved
        return module

    def dequantise(self, module: Any, weight: Any) -> torch.Tensor:
        words, scales = weight
        g = self.groups(module)
        return ((self.codes(module, words) - self.zeros(module)[g]) * scales.float()[g]).T.contiguous()

    def quantise(self, module: Any, value: torch.Tensor, name: str) -> nn.Module:
        g, zeros, scales, top = self.groups(module), self.zeros(module), module.scales.float(), 2**module.bits - 1
        value = value.T.float()
        steps = value / scales[g]
        steps = torch.where(steps < 0, -steps / zeros[g].clamp(min=0.5), steps / (top - zeros[g]).clamp(min=0.5))
        wider = torch.ones_like(scales).scatter_reduce_(
            0, g[:, None].expand_as(steps), steps, "amax"
        )  # cuts nothing off
        module.scales = (scales * wider).to(module.scales.dtype)
        codes = (value / module.scales.float()[g] + zeros[g]).round().clamp(0, top)
        module.qweight = self.words(module, codes)
        return module


class AwqStorage(GptqStorage):
    label = "awq"

    def codes(self, module: Any, words: torch.Tensor) -> torch.Tensor:
        places = unpack(words, module.bits)
        order = torch.tensor(AWQ_ORDER, device=words.device).argsort()
        return places.reshape(len(words), -1, 8)[..., order].reshape(len(words), -1)

    def zeros(self, module: Any) -> torch.Tensor:
        return self.codes(module, module.qzeros)

    def words(self, module: Any, codes: torch.Tensor) -> torch.Tensor:
        return pack(codes.reshape(len(codes), -1, 8)[..., AWQ_ORDER].reshape(len(codes), -1), module.bits)

    def groups(self, module: Any) -> torch.Tensor:
        size = module.group_size if module.group_size > 0 else module.in_features
        return torch.arange(module.in_features, device=module.qweight.device) // size


class AqlmStorage(QuantisedStorage):
    label = "aqlm"
    writable = False

    def snapshot(self, module: Any, name: str = "weight") -> Any:
        return module.codes

    def dequantise(self, module: Any, weight: Any) -> torch.Tensor:
        books, size, out_group, in_group = module.codebooks.shape
        codes = weight.long() % size
        if codes.shape[0] != module.out_features // out_group:  # a kernel for CPUs wants the groups of inputs first
            codes = codes.transpose(0, 1)
        codes = codes + torch.arange(0, books * size, size, device=codes.device)
        W = F.embedding_bag(codes.flatten(0, 1), module.codebooks.detach().reshape(books * size, -1), mode="sum")
        W = W.view(*codes.shape[:2], out_group, in_group) * module.scales.detach()
        return W.transpose(1, 2).reshape(module.out_features, module.in_features)


_STORAGES = {storage.label: storage for storage in (GptqStorage(), AwqStorage(), AqlmStorage())}


def detect(module: nn.Module) -> QuantisedStorage | None:
    label = label_of(module)
    plain = label in PLAIN and type(module).__name__ in PLAIN[label]
    return _STORAGES[label] if plain and (label != "awq" or module.bits == 4) else None
