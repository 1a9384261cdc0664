# SPDX-License-Identifier: Apache-2.0
"""`peft methods`: what the registry holds."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("methods", help="list the fine-tuning methods")
    parser.add_argument("name", nargs="?", help="show the options of one method")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    return _options(args.name) if args.name else _list()


def _list() -> int:
    from peft.registry import methods

    rows = sorted(((m.name, _kind(m), _merges(m), _title(m)) for m in methods().values()), key=lambda row: row[0])
    width = max(len(row[0]) for row in rows)
    print(f"{'method':{width}}  kind    merges  paper")
    for name, kind, merges, title in rows:
        print(f"{name:{width}}  {kind:6}  {merges:6}  {title}".rstrip())
    print(f"\n{len(rows)} methods; `peft methods NAME` lists the options of one")
    return 0


def _kind(record: Any) -> str:
    return "prompt" if record.is_prompt else "layers" if record.layer is not None else "model"


def _merges(record: Any) -> str:
    from peft.core.layer import WEIGHT_HOOKS

    return "no" if WEIGHT_HOOKS.isdisjoint(getattr(record.layer, "hooks", ())) else "yes"


def _title(record: Any) -> str:
    """The paper: first line of the docstring of the file that defines the method."""
    layer = record.layer if record.layer is not None and record.name in record.layer.__module__ else record.tuner
    text = (sys.modules[layer.__module__].__doc__ or layer.__doc__ or "").strip()
    line = text.splitlines()[0] if text else ""
    return line if len(line) <= 90 else line[:89] + "\u2026"


def _options(name: str) -> int:
    import dataclasses

    from .options import config_class, settable_fields

    cls = config_class(name)
    fields = settable_fields(cls)
    print(f"{cls.__name__}: options for `peft train --method {name.lower()} --set KEY=VALUE`\n")
    for field in dataclasses.fields(cls):
        if field.name not in fields:
            continue
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        line = f"  {field.name} = {_default(field)}  ({kind.replace('typing.', '')})"
        print(line)
        help_text = field.metadata.get("help")
        if help_text:
            print(f"      {' '.join(str(help_text).split())}")
    return 0


def _default(field: Any) -> str:
    import dataclasses

    value = field.default_factory() if field.default is dataclasses.MISSING else field.default
    return str(getattr(value, "value", value))
