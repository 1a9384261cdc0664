# SPDX-License-Identifier: Apache-2.0
"""Errors that are the user's to fix: printed as one line, without a traceback."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn


class CliError(Exception):
    """A message for the person at the terminal."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the closest allowed name, or nothing."""
    hits = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f", did you mean '{hits[0]}'?" if hits else ""


def number(kind: type, expected: str, ok: Callable[[Any], bool]) -> Callable[[str], Any]:
    """What argparse reads an option with: numbers that are `ok`."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not ok(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return value

    return read


positive = number(int, "a positive whole number", lambda value: value > 0)


def check_place(option: str, path: Path, folder: bool) -> None:
    """Whether a folder, or a file, can be written to a path that may not exist yet; found out before the work."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if there == path and there.is_dir() != folder:
        is_, not_ = ("file", "folder") if folder else ("folder", "file")
        raise CliError(f"{option} {path}: is a {is_}, expected a {not_}")
    if there != path and not there.is_dir():
        raise CliError(f"{option} {path}: {there} is a file")
    if not os.access(there, os.W_OK):
        raise CliError(f"{option} {path}: no permission to write in {there}")


class Parser(argparse.ArgumentParser):
    """Names the nearest command, choice or option where one is misspelled; commands get parsers of this class too."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        unknown = next((a.partition("=")[0] for a in rest if a.startswith("-")), "")
        if unknown:  # else the parser of all commands reports, which does not know the options of one
            self.error(f"unrecognized arguments: {' '.join(rest)}{nearest(unknown, self._option_string_actions)}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        super().error(message + (nearest(choice[1], re.findall(r"[\w.-]+", choice[2])) if choice else ""))
