# SPDX-License-Identifier: Apache-2.0
"""The methods, one file (or folder) each. Names are resolved on first use through the registry."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    from .. import registry

    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as exc:
        if exc.name != f"{__name__}.{name}":
            raise
    for record in registry.methods().values():
        for cls in (record.config, record.tuner):
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
