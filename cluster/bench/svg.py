"""Plots as SVG text. Colours come from the page's CSS (classes s0, s1, ...), so they follow its theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 44
MAX_TICKS = 6

Points = Sequence[tuple[float, float]]


def plot(series: Sequence[tuple[str, Points]], *, x_label: str, y_label: str, dots: bool = False) -> str:
    """One plot; every axis begins at 0. `series` are named lines, or clouds with `dots`."""
    x_top = _nice_top(max((x for _, points in series for x, _ in points), default=1.0))
    y_top = _nice_top(max((y for _, points in series for _, y in points), default=1.0))

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / x_top
        return across, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y / y_top

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} over {escape(x_label)}">']
    parts += _axes(x_top, y_top, x_label, y_label)
    for index, (name, points) in enumerate(series):
        places = [at(x, y) for x, y in points]
        if dots:
            parts += [f'<circle class="s{index}" cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in places]
        elif places:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline class="s{index}" points="{path}"/>')
        if len(series) > 1:
            y = TOP + 14 + 16 * index
            parts.append(f'<rect class="s{index}" x="{WIDTH - 128}" y="{y - 8}" width="10" height="10"/>')
            parts.append(f'<text x="{WIDTH - 112}" y="{y + 1}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _axes(x_top: float, y_top: float, x_label: str, y_label: str) -> list[str]:
    parts = []
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for value in _ticks(y_top):
        y = floor - (floor - TOP) * value / y_top
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="right" x="{LEFT - 6}" y="{y + 4:.1f}">{value:g}</text>')
    for value in _ticks(x_top):
        x = LEFT + (right - LEFT) * value / x_top
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{floor}"/>')
        parts.append(f'<text class="middle" x="{x:.1f}" y="{floor + 16}">{value:g}</text>')
    middle_y = (TOP + floor) / 2
    parts.append(f'<text class="middle" x="{(LEFT + right) / 2}" y="{HEIGHT - 8}">{escape(x_label)}</text>')
    turn = f"rotate(-90 14 {middle_y})"
    parts.append(f'<text class="middle" x="14" y="{middle_y}" transform="{turn}">{escape(y_label)}</text>')
    return parts


def _nice_top(value: float) -> float:
    """The next 1, 2, 2.5, 5 or 10 times a power of ten that is not below `value`."""
    if not 0 < value < math.inf:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if step * power >= value * (1 - 1e-9))


def _ticks(top: float) -> list[float]:
    power = 10.0 ** math.floor(math.log10(top))
    steps = (step * power / 10 for step in (1, 2, 2.5, 5, 10, 20, 25, 50))
    step = next(step for step in steps if top / step <= MAX_TICKS)
    return [round(index * step, 12) for index in range(int(top / step + 1e-9) + 1)]
