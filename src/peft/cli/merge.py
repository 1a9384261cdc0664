# SPDX-License-Identifier: Apache-2.0
"""`peft merge ADAPTER --base FOLDER --out FOLDER`: a plain model folder, made without building the model."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from .errors import CliError


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "merge",
        help="merge an adapter into its base model's files",
        description="Merges an adapter into a folder of safetensors files, tensor by tensor: memory is needed for "
        "the adapter and a few copies of one weight (with low-rank methods, OFT, HRA, IA3: of a few rows), not for the "
        "model.",
    )
    parser.add_argument("adapter", help="folder with adapter_config.json, or a hub id")
    parser.add_argument("--base", type=Path, help="model folder (default: the one that the adapter names)")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the merged model")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .adapter_files import read_adapter
    from .merge_files import merge_into_folder
    from .tensor_files import open_base

    adapter = read_adapter(args.adapter)
    named = adapter.config.get("base_model_name_or_path")
    folder = args.base or Path(named or "")
    if args.base is None and not (named and folder.is_dir()):
        raise CliError(f"--base FOLDER is needed: the adapter names {named!r}, which is no folder here")
    base = open_base(folder)
    start = time.perf_counter()
    with tqdm(total=len(base.places), desc="merging", unit="tensor", leave=False, disable=None) as bar:
        plan = merge_into_folder(adapter, base, args.out, bar.update)
    text = f"{len(plan.merged)} weights merged"
    for what, count in (
        ("biases changed", len(plan.biases)),
        ("tensors replaced", len(plan.replaced)),
        ("tensors added", len(plan.added)),
        ("embeddings with new token rows", len(plan.token_rows)),
    ):
        text += f", {count} {what}" if count else ""
    unchanged = len(base.places) - len(plan.merged) - len({*plan.biases, *plan.replaced, *plan.token_rows})
    print(f"{text}, {unchanged} copied in {time.perf_counter() - start:.1f} s: {args.out}")
    return 0
