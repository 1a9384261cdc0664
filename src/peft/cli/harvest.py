# SPDX-License-Identifier: Apache-2.0
"""Real training pairs that every machine has: function signatures of the standard library and their docstrings.

A pair is (module and signature, first line of the docstring), read with `ast` from the source files of the running
interpreter; nothing is imported. The held-out part consists of whole top-level modules.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import CliError

_SKIP = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "ensurepip",
    "pydoc_data", "turtledemo", "__phello__", "_vendor",
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """One function: where it lives, how it is called, what it says about itself."""

    module: str
    signature: str
    summary: str

    @property
    def prompt(self) -> str:
        return f'# {self.module}\ndef {self.signature}:\n    """'

    @property
    def completion(self) -> str:
        return self.summary + '"""'


def harvest(root: Path | None = None, max_signature: int = 160, max_summary: int = 160) -> list[Pair]:
    """All pairs under `root` (default: the interpreter's standard library), in a fixed order, without repetitions."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    seen: set[tuple[str, str]] = set()
    pairs: list[Pair] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _SKIP.intersection(parts):
            continue
        for pair in _pairs_in(path, ".".join(parts).removesuffix(".py").removesuffix(".__init__")):
            key = (pair.signature, pair.summary)
            if len(pair.signature) <= max_signature and len(pair.summary) <= max_summary and key not in seen:
                seen.add(key)
                pairs.append(pair)
    if not pairs:
        raise CliError(f"no documented functions under {root}: this interpreter has no library sources, pass --data")
    return pairs


def split(pairs: list[Pair], fraction: float = 0.1) -> tuple[list[Pair], list[Pair]]:
    """Train and held-out pairs; a top-level module is wholly in one of them.

    Modules are taken in the order of a hash of their names until `fraction` of the pairs is held out; one that is
    too large for the rest is passed over, so that the share does not depend on where the giants fall.
    """
    by_module: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_module.setdefault(pair.module.split(".")[0], []).append(pair)
    room = int(len(pairs) * fraction)
    chosen: set[str] = set()
    for module in sorted(by_module, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if len(by_module[module]) <= room:
            chosen.add(module)
            room -= len(by_module[module])
    train = [pair for module, group in by_module.items() if module not in chosen for pair in group]
    held_out = [pair for module, group in by_module.items() if module in chosen for pair in group]
    return train, held_out


def _pairs_in(path: Path, module: str) -> Iterator[Pair]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources have invalid escapes
            tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (ast.get_docstring(node) or "").strip().splitlines()
            summary = lines[0].strip() if lines else ""
            if len(summary.split()) >= 3 and summary.isascii():
                yield Pair(module, f"{node.name}({ast.unparse(node.args)})", summary)
