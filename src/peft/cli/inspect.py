# SPDX-License-Identifier: Apache-2.0
"""`peft inspect ADAPTER`: what an adapter is and where it acts, as text or as a page."""

from __future__ import annotations

import argparse
import html
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import check_place, positive

if TYPE_CHECKING:
    from .adapter_files import Adapter, LayerStrength

_EXTRAS = {"use_dora": "DoRA", "use_rslora": "rank-stabilised", "lora_bias": "with bias"}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}: adapter</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #16222e; margin: 2rem auto; max-width: 1080px; padding: 0 1rem }}
h1 {{ font-size: 1.4rem }} h2 {{ font-size: 1.1rem; margin-top: 2rem }}
th {{ text-align: left; font-weight: 600; padding: .15rem 1.5rem .15rem 0; vertical-align: top; white-space: nowrap }}
td {{ overflow-wrap: anywhere }} .wide {{ overflow-x: auto }}
.heat {{ font-size: 12px }} .heat td {{ min-width: 4rem; text-align: center }} .heat th {{ padding: 0 .5rem }}
</style></head><body>
<h1>{title}</h1>
<table>{rows}</table>
<h2>Norm per layer</h2>
<div class=wide>{grid}</div>
{spectra}
</body></html>
"""
_SPECTRA = """<h2>Singular values of each layer's change</h2>
<p>One line a layer, from the first (blue) to the last (red); a line that falls steeply uses few of its ranks.</p>
<div class=wide>{}</div>"""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("inspect", help="show what an adapter is and how strong each layer is")
    parser.add_argument("adapter", help="folder with adapter_config.json, or a hub id")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with pictures, one file")
    parser.add_argument(
        "--width", type=positive, default=None, help="columns of text, by default those of the terminal"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from .adapter_files import read_adapter, strengths  # they need torch, which `peft --version` does without
    from .heatmap import make_grid, text_heatmap

    if args.html:
        check_place("--html", args.html, folder=False)
    adapter = read_adapter(args.adapter)
    layers = strengths(adapter)
    for name, value in facts(adapter, layers).items():
        print(f"{name:11} {value}")
    if layers:
        what = "change of the weight" if any(layer.singular_values for layer in layers) else "adapter's tensors"
        what = "change before DoRA's scaling" if adapter.config.get("use_dora") else what
        print(f"\nnorm of the {what}, per layer\n")
        print(text_heatmap(make_grid(layers), args.width or shutil.get_terminal_size((100, 24)).columns))
    if args.html:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        args.html.write_text(page(adapter, layers), encoding="utf-8")
        print(f"\nwrote {args.html}")
    return 0


def facts(adapter: Adapter, layers: list[LayerStrength]) -> dict[str, str]:
    """The table at the top."""
    config, tensors = adapter.config, adapter.tensors.values()
    targets = config.get("target_modules")
    if not isinstance(targets, str | None):
        counts = Counter(str(name) if len(targets) <= 8 else str(name).rpartition(".")[2] for name in targets)
        targets = ", ".join(name if count == 1 else f"{name} x{count}" for name, count in sorted(counts.items()))
    extras = [label for key, label in _EXTRAS.items() if config.get(key)]
    ranks = sorted({layer.rank for layer in layers if layer.rank is not None})
    dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
    size = sum(t.nbytes for t in tensors) / 2**20
    rows = {
        "method": adapter.method + (f" ({', '.join(extras)})" if extras else ""),
        "base": str(config.get("base_model_name_or_path") or "not named"),
        "task": str(config.get("task_type") or "-"),
        "targets": targets or ", ".join(config.get("target_parameters") or ()) or "-",
        "rank": " to ".join(map(str, dict.fromkeys([ranks[0], ranks[-1]]))) if ranks else str(config.get("r", "-")),
        "scaling": _scaling(config),
        "parameters": f"{sum(t.numel() for t in tensors):,} ({size:.2f} MiB, {dtypes}) in {len(tensors)} tensors",
        "layers": str(len(layers)),
        "written by": f"peft {adapter.version or '(version not named)'}",
    }
    bad = [name for name, tensor in adapter.tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        rows["WARNING"] = f"{len(bad)} tensors have values that are not finite, the first is {bad[0]}"
    return rows


def _scaling(config: dict[str, Any]) -> str:
    alpha, rank = config.get("lora_alpha"), config.get("r")
    if not isinstance(alpha, int | float) or not isinstance(rank, int) or rank < 1:
        return "-"
    varied = config.get("rank_pattern") or config.get("alpha_pattern")
    note = ", varied by rank_pattern or alpha_pattern" if varied else ""
    return f"{alpha / (rank**0.5 if config.get('use_rslora') else rank):g} (alpha {alpha:g}{note})"


def page(adapter: Adapter, layers: list[LayerStrength]) -> str:
    """One self-contained HTML file."""
    from .heatmap import html_heatmap, make_grid, svg_spectra

    rows = facts(adapter, layers).items()
    spectra = svg_spectra(layers)
    return _PAGE.format(
        title=html.escape(adapter.folder.resolve().name),
        rows="".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows),
        grid=html_heatmap(make_grid(layers)) if layers else "<p>no tensors</p>",
        spectra=_SPECTRA.format(spectra) if spectra else "",
    )
