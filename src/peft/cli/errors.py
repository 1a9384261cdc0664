# SPDX-License-Identifier: Apache-2.0
"""Errors that are the user's to fix: printed as one line, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CliError(Exception):
    """A message for the person at the terminal."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the closest allowed name, or nothing."""
    hits = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f", did you mean '{hits[0]}'?" if hits else ""
