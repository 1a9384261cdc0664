# SPDX-License-Identifier: Apache-2.0
"""`--method` and `--set key=value`: from text to a config object, typed by the config's own dataclass fields."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from .errors import CliError, nearest

FIXED = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "inference_mode"}
_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def config_class(method: str) -> type:
    from peft.registry import methods

    configs = {record.name: record.config for record in methods().values()}
    found = configs.get(method.lower())
    if found is None:
        raise CliError(f"unknown method '{method}'{nearest(method.lower(), configs)} `peft methods` lists them all.")
    return found


def settable_fields(cls: type) -> dict[str, Any]:
    """Field name -> type of everything the user may set."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints.get(f.name, Any) for f in dataclasses.fields(cls) if f.init and f.name not in FIXED}


def parse_assignments(cls: type, pairs: Sequence[str]) -> dict[str, Any]:
    """`["r=4", "target_modules=q_proj,v_proj"]` -> `{"r": 4, "target_modules": ["q_proj", "v_proj"]}`."""
    fields = settable_fields(cls)
    values: dict[str, Any] = {}
    for pair in pairs:
        key, sep, text = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not sep:
            raise CliError(f"--set {pair}: expected key=value")
        if key not in fields:
            raise CliError(f"--set {pair}: {cls.__name__} has no option '{key}'{nearest(key, fields)}")
        try:
            values[key] = convert(text.strip(), fields[key])
        except ValueError as error:
            raise CliError(f"--set {pair}: {error}") from error
    return values


def convert(text: str, hint: Any) -> Any:
    """Read `text` as a value of type `hint`; ValueError says what was expected."""
    kind, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return _first_that_fits(text, args)
    if kind is typing.Literal:
        return _one_of(text, {str(choice): choice for choice in args})
    if kind is bool:
        return _one_of(text, _BOOLS, "true or false")
    if kind is type(None):
        return _one_of(text, dict.fromkeys(("none", "null")))
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError as error:
            raise ValueError(f"expected {'a whole number' if kind is int else 'a number'}") from error
    if kind in (list, set, tuple):
        if text.startswith("["):
            return kind(_json(text, list))
        element = args[0] if args else str
        return kind(convert(part.strip(), element) for part in text.split(",") if part.strip())
    if kind is dict:
        return _json(text, dict)
    if dataclasses.is_dataclass(kind):
        return _record(kind, text)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _one_of(text, {str(member.value): member for member in kind})
    return text


def _first_that_fits(text: str, hints: Sequence[Any]) -> Any:
    """First alternative that takes the text, the most special first: 'none' -> None, 'true' -> bool, '4' -> int.

    Where both are allowed, names are a list of names, and anything else ('all-linear', a pattern) is a string.
    """
    lists = [hint for hint in hints if (typing.get_origin(hint) or hint) in (list, set, tuple)]
    if lists and str in hints and not re.fullmatch(r"\[.*|[\w.]+|.*,.*", text, re.DOTALL):
        hints = [hint for hint in hints if hint not in lists]
    rank = {type(None): 0, bool: 1, int: 2, float: 3, str: 9}
    problem = ""
    for hint in sorted(hints, key=lambda hint: rank.get(hint, 5)):
        try:
            return convert(text, hint)
        except ValueError as error:
            problem = str(error)
    raise ValueError(problem)


def _one_of(text: str, words: dict[str, Any], allowed: str = "") -> Any:
    for word, value in words.items():
        if re.fullmatch(re.sub(r"\[.*\]", ".+", word), text, re.IGNORECASE):  # 'pissa_niter_[number of iters]'
            return text if "[" in word else value
    raise ValueError(f"expected {allowed or 'one of ' + ', '.join(words)}")


def _json(text: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(value, kind):
        raise ValueError(f"expected a JSON {'list' if kind is list else 'object'}")
    return value


def _record(cls: Any, text: str) -> Any:
    value = _json(text, dict)
    known = [field.name for field in dataclasses.fields(cls)]
    for key in value:
        if key not in known:
            raise ValueError(f"{cls.__name__} has no field '{key}'{nearest(key, known)}")
    return cls(**value)
