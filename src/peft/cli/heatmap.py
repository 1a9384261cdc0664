# SPDX-License-Identifier: Apache-2.0
"""Layer norms on a grid: one row per block of the model, one column per kind of module."""

from __future__ import annotations

import html
import math
import re
from dataclasses import dataclass

from .adapter_files import LayerStrength

_SHADES = " \u2591\u2592\u2593\u2588"


@dataclass
class Grid:
    rows: list[str]
    columns: list[str]
    values: dict[tuple[str, str], float]

    @property
    def top(self) -> float:
        return max((v for v in self.values.values() if math.isfinite(v)), default=0.0) or 1.0


def make_grid(layers: list[LayerStrength]) -> Grid:
    """`model.layers.3.self_attn.q_proj` -> row `model.layers.3`, column `self_attn.q_proj`."""
    rows: dict[str, None] = {}
    columns: dict[str, None] = {}
    values: dict[tuple[str, str], float] = {}
    for layer in layers:
        match = re.match(r"^(?P<row>.*?\.?\d+)\.(?P<column>.+)$", layer.module)
        row, column = (match["row"], match["column"]) if match else ("", layer.module)
        rows.setdefault(row)
        columns.setdefault(column)
        values[row, column] = layer.norm
    return Grid(sorted(rows, key=_natural), list(columns), values)


def _natural(text: str) -> list[tuple[int, int, str]]:
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", text)]


def text_heatmap(grid: Grid, width: int = 100) -> str:
    """Shaded cells with the norm beside; columns that do not fit go to a further table."""
    label = max([len(row) for row in grid.rows] + [5])
    cell = 9
    per_table = max(1, (width - label) // (cell + 1))
    tables = []
    for start in range(0, len(grid.columns), per_table):
        part = grid.columns[start : start + per_table]
        heads = [_short(column, cell) for column in part]
        lines = [" " * label + " " + " ".join(f"{head:>{cell}}" for head in heads)]
        for row in grid.rows:
            cells = [_cell(grid.values.get((row, column)), grid.top, cell) for column in part]
            if any(text.strip() for text in cells):
                lines.append(f"{row:<{label}} " + " ".join(cells))
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _cell(value: float | None, top: float, width: int) -> str:
    if value is None:
        return " " * width
    if not math.isfinite(value):
        return f"{'!' + str(value):>{width}}"
    shade = _SHADES[min(4, math.ceil(4 * value / top))] if value > 0 else _SHADES[0]
    return f"{shade * 2} {value:{width - 3}.3g}"


def _short(column: str, width: int) -> str:
    leaf = column.rpartition(".")[2]
    return leaf if len(leaf) <= width else leaf[: width - 1] + "\u2026"


def html_heatmap(grid: Grid) -> str:
    """The grid as a table; every cell has its place and value as a tooltip."""
    lines = ["<tr><th/>" + "".join(f"<th>{html.escape(column)}</th>" for column in grid.columns) + "</tr>"]
    for row in grid.rows:
        cells = (_html_cell(row, column, grid) for column in grid.columns)
        lines.append(f"<tr><th>{html.escape(row)}</th>{''.join(cells)}</tr>")
    return '<table class="heat">\n' + "\n".join(lines) + "\n</table>"


def _html_cell(row: str, column: str, grid: Grid) -> str:
    value = grid.values.get((row, column))
    if value is None:
        return "<td/>"
    share = (value / grid.top) ** 0.7 if math.isfinite(value) else 1.0
    colour = f"hsl(212,70%,{97 - 67 * share:.0f}%)" if math.isfinite(value) else "#c4561b"
    title = html.escape(f"{row}.{column}".strip(".") + f": {value:.6g}")
    ink = "#fff" if share > 0.5 else "#123"
    return f'<td style="background:{colour};color:{ink}" title="{title}">{value:.3g}</td>'


def svg_spectra(layers: list[LayerStrength]) -> str:
    """Singular values of each layer's change, sorted, one line a layer, coloured by depth; log scale."""
    spectra = {layer.module: [v for v in layer.singular_values if v > 0] for layer in layers}
    spectra = {module: values for module, values in spectra.items() if values}
    if not spectra:
        return ""
    top = max(values[0] for values in spectra.values())
    high, low = math.log10(top), math.log10(max(min(values[-1] for values in spectra.values()), top * 1e-6))
    low = min(low, high - 1)
    longest = max(map(len, spectra.values()))
    left, width, height, pad = 58, 640, 300, 26

    def y(log: float) -> float:
        return pad + (high - max(log, low)) / (high - low) * height

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="singular values of each layer" '
        f'width="{left + width + 16}" height="{height + 2 * pad + 20}" font-family="system-ui,sans-serif" '
        'font-size="11" fill="none" stroke-width="1.5" stroke-linecap="round">'
    ]
    for tick in range(math.ceil(low), math.floor(high) + 1):
        out.append(f'<path d="M{left} {y(tick):.1f}h{width}" stroke="#e3e8ee"/>')
        out.append(f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end" fill="#123">1e{tick}</text>')
    for index, (module, values) in enumerate(spectra.items()):
        hue = 210 + 130 * index / max(1, len(spectra) - 1)
        points = [f"{left + width * i / max(1, longest - 1):.1f},{y(math.log10(v)):.1f}" for i, v in enumerate(values)]
        points = " ".join(points if len(values) > 1 else 2 * points)  # a line without length shows its round ends
        title = f"{html.escape(module)}: {values[0]:.4g} to {values[-1]:.4g}"
        line = f'<polyline points="{points}" stroke="hsl({hue:.0f},60%,45%)" stroke-opacity=".55"/>'
        out.append(f"<g><title>{title}</title>{line}</g>")
    middle = f'x="{left + width / 2}" y="{height + 2 * pad + 4}" text-anchor="middle" fill="#123"'
    return "\n".join([*out, f"<text {middle}>index (1 to {longest})</text></svg>"])
