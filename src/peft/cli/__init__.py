# SPDX-License-Identifier: Apache-2.0
"""The `peft` command: argument parsing and presentation, the work is done by the library.

Every command is a module with `register(subparsers)` and `run(args) -> int`; heavy packages are imported when a
command runs, so that help and errors come at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from ..version import __version__
from . import inspect, merge, methods, train
from .errors import CliError, Parser

COMMANDS = (train, methods, inspect, merge)


def version_text() -> str:
    """Say which API version this is and that it is Inlay, not the package of the same name."""
    api, _, local = __version__.partition("+")
    return f"peft {api} (Inlay {local.removeprefix('inlay.')}, a drop-in for peft {api})"


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="peft",
        description="Inlay: fine-tune a model by training small added parts.",
        epilog="`peft train` without options fine-tunes a small language model on this machine and reports.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for command in COMMANDS:
        command.register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    name = f"peft {args.command}" if args.command else "peft"
    with_place, warnings.formatwarning = warnings.formatwarning, _format_warning
    try:
        code = _run(args, parser)
        sys.stdout.flush()  # what cannot be written shows here, not when the interpreter ends
        return code
    except CliError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `peft inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # no permission, disk full
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    finally:
        warnings.formatwarning = with_place


def _run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if args.version:
        print(version_text())
    elif args.command is None:
        parser.print_help()
    else:
        return args.run(args)
    return 0


def _format_warning(message: Warning | str, *place: object) -> str:
    """Without the line of code, which says nothing to the person at the terminal."""
    return f"warning: {message}\n"
