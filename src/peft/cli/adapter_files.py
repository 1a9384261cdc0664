# SPDX-License-Identifier: Apache-2.0
"""An adapter as it lies on disk: its config, its tensors by module, and the strength of each layer.

Works on files alone: a look at an adapter needs no base model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peft.core.match import pattern_value
from peft.io.files import Tensors
from peft.io.keys import PEFT_PREFIX as PREFIX

from .errors import CliError


@dataclass
class Adapter:
    folder: Path
    peft_config: Any
    tensors: Tensors
    version: str | None = None  # that wrote it; files of old versions do not say

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


@dataclass
class LayerStrength:
    """One module of the base model that the adapter changes."""

    module: str
    norm: float
    singular_values: list[float] = field(default_factory=list)
    rank: int | None = None


def read_adapter(name: str) -> Adapter:
    """An adapter of a local folder or a hub repository."""
    from peft import PeftConfig
    from peft.io.files import local_config, read_adapter

    folder = Path(name)
    if folder.is_dir() and not local_config(folder).is_file():
        inner = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
        hint = f"; it holds the adapters {', '.join(inner)}: name one of them" if inner else ""
        raise CliError(f"{name}: no adapter_config.json in this folder{hint}")
    if folder.is_file():
        raise CliError(f"{name}: is a file, expected a folder")
    if not folder.is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise CliError(f"{name}: no such folder")
    try:
        config, tensors = read_adapter(name)
        version = PeftConfig.from_json_file(PeftConfig._find_config(name, None, {})).get("peft_version")
    except json.JSONDecodeError as error:
        raise CliError(f"{folder / 'adapter_config.json'}: not valid JSON: {error}") from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        place = name if folder.is_dir() else f"{name}: no such folder, and not to be had from the hub"
        raise CliError(f"{place}: {error.args[0] if error.args else error}") from error
    if config.peft_type is None:
        raise CliError(f"{folder / 'adapter_config.json'}: not an adapter config, it has no 'peft_type'")
    return Adapter(folder, config, tensors, version)


def strengths(adapter: Adapter) -> list[LayerStrength]:
    """One entry per changed module, in file order of the first tensor."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in adapter.tensors.items():
        key = key.removeprefix(PREFIX)
        if not key.startswith("base_model."):  # tensors that all layers share say nothing about one
            module = _owner(key, adapter.record)
            groups.setdefault(module, {})[key.removeprefix(module + ".")] = tensor
    return [_strength(module, tensors, adapter) for module, tensors in groups.items()]


def _owner(key: str, record: Any) -> str:
    """Module that a tensor belongs to: the key up to the names of the method's own tensors."""
    parts = key.split(".")
    slots = getattr(record.layer, "slots", {})
    ends = [i for i, part in enumerate(parts) if part in slots or part.startswith(record.prefix)]
    ends += [i for i, part in enumerate(parts) if part in ("base_layer", "token_adapter")]
    return ".".join(parts[: ends[0] if ends else -1]) or key


def _strength(module: str, tensors: dict[str, torch.Tensor], adapter: Adapter) -> LayerStrength:
    """For LoRA the norm is that of the weight change, from the factors alone: with A^T = Q1 R1 and B = Q2 R2 the
    singular values of B A are those of the small R2 R1^T. For other methods it is the norm of the module's tensors.
    """
    A, B = (tensors.get(f"lora_{x}.weight", tensors.get(f"lora_embedding_{x}")) for x in "AB")
    whole = LayerStrength(module, float(torch.stack([t.float().norm() for t in tensors.values()]).norm()))
    if adapter.method != "lora" or (A is None and B is None):
        return whole
    if A is None or B is None:
        raise CliError(f"{adapter.folder}: {module} has only {sorted(tensors)}, one factor of the pair is missing")
    config, count = adapter.config, _experts(module, len(A), adapter.config)
    if count is None:
        return whole
    rank = len(A) // count
    alpha = pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    A, B = _dense(module, A.float().flatten(1), B.float().flatten(1), tensors.get("lora_diag"), adapter)
    A, B = A.unflatten(0, (count, rank)), B.unflatten(1, (rank, count)).permute(2, 0, 1)  # as lora.ParamWrapper
    R1, R2 = torch.linalg.qr(A.mT, mode="r").R, torch.linalg.qr(B, mode="r").R
    values = torch.linalg.svdvals(R2 @ R1.mT).flatten().sort(descending=True).values * scaling
    return LayerStrength(module, float(values.norm()), values.tolist(), rank)


def _experts(module: str, rows: int, config: dict[str, Any]) -> int | None:
    """How many experts the `rows` of A are for; None where raw parameters of one module have different ranks: files
    do not say which of them is which.
    """
    if not (parameters := config.get("target_parameters")):
        return 1
    module = module.replace(".base_layer", "")  # further parameters of the same module
    names = [module, *(f"{module}.{name.rpartition('.')[2]}" for name in parameters)]
    ranks = {pattern_value(config.get("rank_pattern"), name, config["r"]) for name in names}
    if rows in ranks:
        return 1
    rank = ranks.pop()
    return None if ranks or rows % rank else rows // rank


def _dense(
    module: str, A: torch.Tensor, B: torch.Tensor, diagonal: torch.Tensor | None, adapter: Adapter
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors whose product is the change: blocks of BD-LoRA and of grouped convolutions are stored one below the
    other; KaSA has a diagonal between the factors.
    """
    from peft.tuners.lora.variants.bdlora import blocked_factor

    blocks = adapter.peft_config.use_bdlora
    if blocks is not None and blocked_factor(blocks, module) == "A":
        A = torch.block_diag(*A.chunk(blocks.nblocks))
    count, rest = divmod(len(A), B.shape[1])
    if rest or len(B) % count:
        raise CliError(f"{adapter.folder}: {module} has factors of ranks {len(A)} and {B.shape[1]}, which do not fit")
    B = torch.block_diag(*B.chunk(count))
    return A if diagonal is None else A * diagonal.float()[:, None], B
