# SPDX-License-Identifier: Apache-2.0
"""An adapter as it lies on disk: its config, its tensors by module, and the strength of each layer.

Works on files alone, so that a look at an adapter needs neither its base model nor the library's model classes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import CliError

WEIGHTS, OLD_WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
PREFIX = "base_model.model."
_LORA = re.compile(r"^(?P<module>.+)\.(?P<part>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))(?P<tail>\.\w+)?$")


@dataclass
class Adapter:
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def method(self) -> str:
        return str(self.config.get("peft_type", "?")).lower()

    @property
    def parameters(self) -> int:
        return sum(t.numel() for t in self.tensors.values())


@dataclass
class LayerStrength:
    """One module of the base model that the adapter changes."""

    module: str
    norm: float
    parameters: int
    singular_values: list[float] = field(default_factory=list)
    rank: int | None = None


def adapter_folder(name: str) -> Path:
    """A local folder, or a hub repository's snapshot."""
    folder = Path(name)
    if (folder / CONFIG).is_file():
        return folder
    if folder.is_dir():
        inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        hint = f"; it holds the adapters {', '.join(inner)}: name one of them" if inner else ""
        raise CliError(f"{name}: no {CONFIG} in this folder{hint}")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CliError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, allow_patterns=["adapter_*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CliError(f"{name}: no such folder, and not to be had from the hub ({type(error).__name__})") from error


def read_adapter(name: str) -> Adapter:
    folder = adapter_folder(name)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CliError(f"{folder / CONFIG}: not valid JSON: {error}") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise CliError(f"{folder / CONFIG}: not an adapter config, it has no 'peft_type'")
    return Adapter(folder, config, _read_tensors(folder))


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if (folder / WEIGHTS).is_file():
        try:
            return load_file(folder / WEIGHTS)
        except SafetensorError as error:
            raise CliError(f"{folder / WEIGHTS}: damaged file: {error}") from error
    if (folder / OLD_WEIGHTS).is_file():
        import pickle

        try:
            tensors = torch.load(folder / OLD_WEIGHTS, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise CliError(f"{folder / OLD_WEIGHTS}: holds more than plain tensors, or is damaged") from error
        return dict(tensors)
    raise CliError(f"{folder}: neither {WEIGHTS} nor {OLD_WEIGHTS} is there")


@dataclass
class LoraParts:
    """The LoRA tensors of one module: delta = scaling * B A, shapes A [r, in], B [out, r]."""

    module: str
    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    embedding: bool = False
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def pattern_value(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """First pattern that matches `module` from a dot or the start to the end."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def lora_parts(adapter: Adapter) -> tuple[dict[str, LoraParts], dict[str, torch.Tensor]]:
    """LoRA pieces by module, and the tensors that are none (trained heads, biases, token rows ...)."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    rest: dict[str, torch.Tensor] = {}
    for key, tensor in adapter.tensors.items():
        match = _LORA.match(key.removeprefix(PREFIX))
        if match is None:
            rest[key.removeprefix(PREFIX)] = tensor
            continue
        part = match["part"] + (".bias" if match["tail"] == ".bias" else "")
        found.setdefault(match["module"], {})[part] = tensor
    return {module: _assemble(module, parts, adapter) for module, parts in found.items()}, rest


def _assemble(module: str, parts: dict[str, torch.Tensor], adapter: Adapter) -> LoraParts:
    embedding = "lora_embedding_A" in parts
    kind = "lora_embedding_" if embedding else "lora_"
    A, B = parts.get(kind + "A"), parts.get(kind + "B")
    if A is None or B is None:
        raise CliError(f"{adapter.folder}: {module} has only {sorted(parts)}, one factor of the pair is missing")
    config, rank = adapter.config, A.shape[0]
    alpha = pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return LoraParts(
        module, A, B, scaling, embedding, parts.get("lora_magnitude_vector"), parts.get("lora_B.bias")
    )  # fmt: skip


def strengths(adapter: Adapter) -> list[LayerStrength]:
    """One entry per changed module, in file order of the first tensor.

    For LoRA the norm is that of the weight change, from the factors alone: with A^T = Q1 R1 and B = Q2 R2 the
    singular values of B A are those of the small R2 R1^T. For other methods it is the norm of the module's tensors.
    """
    plain = adapter.method in ("lora", "adalora") and not any(".lora_E" in key for key in adapter.tensors)
    if not plain:
        return _tensor_strengths(adapter.tensors)
    parts, rest = lora_parts(adapter)
    result = [_lora_strength(part) for part in parts.values()]
    return result + _tensor_strengths(rest)


def _lora_strength(part: LoraParts) -> LayerStrength:
    count = part.A.numel() + part.B.numel() + (0 if part.magnitude is None else part.magnitude.numel())
    count += 0 if part.bias is None else part.bias.numel()
    A, B = part.A.float(), part.B.float()
    if A.dim() != 2 and B[0].numel() != part.rank:  # grouped convolution: factors do not multiply directly
        norm = float(A.norm() * B.norm()) * part.scaling
        return LayerStrength(part.module, norm, count, [], part.rank)
    A, B = A.flatten(1), B.flatten(1)
    R1, R2 = torch.linalg.qr(A.T, mode="r").R, torch.linalg.qr(B, mode="r").R
    values = torch.linalg.svdvals(R2 @ R1.T) * part.scaling
    return LayerStrength(part.module, float(values.norm()), count, values.tolist(), part.rank)


def _tensor_strengths(tensors: Mapping[str, torch.Tensor]) -> list[LayerStrength]:
    grouped: dict[str, list[torch.Tensor]] = {}
    for key, tensor in tensors.items():
        grouped.setdefault(_owner(key.removeprefix(PREFIX)), []).append(tensor)
    result = []
    for module, group in grouped.items():
        norm = float(torch.stack([t.float().norm() for t in group]).norm())
        result.append(LayerStrength(module, norm, sum(t.numel() for t in group)))
    return result


def _owner(key: str) -> str:
    """Module that a tensor belongs to: the key up to the method's own names (`...q_proj.hada_w1_a` -> `...q_proj`)."""
    parts = key.split(".")
    while len(parts) > 1 and (parts[-1] in ("weight", "bias") or re.search(r"_|^[A-Z]$", parts[-1])):
        if re.match(r".*(proj|layer\d*|norm|embed\w*|head|attn|mlp|fc\w*)$", parts[-1]):
            break
        parts.pop()
    return ".".join(parts)


def rank_text(layers: list[LayerStrength], config: Mapping[str, Any]) -> str:
    ranks = sorted({layer.rank for layer in layers if layer.rank is not None})
    if not ranks:
        return str(config.get("r", "-"))
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
