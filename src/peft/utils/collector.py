# SPDX-License-Identifier: Apache-2.0
"""Python's garbage collector, and when it has nothing to find."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Many new objects that all stay (layers, modules of Python) would make the garbage collector walk them, and all of
    torch with them, again and again: it waits, and then counts them among the old ones.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() == 0:  # freezing and thawing moves everything to the oldest generation, unwalked
            gc.freeze()
            gc.unfreeze()
        gc.enable()
