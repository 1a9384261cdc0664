# SPDX-License-Identifier: Apache-2.0
"""Addresses without eager imports (PEP 562): a table name -> module that owns it becomes a module's `__getattr__`."""

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from .collector import without_collector


def _imported(name: str) -> ModuleType:
    if name in sys.modules:
        return importlib.import_module(name)  # waits where another thread is still importing it
    with without_collector():
        return importlib.import_module(name)


class _LazyModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(_imported(self.__name__), name)


def lazy_module(name: str) -> ModuleType:
    """A stand-in for module `name`, which is imported when something of it is asked for."""
    return _LazyModule(name)


def owners(table: Mapping[str, str | Iterable[str]]) -> dict[str, str]:
    """Turn {module: "name name ..."} into {name: module}."""
    names = {}
    for module, listed in table.items():
        for name in listed.split() if isinstance(listed, str) else listed:
            names[name] = module
    return names


def lazy_attributes(
    module_name: str, homes: Mapping[str, str], submodules: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for a module whose names live elsewhere.

    `homes` maps a name to the absolute module that owns it, or to "module:name" where it is called differently there. A
    name that its owner lacks raises AttributeError, as any missing name does, so `hasattr`, `from x import y` and
    introspection work. Resolved names are stored in the module.
    """
    subs = frozenset(submodules)

    def __getattr__(name: str) -> Any:
        if name in subs:
            return _imported(f"{module_name}.{name}")
        home = homes.get(name)
        if home is None:
            raise AttributeError(f"module {module_name!r} has no attribute {name!r}")
        home, _, owned_name = home.partition(":")
        try:
            value = getattr(_imported(home), owned_name or name)
        except ModuleNotFoundError as error:
            if not f"{home}.".startswith(f"{error.name}."):
                raise  # a dependency of the owner is missing: say which one
            raise AttributeError(f"module {module_name!r} has no attribute {name!r}: there is no {home!r}") from error
        setattr(sys.modules[module_name], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[module_name]), *homes, *subs})

    return __getattr__, __dir__
