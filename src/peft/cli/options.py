# SPDX-License-Identifier: Apache-2.0
"""`--method` and `--set key=value`: from text to a config object, typed by the config's own dataclass fields."""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Sequence
from typing import Any

from .errors import CliError, nearest

_FIXED = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "inference_mode"}
_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
_NONE = {"none", "null"}


def method_configs() -> dict[str, type]:
    """Registered methods by lower-case name."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    return {str(getattr(kind, "value", kind)).lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def config_class(method: str) -> type:
    configs = method_configs()
    found = configs.get(method.lower())
    if found is None:
        raise CliError(f"unknown method '{method}'{nearest(method.lower(), configs)} `peft methods` lists them all.")
    return found


def settable_fields(cls: type) -> dict[str, Any]:
    """Field name -> type of everything the user may set."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints.get(f.name, Any) for f in dataclasses.fields(cls) if f.init and f.name not in _FIXED}


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
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _loose(text)
    if origin is typing.Union or isinstance(hint, types.UnionType):
        return _convert_union(text, args)
    if origin is typing.Literal:
        for choice in args:
            if text == str(choice) or (isinstance(choice, bool) and text.lower() == str(choice).lower()):
                return choice
        raise ValueError(f"expected one of {', '.join(map(str, args))}")
    if hint is type(None):
        if text.lower() in _NONE:
            return None
        raise ValueError("expected none")
    if origin in (list, set, tuple) or hint in (list, set, tuple):
        return _convert_sequence(text, origin or hint, args)
    if origin is dict or hint is dict:
        value = _json(text)
        if not isinstance(value, dict):
            raise ValueError('expected a JSON object such as {"q_proj": 4}')
        return value
    return _convert_scalar(text, hint)


def _convert_scalar(text: str, hint: Any) -> Any:
    if hint is bool:
        if text.lower() in _TRUE | _FALSE:
            return text.lower() in _TRUE
        raise ValueError("expected true or false")
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError as error:
            raise ValueError(f"expected {'a whole number' if hint is int else 'a number'}") from error
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        for member in hint:
            if text.lower() in (str(member.value).lower(), member.name.lower()):
                return member
        raise ValueError(f"expected one of {', '.join(str(m.value) for m in hint)}")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        value = _json(text)
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object with fields of {hint.__name__}")
        known = {f.name for f in dataclasses.fields(hint)}
        for key in value:
            if key not in known:
                raise ValueError(f"{hint.__name__} has no field '{key}'{nearest(key, known)}")
        return hint(**value)
    return text if hint is str else _loose(text)


def _convert_union(text: str, args: tuple[Any, ...]) -> Any:
    """First alternative that takes the text, strings last: 'none' -> None, 'true' -> bool, '4' -> int."""
    has_list = any((typing.get_origin(a) or a) in (list, set, tuple) for a in args)
    if has_list and not ("," in text or text.startswith("[")) and str in args:
        return None if text.lower() in _NONE and type(None) in args else text
    rank = {type(None): 0, bool: 1, int: 2, float: 3, str: 9}
    problem = "no alternative fits"
    for hint in sorted(args, key=lambda a: rank.get(a, 5)):
        if hint is bool and text in ("0", "1") and (int in args or float in args):
            continue
        try:
            return convert(text, hint)
        except ValueError as error:
            problem = str(error) if hint is not type(None) else problem
    raise ValueError(problem)


def _convert_sequence(text: str, kind: Any, args: tuple[Any, ...]) -> Any:
    if text.startswith("["):
        value = _json(text)
        if not isinstance(value, list):
            raise ValueError("expected a list")
        return kind(value)
    element = next((a for a in args if a is not Ellipsis), str)
    return kind(convert(part.strip(), element) for part in text.split(",") if part.strip())


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno})") from error


def _loose(text: str) -> Any:
    if text.lower() in _NONE:
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
