# SPDX-License-Identifier: Apache-2.0
"""Model folders of safetensors files, read and written tensor by tensor.

The stock writer takes a whole shard as a dictionary of tensors. Here the header is written first, which only needs
names, types and shapes, and then each tensor as it becomes known, so that memory does not depend on the shard size.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import CliError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_COPY_BYTES = 8 << 20


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: type code, shape and its bytes' place after the header."""

    name: str
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> torch.dtype | None:
        """None for integer and 8-bit types."""
        return DTYPES.get(self.code)


@dataclass
class Shard:
    path: Path
    entries: list[Entry]
    metadata: dict[str, str]
    data_start: int


def read_header(path: Path) -> Shard:
    """Names, types and places of the tensors in a file; the data is not touched."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise CliError(f"{path}: damaged or cut off: its header does not fit in the file")
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CliError(f"{path}: damaged: its header is not valid JSON") from error
    metadata = header.pop("__metadata__", {})
    entries = [Entry(k, v["dtype"], tuple(v["shape"]), *v["data_offsets"]) for k, v in header.items()]
    entries.sort(key=lambda entry: entry.begin)
    if entries and 8 + length + entries[-1].end > size:
        raise CliError(f"{path}: cut off: {8 + length + entries[-1].end:,} bytes expected, {size:,} found")
    return Shard(path, entries, metadata, 8 + length)


def model_shards(folder: Path) -> list[Shard]:
    """The weight files of a model folder, in order."""
    if not folder.is_dir():
        raise CliError(f"{folder}: no such folder")
    if (folder / SINGLE).is_file():
        return [read_header(folder / SINGLE)]
    if not (folder / INDEX).is_file():
        old = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".gguf"))
        hint = f"; {old[0]} has to be converted first (load it with transformers and save it again)" if old else ""
        raise CliError(f"{folder}: neither {SINGLE} nor {INDEX} is there{hint}")
    names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            raise CliError(f"{folder / name}: named in {INDEX}, but not there")
    return [read_header(folder / name) for name in names]


# What is written for a tensor: pieces, each a part of its bytes in order.
Pieces = Callable[[], Iterable[torch.Tensor]]


@dataclass
class Output:
    """One tensor of the new file; without `pieces` it is copied from `source`."""

    name: str
    code: str
    shape: tuple[int, ...]
    source: tuple[Shard, Entry] | None = None
    pieces: Pieces | None = None

    @property
    def nbytes(self) -> int:
        if self.source is not None:
            return self.source[1].end - self.source[1].begin
        count = 1
        for size in self.shape:
            count *= size
        return count * DTYPES[self.code].itemsize


def write_shard(path: Path, outputs: list[Output], metadata: dict[str, str], report: Callable[[str], object]) -> int:
    """Write a safetensors file; returns the bytes of tensor data."""
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    place = 0
    for output in outputs:
        header[output.name] = {
            "dtype": output.code,
            "shape": list(output.shape),
            "data_offsets": [place, place + output.nbytes],
        }
        place += output.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for output in outputs:
            before = file.tell()
            if output.pieces is None:
                _copy(output, file)
            else:
                for piece in output.pieces():
                    file.write(piece.contiguous().view(torch.uint8).reshape(-1).numpy().data)
            if file.tell() - before != output.nbytes:
                raise CliError(
                    f"{path.name}: {output.name}: {file.tell() - before} bytes written, {output.nbytes} meant"
                )
            report(output.name)
    return place


def _copy(output: Output, file: BinaryIO) -> None:
    assert output.source is not None
    shard, entry = output.source
    left = entry.end - entry.begin
    with shard.path.open("rb") as source:
        source.seek(shard.data_start + entry.begin)
        while left:
            block = source.read(min(left, _COPY_BYTES))
            if not block:
                raise CliError(f"{shard.path}: ended inside {entry.name}")
            file.write(block)
            left -= len(block)


def row_reader(shard: Shard, entry: Entry) -> Callable[[int, int], torch.Tensor]:
    """Function that reads rows `[begin, end)` of a tensor and nothing else."""
    assert entry.dtype is not None
    dtype, width = entry.dtype, 1
    for size in entry.shape[1:]:
        width *= size

    def rows(begin: int, end: int) -> torch.Tensor:
        step = width * dtype.itemsize
        with shard.path.open("rb") as file:
            file.seek(shard.data_start + entry.begin + begin * step)
            block = bytearray(file.read((end - begin) * step))
        return torch.frombuffer(block, dtype=dtype).view(end - begin, *entry.shape[1:])

    return rows


@dataclass
class Base:
    """A model folder: its configuration, and where each tensor is."""

    folder: Path
    config: dict[str, Any]
    shards: list[Shard]
    places: dict[str, tuple[Shard, Entry]]

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
    shards = model_shards(folder)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    places = {entry.name: (shard, entry) for shard in shards for entry in shard.entries}
    return Base(folder, config, shards, places)
