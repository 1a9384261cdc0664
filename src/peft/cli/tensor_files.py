# SPDX-License-Identifier: Apache-2.0
"""Model folders of safetensors files, read and written tensor by tensor.

The stock reader maps a whole file and the stock writer takes a whole dictionary. Here a file is rewritten under its own
header, one tensor after the other, so that memory does not depend on the file's size.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import CliError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_COPY_BYTES = 8 << 20
BLOCK_ELEMENTS = 1 << 20  # of a row block; with float32 copies a few times 4 MiB

# What is written for a tensor: pieces, each a part of its bytes in order.
Pieces = Callable[[], Iterable[torch.Tensor]]


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: type code, shape, and the place of its bytes in the file."""

    path: Path
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> torch.dtype | None:
        """None for integer and 8-bit types."""
        return _DTYPES.get(self.code)

    @property
    def work_dtype(self) -> torch.dtype:
        """The type that changes of this tensor are computed in."""
        return torch.float64 if self.code == "F64" else torch.float32

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) of the tensor; nothing else is read."""
        step = (self.end - self.begin) // self.shape[0]
        with self.path.open("rb") as file:
            file.seek(self.begin + begin * step)
            block = bytearray((end - begin) * step)
            file.readinto(block)
        return torch.frombuffer(block, dtype=_DTYPES[self.code]).view(end - begin, *self.shape[1:])

    def tensor(self) -> torch.Tensor:
        return self.rows(0, self.shape[0])

    def spans(self) -> list[tuple[int, int]]:
        """Row blocks of the tensor, small enough to compute with copies of one."""
        step = max(1, BLOCK_ELEMENTS // math.prod(self.shape[1:]))
        return [(begin, min(begin + step, self.shape[0])) for begin in range(0, self.shape[0], step)]


@dataclass(frozen=True)
class Shard:
    path: Path
    data_start: int
    entries: dict[str, Entry]  # in the order of their bytes


def read_header(path: Path) -> Shard:
    """Names, types and places of the tensors in a file; the data is not touched."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        start = 8 + struct.unpack("<Q", head)[0] if len(head) == 8 else size + 1
        if start > size:
            raise CliError(f"{path}: damaged or cut off: its header does not fit in the file")
        try:
            header = json.loads(file.read(start - 8))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CliError(f"{path}: damaged: its header is not valid JSON") from error
    header.pop("__metadata__", None)
    entries = {}
    for name, value in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = (start + offset for offset in value["data_offsets"])
        if end > size:
            raise CliError(f"{path}: cut off: {name} ends at byte {end:,}, the file at {size:,}")
        entries[name] = Entry(path, value["dtype"], tuple(value["shape"]), begin, end)
    return Shard(path, start, entries)


def rewrite(shard: Shard, target: Path, changed: Mapping[str, Pieces], report: Callable[[], object]) -> None:
    """Copy a file, with other values for the tensors in `changed`."""
    with shard.path.open("rb") as source, target.open("xb") as file:
        file.write(source.read(shard.data_start))
        for name, entry in shard.entries.items():
            if name in changed:
                for piece in changed[name]():
                    file.write(piece.contiguous().view(torch.uint8).reshape(-1).numpy().data)
            else:
                source.seek(entry.begin)
                for begin in range(entry.begin, entry.end, _COPY_BYTES):
                    file.write(source.read(min(_COPY_BYTES, entry.end - begin)))
            if file.tell() != entry.end:
                raise CliError(f"{target.name}: {name} ends at byte {file.tell():,}, {entry.end:,} was meant")
            report()


@dataclass(frozen=True)
class Base:
    """A model folder: its configuration, and where each tensor is."""

    folder: Path
    config: dict[str, Any]
    shards: list[Shard]
    places: dict[str, Entry]

    @property
    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings")) and not any(n.startswith("lm_head.") for n in self.places)

    def find(self, name: str) -> str | None:
        """The name of a tensor here: files of some models leave out the first part of the module path, or have more."""
        for candidate in (name, name.partition(".")[2]):
            if candidate in self.places:
                return candidate
        longer = [known for known in self.places if known.endswith("." + name)]
        return longer[0] if len(longer) == 1 else None


def open_base(folder: Path) -> Base:
    shards = [read_header(path) for path in _weight_files(folder)]
    config = _read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return Base(folder, config, shards, {name: entry for shard in shards for name, entry in shard.entries.items()})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CliError(f"{path}: damaged, not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise CliError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _weight_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CliError(f"{folder}: {'is a file, expected a folder' if folder.exists() else 'no such folder'}")
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        old = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".gguf"))
        hint = f"; {old[0]} has to be converted first (load it with transformers and save it again)" if old else ""
        raise CliError(f"{folder}: neither {SINGLE} nor {INDEX} is there{hint}")
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CliError(f"{folder / INDEX}: has no 'weight_map', which says where each tensor is")
    paths = [folder / name for name in sorted(set(weight_map.values()))]
    for path in paths:
        if not path.is_file():
            raise CliError(f"{path}: named in {INDEX}, but not there")
    return paths
