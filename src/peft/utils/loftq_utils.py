# SPDX-License-Identifier: Apache-2.0
"""LoftQ: low-rank factors that make up for the error of quantising a base weight.

LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, arXiv 2310.08659. With the error
E = W - dequant(quant(W)) = U S V^T: A = sqrt(S_r) V_r^T, B = U_r sqrt(S_r).

`loftq_init` needs no quantisation package: it simulates NF4 in blocks of 64 (QLoRA, arXiv 2305.14314) or int8 by rows.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..core.combine import split_svd
from .integrations import dequantize_bnb_weight, get_bnb_param_type

# The 16 levels of NF4: quantiles of N(0, 1), scaled to [-1, 1] (QLoRA, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495,
    0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_BLOCK = 64
_PREFIX = "base_model.model."
_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def loftq_init(
    weight: torch.Tensor | nn.Parameter, num_bits: int, reduced_rank: int, num_iter: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Alternate quantisation and SVD: (dequantised weight [out, in], lora_A [r, in], lora_B [out, r])."""
    if num_bits not in (4, 8):
        raise ValueError(f"Only 4 and 8 bits are supported by LoftQ, got num_bits={num_bits}.")
    if num_iter <= 0:
        raise ValueError(f"The number of LoftQ iterations must be greater than 0, got {num_iter}.")
    rest = Q = A = B = weight
    for _ in range(num_iter):
        Q = _nf4(rest) if num_bits == 4 else _int8(rest)
        A, B = split_svd(*torch.linalg.svd(weight - Q, full_matrices=False), reduced_rank, balanced=True)
        rest = weight - B @ A
    return Q, A, B


def _nf4(W: torch.Tensor) -> torch.Tensor:
    """W rounded to NF4 and back; one scale for each 64 consecutive entries."""
    flat = W.reshape(-1)
    missing = -len(flat) % _BLOCK
    blocks = torch.nn.functional.pad(flat, (0, missing)).view(-1, _BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(_NF4, dtype=W.dtype, device=W.device)
    edges = (levels[1:] + levels[:-1]) / 2
    code = torch.bucketize((blocks / scale.clamp(min=torch.finfo(W.dtype).tiny)).contiguous(), edges)
    return (levels[code] * scale).view(-1)[: len(flat)].view(W.shape)


def _int8(W: torch.Tensor) -> torch.Tensor:
    """W rounded to int8 and back; one scale a row."""
    scale = W.abs().amax(1, keepdim=True).clamp(min=torch.finfo(W.dtype).tiny) / 127
    return (W / scale).round() * scale


class _SafetensorLoader:
    """Reads single tensors of the unquantised base model from its safetensors file or shards."""

    def __init__(self, peft_model: nn.Module, model_path: str | os.PathLike | None):
        base = peft_model.get_base_model() if hasattr(peft_model, "get_base_model") else peft_model  # type: ignore[operator]
        self._base_prefix = getattr(base, "base_model_prefix", None)
        path = Path(model_path) if model_path is not None else self._cached(base)
        if not path.exists():
            raise FileNotFoundError(f"There is no file or folder {path} to read the original weights from.")
        if path.is_dir():
            path = next((path / name for name in (_FILE, _INDEX) if (path / name).exists()), path / _FILE)
        if not path.exists():
            raise FileNotFoundError(f"{path.parent} holds neither {_FILE} nor {_INDEX}; LoftQ needs safetensors files.")
        if path.suffix == ".json":
            self._files = {k: path.parent / file for k, file in json.loads(path.read_text())["weight_map"].items()}
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as opened:
                self._files = dict.fromkeys(opened.keys(), path)
        else:
            raise ValueError(f"{path} is no safetensors file.")

    @staticmethod
    def _cached(base: nn.Module) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        name = getattr(getattr(base, "config", None), "_name_or_path", None)
        if not name:
            raise ValueError("The base model does not say where it was loaded from; pass `model_path`.")
        if os.path.isdir(name):
            return Path(name)
        try:
            return Path(snapshot_download(name, local_files_only=True, allow_patterns=["*.safetensors*"]))
        except (LocalEntryNotFoundError, HFValidationError) as error:
            raise ValueError(
                f"The local cache has no safetensors files of {name!r}; download them or pass `model_path`."
            ) from error

    def get_tensor(self, name: str) -> torch.Tensor:
        """The original tensor of this name in the base model."""
        tried = [name]
        if self._base_prefix and name.startswith(self._base_prefix + "."):
            tried.append(name.removeprefix(self._base_prefix + "."))
        for key in tried:
            if key in self._files:
                with safe_open(self._files[key], framework="pt", device="cpu") as opened:
                    return opened.get_tensor(key)
        raise ValueError(f"The files of the base model have no tensor called {' or '.join(tried)}.")


def _layers_4bit(peft_model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """LoRA layers with this adapter whose base weight is a bitsandbytes 4-bit one."""
    found = {}
    for name, module in peft_model.named_modules():
        factors: Any = getattr(module, "lora_A", None)
        if factors is None or adapter_name not in factors:
            continue
        weight = getattr(module.get_base_layer(), "weight", None)  # type: ignore[operator]
        if weight is not None and get_bnb_param_type(weight) == "4bit":
            found[name] = module
    return found


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Set the LoRA factors of a 4-bit model so that they make up for the quantisation error, one layer after another.

    `model_path`: safetensors file or folder of the original weights (default: where the base model came from).
    `callback(model, module_name)` is called after each layer; when it returns False, the layer gets its factors back.
    """
    from ..import_utils import is_bnb_4bit_available

    if not is_bnb_4bit_available():
        raise ValueError(
            "bitsandbytes must be installed (pip install 'peft[quantization]') and the model be quantized in 4bits."
        )
    layers = _layers_4bit(peft_model, adapter_name)
    if not layers:
        raise ValueError(f"No bnb LoRA module of the adapter {adapter_name!r} found on the model.")
    loader = _SafetensorLoader(peft_model, model_path)
    for name, module in layers.items():
        if not name.startswith(_PREFIX):
            raise TypeError(f"The passed model does not appear to be a valid PeftModel: {name!r} lacks {_PREFIX!r}.")
        A, B = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
        original = loader.get_tensor(name.removeprefix(_PREFIX) + ".weight")
        base = module.get_base_layer()
        dequantized = dequantize_bnb_weight(base.weight, state=getattr(base, "state", None))
        error = original.to(dequantized.device, torch.float32) - dequantized.float()
        U, S, Vh = torch.linalg.svd(error, full_matrices=False)
        new_a, new_b = split_svd(U, S, Vh, module.r[adapter_name], balanced=True)
        before = (A.detach().clone(), B.detach().clone())
        A.copy_(new_a)
        B.copy_(new_b)
        if callback is not None and not callback(peft_model, name):
            A.copy_(before[0])
            B.copy_(before[1])
