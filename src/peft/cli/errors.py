# SPDX-License-Identifier: Apache-2.0
"""Errors that are the user's to fix: printed as one line, without a traceback."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn


class CliError(Exception):
    """A message for the person at the terminal."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the closest allowed name, or nothing."""
    hits = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f", did you mean '{hits[0]}'?" if hits else ""


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
