# SPDX-License-Identifier: Apache-2.0
"""LoftQ: low-rank factors that make up for the error of quantising a base weight.

LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, arXiv 2310.08659. With the error
E = W - dequant(quant(W)) = U S V^T: A = sqrt(S_r) V_r^T, B = U_r sqrt(S_r).
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .integrations import dequantize_bnb_weight, get_bnb_param_type

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
    from ..tuners.lora.loftq import loftq_factors

    return loftq_factors(weight, reduced_rank, bits=num_bits, iterations=num_iter)


def _low_rank_decomposition(weight: torch.Tensor, reduced_rank: int = 32) -> dict[str, Any]:
    """Balanced factors L [out, r], R [r, in] of the best rank-r approximation of a matrix, and its SVD."""
    if weight.dim() != 2:
        raise ValueError(f"Only support 2D matrix, but your input has {weight.dim()} dimensions.")
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = S[:reduced_rank].sqrt()
    L, R = U[:, :reduced_rank] * root, root[:, None] * Vh[:reduced_rank]
    return {"L": L, "R": R, "U": U, "S": S, "Vh": Vh, "reduced_rank": reduced_rank}


@torch.no_grad()
def _residual_factors(quantized: nn.Module, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) of the error of a quantised layer."""
    dequantized = dequantize_bnb_weight(quantized.weight, state=getattr(quantized, "state", None))  # type: ignore[arg-type]
    error = weight.to(dequantized.device, torch.float32) - dequantized.to(torch.float32)
    parts = _low_rank_decomposition(error, rank)
    return parts["R"], parts["L"]


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
        self._folder, self._shards = path.parent, {}
        if path.suffix == ".json":
            self._shards = json.loads(path.read_text())["weight_map"]
        elif path.suffix != ".safetensors":
            raise ValueError(f"{path} is no safetensors file.")
        self._single = path

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
                f"The weights of {name!r} are not in the local cache as safetensors files; download them or pass"
                " `model_path`."
            ) from error

    def get_tensor(self, name: str) -> torch.Tensor:
        """The original tensor of this name in the base model."""
        from safetensors import safe_open

        tried = [name]
        if self._base_prefix and name.startswith(self._base_prefix + "."):
            tried.append(name.removeprefix(self._base_prefix + "."))
        for key in tried:
            file = self._folder / self._shards[key] if key in self._shards else self._single
            if file.suffix == ".json":
                continue
            with safe_open(file, framework="pt", device="cpu") as opened:
                if key in opened.keys():  # noqa: SIM118
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
            "bitsandbytes must be installed (pip install 'peft[quantization]') and the model must be quantized in "
            "4bits."
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
        new_a, new_b = _residual_factors(module.get_base_layer(), original, module.r[adapter_name])
        before = (A.detach().clone(), B.detach().clone())
        A.copy_(new_a)
        B.copy_(new_b)
        if callback is not None and not callback(peft_model, name):
            A.copy_(before[0])
            B.copy_(before[1])
