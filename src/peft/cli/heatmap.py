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


def _colour(share: float) -> str:
    """White to deep blue."""
    low, high = (247, 250, 253), (20, 72, 130)
    mix = [round(a + (b - a) * min(max(share, 0.0), 1.0) ** 0.7) for a, b in zip(low, high, strict=True)]
    return f"rgb({mix[0]},{mix[1]},{mix[2]})"


def svg_heatmap(grid: Grid) -> str:
    """The grid as inline SVG; every cell has its numbers as a tooltip."""
    cell_w, cell_h = 74, 20
    left = 12 + 7 * max([len(row) for row in grid.rows] + [3])
    head = 14 + 6 * max(len(column) for column in grid.columns)
    width, height = left + cell_w * len(grid.columns) + head // 2 + 10, head + cell_h * len(grid.rows) + 8
    out = [_svg_open(width, height, "norm of the change of each layer")]
    for x, column in enumerate(grid.columns):
        cx = left + x * cell_w + cell_w / 2
        out.append(f'<text transform="translate({cx:.0f},{head - 6}) rotate(-40)">{html.escape(column)}</text>')
    for y, row in enumerate(grid.rows):
        top = head + y * cell_h
        out.append(f'<text x="{left - 6}" y="{top + 14}" text-anchor="end">{html.escape(row)}</text>')
        for x, column in enumerate(grid.columns):
            value = grid.values.get((row, column))
            if value is None:
                continue
            share = value / grid.top if math.isfinite(value) else 1.0
            colour = _colour(share) if math.isfinite(value) else "#c4561b"
            ink = "#fff" if share > 0.4 else "#123"
            title = html.escape(f"{row}.{column}".strip(".") + f": {value:.6g}")
            out.append(
                f'<g><title>{title}</title><rect x="{left + x * cell_w}" y="{top}" width="{cell_w - 2}" '
                f'height="{cell_h - 2}" rx="2" fill="{colour}"/><text x="{left + x * cell_w + cell_w / 2 - 1:.0f}" '
                f'y="{top + 13}" text-anchor="middle" fill="{ink}">{value:.3g}</text></g>'
            )
    return "".join(out) + "</svg>"


def _svg_open(width: float, height: float, label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" viewBox="0 0 {width:.0f} '
        f'{height:.0f}" width="{width:.0f}" height="{height:.0f}" font-family="system-ui,sans-serif" font-size="11">'
    )


def svg_spectra(layers: list[LayerStrength]) -> str:
    """Singular values of each layer's change, sorted, one line a layer, coloured by depth; log scale."""
    spectra = [(layer.module, [v for v in layer.singular_values if v > 0]) for layer in layers]
    spectra = [(module, values) for module, values in spectra if values]
    if not spectra:
        return ""
    top = max(values[0] for _, values in spectra)
    floor = max(min(values[-1] for _, values in spectra), top * 1e-6)
    low, high = math.log10(floor), math.log10(top)
    low = low if high - low > 1e-9 else high - 1
    longest = max(len(values) for _, values in spectra)
    left, width, height, pad = 58, 640, 300, 26
    out = [_svg_open(left + width + 16, height + 2 * pad + 20, "singular values of each layer")]
    for tick in range(math.floor(low), math.ceil(high) + 1):
        if low <= tick <= high:
            y = pad + (high - tick) / (high - low) * height
            out.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e3e8ee"/>')
            out.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">1e{tick}</text>')
    for index, (module, values) in enumerate(spectra):
        hue = 210 + 130 * index / max(1, len(spectra) - 1)
        points = " ".join(
            f"{left + width * i / max(1, longest - 1):.1f},"
            f"{pad + (high - max(math.log10(v), low)) / (high - low) * height:.1f}"
            for i, v in enumerate(values)
        )
        colour = f"hsl({hue:.0f},60%,45%)"
        mark = f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-opacity=".55"/>'
        if len(values) == 1:
            x, y = points.split(",")
            mark = f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>'
        out.append(f"<g><title>{html.escape(module)}: {values[0]:.4g} to {values[-1]:.4g}</title>{mark}</g>")
    below = f'x="{left + width / 2}" y="{height + 2 * pad + 4}" text-anchor="middle"'
    out.append(f"<text {below}>index (1 to {longest})</text>")
    return "".join(out) + "</svg>"
