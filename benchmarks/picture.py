"""Draws results as one SVG picture, light or dark as the reader likes it. It takes nothing but the standard library."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

from benchmarks.bounds import Bound, bounds
from benchmarks.contestant import CONTESTANTS
from benchmarks.figures import Results, per_stage, stages

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.cases import Case

__all__ = ["draw"]

WIDTH = 780
PANEL = (390, 330)
PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM = 54, 244, 34, 288
LABEL = 258
ROW = 22

LIGHT = {
    "back": "#ffffff",
    "ink": "#1f2328",
    "soft": "#59636e",
    "line": "#d8dee4",
    "ours": "#c2410c",
    "peer": "#2f6eb5",
    "floor": "#6e7781",
    "well": "#1a7f37",
    "ill": "#cf222e",
}
DARK = {
    "back": "#131416",
    "ink": "#e6e8eb",
    "soft": "#9aa4af",
    "line": "#33383e",
    "ours": "#fb923c",
    "peer": "#7fb2e5",
    "floor": "#9aa4af",
    "well": "#4ac26b",
    "ill": "#ff7b72",
}
SHAPES = """
text { font: 11px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif }
.title { font-weight: 600; font-size: 13px }
.end { text-anchor: end }
.middle { text-anchor: middle }
.grid { stroke-width: 1 }
.limit { stroke-width: 1.5 }
.lead { stroke-width: .6; fill: none; stroke-dasharray: 1 2 }
.series { fill: none; stroke-width: 1.4 }
.series.ours { stroke-width: 3 }
.series.floor { stroke-dasharray: 5 3 }
.series.scheduler { stroke-dasharray: 2 2 }
text.ours { font-weight: 700 }
"""


def _colours(theme: dict[str, str]) -> str:
    """Colours as rules, and not as variables, which not everything that shows pictures knows."""
    rules = [
        f"text {{ fill: {theme['ink']} }} text.soft {{ fill: {theme['soft']} }} .back {{ fill: {theme['back']} }}",
        f".grid {{ stroke: {theme['line']} }} .lead {{ stroke: {theme['soft']} }} .limit {{ stroke: {theme['ink']} }}",
    ]
    for name, colour in (("scheduler", "peer"), *((name, name) for name in ("ours", "peer", "floor", "well", "ill"))):
        it = theme[colour]
        rules.append(f".series.{name} {{ stroke: {it} }} .dot.{name}, .bar.{name}, text.{name} {{ fill: {it} }}")
    return "\n".join(rules)


@dataclass(frozen=True)
class Series:
    """The points of one contestant: number of stages, µs per stage."""

    key: str
    points: Sequence[tuple[float, float]]

    @property
    def role(self) -> str:
        return CONTESTANTS[self.key].role

    @property
    def title(self) -> str:
        return CONTESTANTS[self.key].title


def draw(results: Results) -> str:
    """Draw the growth of the cost per stage on three shapes, the diamond, and the bounds."""
    panels = [
        (name, _series(results, shape))
        for name, shape in (
            ("Chain", "chain"),
            ("Fan-out and fan-in", "fan"),
            ("Layers, three random inputs", "layered"),
        )
    ]
    diamond = _one_by_one(results)
    low, high = _decades([y for _, series in [*panels, ("", diamond)] for each in series for _, y in each.points])
    rows = [bound for bound in bounds(results) if bound.found is not None]
    height = 2 * PANEL[1] + 70 + ROW * len(rows)
    body: list[str] = []
    for number, (name, series) in enumerate(panels):
        body += _placed(number, _growth(name, series, low, high))
    body += _placed(3, _dots("Five-stage diamond, one after the other", diamond, low, high))
    body += [f'<g transform="translate(0 {2 * PANEL[1]})">', *_bars(rows), "</g>"]
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="What a stage costs">',
            f"<style>{SHAPES}{_colours(LIGHT)}",
            f"@media (prefers-color-scheme: dark) {{\n{_colours(DARK)}\n}}</style>",
            f'<rect class="back" width="{WIDTH}" height="{height}" rx="8"/>',
            *body,
            "</svg>",
            "",
        ]
    )


def _series(results: Results, shape: str) -> list[Series]:
    cases = sorted(
        (case for case in results.cases if _plain(case) and case.shape == shape and case.at_once == 1),
        key=lambda case: case.size,
    )
    series = [Series(key, list(_points(results, cases, key))) for key in CONTESTANTS]
    return [each for each in series if each.points]


def _plain(case: Case) -> bool:
    return case.measure == "time" and case.body == "return" and case.gc


def _points(results: Results, cases: Sequence[Case], key: str) -> Iterator[tuple[float, float]]:
    for case in cases:
        found = results.spread(case.key, key)
        if found is not None:
            yield stages(case), found.median * per_stage(case)


def _one_by_one(results: Results) -> list[Series]:
    return sorted(_series(results, "diamond"), key=lambda each: each.points[0][1])


def _decades(values: Sequence[float]) -> tuple[int, int]:
    if not values:
        return 0, 1
    return math.floor(math.log10(min(values))), max(math.ceil(math.log10(max(values))), 1)


def _placed(number: int, drawn: Iterator[str]) -> list[str]:
    x, y = number % 2 * PANEL[0], number // 2 * PANEL[1]
    return [f'<g transform="translate({x} {y})">', *drawn, "</g>"]


def _text(x: float, y: float, words: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str = "grid") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def _dot(x: float, y: float, role: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3.5 if role == "ours" else 2.3}" class="dot {role}"/>'


def _duration(decade: int) -> str:
    microseconds = 10.0**decade
    return f"{microseconds:g} µs" if microseconds < 1000 else f"{microseconds / 1000:g} ms"


def _growth(name: str, series: Sequence[Series], low: int, high: int) -> Iterator[str]:
    """A panel of lines: µs per stage over the number of stages."""

    def at(stage_count: float, cost: float) -> tuple[float, float]:
        x = PLOT_LEFT + (math.log10(stage_count) - 1) / 3.02 * (PLOT_RIGHT - PLOT_LEFT)
        y = PLOT_BOTTOM - (math.log10(cost) - low) / (high - low) * (PLOT_BOTTOM - PLOT_TOP)
        return x, y

    yield _text(12, 20, name, "title")
    for decade in range(low, high + 1):
        _, y = at(10, 10.0**decade)
        yield _line(PLOT_LEFT, y, PLOT_RIGHT, y)
        yield _text(PLOT_LEFT - 5, y + 4, _duration(decade), "soft end")
    for decade in range(1, 5):
        x, _ = at(10.0**decade, 10.0**low)
        yield _line(x, PLOT_TOP, x, PLOT_BOTTOM)
        yield _text(x, PLOT_BOTTOM + 15, f"{10**decade:,}", "soft middle")
    yield _text((PLOT_LEFT + PLOT_RIGHT) / 2, PLOT_BOTTOM + 30, "stages; CPU time per stage", "soft middle")
    # Ours comes last, and so lies on top.
    in_order = sorted(series, key=lambda each: each.role == "ours")
    heights = _apart([at(*each.points[-1])[1] for each in in_order])
    for each, height in zip(in_order, heights, strict=True):
        places = [at(*point) for point in each.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        yield f'<polyline points="{path}" class="series {each.role}"/>'
        for x, y in places:
            yield _dot(x, y, each.role)
        yield _line(places[-1][0] + 4, places[-1][1], LABEL - 3, height, "lead")
        yield _text(LABEL, height + 4, each.title, each.role)


def _apart(heights: Sequence[float], least: float = 13) -> list[float]:
    """Move labels just so far that none covers another, and all stay in the panel."""
    order = sorted(range(len(heights)), key=lambda number: heights[number])
    moved = list(heights)
    for before, number in pairwise(order):
        moved[number] = max(moved[number], moved[before] + least)
    bottom = PLOT_BOTTOM + 3.0  # clear of the axis
    for number in reversed(order):
        moved[number] = min(moved[number], bottom)
        bottom = moved[number] - least
    return moved


def _dots(name: str, series: Sequence[Series], low: int, high: int) -> Iterator[str]:
    """A panel of one dot per contestant, from cheap to dear."""
    left, right = 150, PANEL[0] - 46

    def at(cost: float) -> float:
        return left + (math.log10(cost) - low) / (high - low) * (right - left)

    yield _text(12, 20, name, "title")
    step = min((PLOT_BOTTOM - PLOT_TOP) / max(len(series), 1), ROW)
    bottom = PLOT_TOP + step * len(series)
    for decade in range(low, high + 1):
        yield _line(at(10.0**decade), PLOT_TOP - 4, at(10.0**decade), bottom)
        if (decade - low) % 2 == 0:
            yield _text(at(10.0**decade), bottom + 15, _duration(decade), "soft middle")
    yield _text((left + right) / 2, bottom + 30, "CPU time per stage", "soft middle")
    for number, each in enumerate(series):
        cost, y = each.points[0][1], PLOT_TOP + step * (number + 0.5)
        yield _text(left - 10, y + 4, each.title, f"{each.role} end")
        yield _line(at(10.0**low), y, at(cost), y, "lead")
        yield _dot(at(cost), y, each.role)
        shown = f"{cost:.1f}" if cost < 10 else f"{cost:,.0f}"
        yield _text(at(cost) + 7, y + 4, shown, each.role)


def _bars(rows: Sequence[Bound]) -> Iterator[str]:
    """The bounds: how much of what is allowed is used."""
    left, right, most = 300, 600, 1.6

    def at(share: float) -> float:
        return left + min(share, most) / most * (right - left)

    yield _text(12, 20, "What it costs, as a share of what it may cost", "title")
    bottom = 38 + ROW * len(rows)
    for number, bound in enumerate(rows):
        assert bound.found is not None
        y = 38 + ROW * number
        share = bound.found.median / bound.limit
        mark = "well" if bound.holds else "ill"
        against = bound.against[:3] if bound.against.startswith("(") else bound.against  # of a floor its letter will do
        yield _text(left - 10, y + 14, f"{bound.what}, to {against}" if against else bound.what, "end")
        yield f'<rect x="{left}" y="{y + 4}" width="{at(share) - left:.1f}" height="13" rx="2" class="bar {mark}"/>'
        found = f"{bound.found.median:.2f}{bound.unit}, {'at most' if bound.holds else 'but at most'} {bound.limit:g}"
        yield _text(right + 10, y + 14, found, "" if bound.holds else "ill")
    yield _line(at(1), 34, at(1), bottom, "limit")
    yield _text(at(1), bottom + 16, "the bound", "soft middle")
