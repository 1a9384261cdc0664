# SPDX-License-Identifier: Apache-2.0
"""An adapter as it lies on disk: its config, its tensors by module, and the strength of each layer.

Works on files alone: a look at an adapter needs no base model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peft.core.match import pattern_value

from .errors import CliError

PREFIX = "base_model.model."
_LORA = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>A|B|magnitude_vector)(?P<tail>\.\w+)?$")


@dataclass
class Adapter:
    folder: Path
    peft_config: Any
    tensors: dict[str, torch.Tensor]

    def __post_init__(self) -> None:
        self.config: dict[str, Any] = self.peft_config.to_dict()

    @property
    def record(self) -> Any:
        """The method's entry in the registry."""
        from peft.registry import method_of

        return method_of(self.peft_config)

    @property
    def method(self) -> str:
        return self.record.name

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


def read_adapter(name: str) -> Adapter:
    """An adapter of a local folder or a hub repository."""
    from peft.io.files import local_config, read_adapter

    folder = Path(name)
    if folder.is_dir() and not local_config(folder).is_file():
        inner = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
        hint = f"; it holds the adapters {', '.join(inner)}: name one of them" if inner else ""
        raise CliError(f"{name}: no adapter_config.json in this folder{hint}")
    if not folder.is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise CliError(f"{name}: no such folder")
    try:
        config, tensors = read_adapter(name)
    except json.JSONDecodeError as error:
        raise CliError(f"{folder / 'adapter_config.json'}: not valid JSON: {error}") from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        place = name if folder.is_dir() else f"{name}: no such folder, and not to be had from the hub"
        raise CliError(f"{place}: {error.args[0] if error.args else error}") from error
    if config.peft_type is None:
        raise CliError(f"{folder / 'adapter_config.json'}: not an adapter config, it has no 'peft_type'")
    return Adapter(folder, config, tensors)


def strengths(adapter: Adapter) -> list[LayerStrength]:
    """One entry per changed module, in file order of the first tensor.

    For LoRA the norm is that of the weight change, from the factors alone: with A^T = Q1 R1 and B = Q2 R2 the
    singular values of B A are those of the small R2 R1^T. For other methods it is the norm of the module's tensors.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    rest: dict[str, torch.Tensor] = {}
    for key, tensor in adapter.tensors.items():
        key = key.removeprefix(PREFIX)
        match = _LORA.match(key) if adapter.method == "lora" else None
        if match is not None:
            parts.setdefault(match["module"], {})[match["part"] + (match["tail"] or "")] = tensor
        elif not key.startswith("base_model."):  # tensors that all layers share say nothing about one
            rest[key] = tensor
    return [_lora_strength(module, part, adapter) for module, part in parts.items()] + _tensor_strengths(rest)


def _lora_strength(module: str, tensors: dict[str, torch.Tensor], adapter: Adapter) -> LayerStrength:
    A, B = (next((t for key, t in tensors.items() if key in (x, f"{x}.weight")), None) for x in "AB")
    if A is None or B is None:
        raise CliError(f"{adapter.folder}: {module} has only {sorted(tensors)}, one factor of the pair is missing")
    config, rank, count = adapter.config, A.shape[0], sum(t.numel() for t in tensors.values())
    alpha = pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    A, B = A.float().flatten(1), B.float().flatten(1)
    if B.shape[1] != rank:  # grouped convolution: factors do not multiply directly
        return LayerStrength(module, float(A.norm() * B.norm()) * scaling, count, [], rank)
    R1, R2 = torch.linalg.qr(A.T, mode="r").R, torch.linalg.qr(B, mode="r").R
    values = torch.linalg.svdvals(R2 @ R1.T) * scaling
    return LayerStrength(module, float(values.norm()), count, values.tolist(), rank)


def _tensor_strengths(tensors: Mapping[str, torch.Tensor]) -> list[LayerStrength]:
    grouped: dict[str, list[torch.Tensor]] = {}
    for key, tensor in tensors.items():
        grouped.setdefault(_owner(key), []).append(tensor)
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
