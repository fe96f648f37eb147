"""Small charts as inline SVG: values in, a string out. No drawing library, no state, no I/O.

A chart's <svg> is its plot area, as wide as the page gives it. Grid, dots and labels stand at percentages, so
text keeps its size on a phone; only the curves live in a stretched viewBox of 10,000 x 10,000, where strokes
do not scale. Tick labels hang outside of the area, in the padding that the page's CSS leaves around it.
Colours are CSS classes: a mark's ``css`` names a class that sets ``color``.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from statistics import median

Point = tuple[float, float | None]  # y is None where nothing finite was measured: a gap in the curve

BOX = 10_000  # side of the curves' viewBox


# ---- numbers for people ------------------------------------------------------------------------------


def human(value: float) -> str:
    """Three digits and a letter: 40e9 -> "40B", 16_080_896 -> "16.1M", 2600 -> "2,600", 0.0006 -> "6e-4"."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        scaled = value / size
        if abs(scaled) >= (9.995 if letter == "K" else 0.9995):
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            text = f"{scaled:,.{digits}f}"
            return (text.rstrip("0").rstrip(".") if digits else text) + letter
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.3g}"


def percent(value: float) -> str:
    """0.2955 -> "29.55 %"; trailing zeros go: 0.25 -> "25 %". The space does not break."""
    return f"{100 * value:.2f}".rstrip("0").rstrip(".") + "\u00a0%"


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Even ticks with the digits that tell them apart: [3, 3.5] -> "3.0", "3.5"; [0, 2e-4] -> "0", "2e-4"."""
    big = max((abs(t) for t in ticks), default=0.0)
    if len(ticks) < 2 or big >= 10_000 or big < 0.01:
        return [f"{t / 1000:g}K" if 1000 <= abs(t) < 9995 <= big else human(t) for t in ticks]
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return [f"{t:,.{digits}f}" for t in ticks]


# ---- axes --------------------------------------------------------------------------------------------


def nice_ticks(lo: float, hi: float, count: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in lo..hi, about ``count`` of them: (2.7, 4.3) -> 3, 3.5, 4."""
    if not hi > lo:
        return [lo]
    exponent = math.floor(math.log10((hi - lo) / count))
    step = next(m * 10.0**exponent for m in (1, 2, 5, 10) if m * 10.0**exponent * count >= (hi - lo) * (1 - 1e-9))
    first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
    return [round(i * step, 12 - exponent) + 0.0 for i in range(first, last + 1)]


def log_ticks(lo: float, hi: float, count: int = 6) -> list[float]:
    """1, 2, 5 of each decade in lo..hi; powers of ten (or every second, ...) when those are too many."""
    low, high = math.floor(math.log10(lo)), math.ceil(math.log10(hi))
    for mantissas, stride in (((1, 2, 5), 1), ((1,), 1), ((1,), max(2, -(-(high - low) // count)))):
        ticks = [m * 10.0**e for e in range(low, high + 1, stride) for m in mantissas]
        ticks = [float(f"{t:.0e}") for t in ticks if lo * (1 - 1e-9) <= t <= hi * (1 + 1e-9)]
        if len(ticks) <= count:
            break
    return ticks if len(ticks) >= 2 else nice_ticks(lo, hi, count)


@dataclass(frozen=True)
class Axis:
    """A range, how to place a value in it (0..1, outside when beyond), and its labelled ticks."""

    lo: float
    hi: float
    ticks: list[float]
    labels: list[str]
    unit: str = ""
    log: bool = False

    def place(self, value: float) -> float:
        if self.log:
            return math.log(value / self.lo) / math.log(self.hi / self.lo)
        return (value - self.lo) / (self.hi - self.lo)


def linear_axis(
    lo: float, hi: float, unit: str = "", *, count: int = 5, label: Callable[[float], str] | None = None
) -> Axis:
    if not hi > lo:  # a single value: give it a neighbourhood
        lo, hi = lo - max(abs(lo) * 0.05, 1e-9), hi + max(abs(hi) * 0.05, 1e-9)
    ticks = nice_ticks(lo, hi, count)
    return Axis(lo, hi, ticks, [label(t) for t in ticks] if label else tick_labels(ticks), unit)


def log_axis(lo: float, hi: float, unit: str = "", *, count: int = 6) -> Axis:
    ticks = log_ticks(lo, hi, count)
    return Axis(lo, hi, ticks, [human(t) for t in ticks], unit, log=True)


def value_axis(values: Iterable[float], unit: str = "", *, log_from: float = 30.0) -> Axis:
    """From zero to a little over the largest value; logarithmic when the values spread ``log_from``-fold."""
    positive = [v for v in values if v > 0]
    if not positive:
        return linear_axis(0.0, 1.0, unit)
    lo, hi = min(positive), max(positive)
    if hi >= log_from * lo:
        return log_axis(lo / 1.15, hi * 1.15, unit)
    return linear_axis(0.0, hi * 1.08, unit, count=4)


# ---- series ------------------------------------------------------------------------------------------


def decimate(points: Sequence[Point], limit: int = 1000) -> list[Point]:
    """At most ``limit`` points that look like all of them: the lowest and highest of each of ~limit/2 stretches.

    The first and the last point stay. A stretch without any value stays a gap.
    """
    if len(points) <= limit:
        return list(points)
    n, buckets = len(points) - 2, (limit - 2) // 2
    kept = [points[0]]
    for b in range(buckets):
        part = points[1 + b * n // buckets : 1 + (b + 1) * n // buckets]
        found = sorted((y, i) for i, (_, y) in enumerate(part) if y is not None)
        if not found:
            kept.append((part[0][0], None))
        else:
            kept += [part[i] for i in sorted({found[0][1], found[-1][1]})]
    return [*kept, points[-1]]


def smooth(points: Sequence[Point], window: int, limit: int = 500) -> list[Point]:
    """Running median over ``window`` points, centred, at ``limit`` even places: a spike leaves no step in it.

    None, where nothing finite was measured, is passed over; a window without any value gives None.
    """
    places = range(len(points))
    if len(points) > limit:
        places = [i * (len(points) - 1) // (limit - 1) for i in range(limit)]  # type: ignore[assignment]
    out: list[Point] = []
    for i in places:
        near = sorted(y for _, y in points[max(0, i - window // 2) : i + window // 2 + 1] if y is not None)
        out.append((points[i][0], median(near) if near else None))
    return out


# ---- marks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A curve. The page's script reads values back from its path, so a ``name`` also names it there."""

    name: str
    points: Sequence[Point]
    css: str


@dataclass(frozen=True)
class Dots:
    """Measured points, joined by a thin line, each with its error (one standard error) if known."""

    name: str
    points: Sequence[Point]
    css: str
    errors: Sequence[float | None] = field(default=())


@dataclass(frozen=True)
class Level:
    """A horizontal reference, labelled at its right end with ``shown`` (its value in words) and its label."""

    label: str
    value: float
    shown: str
    css: str


@dataclass(frozen=True)
class Rug:
    """Short strokes on the x axis: where something went wrong."""

    name: str
    xs: Sequence[float]
    css: str


Mark = Line | Dots | Level | Rug


def _pc(fraction: float) -> str:
    return f"{100 * fraction:.2f}".rstrip("0").rstrip(".") + "%"


def _path(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """Path data in the BOX, "M0 5L10 7"; a point between two gaps is a line of no length (a dot)."""
    out: list[str] = []
    pen, lone = "M", ""
    for px, py in points:
        if py is None or (y.log and py <= 0):
            out.append(lone)
            pen, lone = "M", ""
            continue
        at = f"{BOX * x.place(px):.0f} {BOX * (1 - y.place(py)):.0f}"
        out.append(pen + at)
        lone = f"L{at}" if pen == "M" else ""
        pen = "L"
    return "".join([*out, lone])


def _curve(mark: Line | Dots, x: Axis, y: Axis) -> str:
    kind = "curve" if isinstance(mark, Line) else "join"
    return (
        f'<path class="{kind} {mark.css}" data-name="{escape(mark.name)}" '
        f'd="{_path(decimate(mark.points), x, y)}" vector-effect="non-scaling-stroke"/>'
    )


def _is_lone(mark: Line) -> bool:
    """One value only: no curve yet, so it is drawn as a dot."""
    return sum(y is not None for _, y in mark.points) == 1


def _dots(mark: Dots, x: Axis, y: Axis) -> str:
    """Circles and error bars of the points that are in the frame."""
    errors = {p: e for p, e in zip(mark.points, mark.errors, strict=False) if e}
    points = decimate(mark.points)
    radius = next(r for n, r in ((40, 3.2), (120, 2.2), (math.inf, 1.5)) if len(points) <= n)
    out = []
    for px, py in points:
        if py is None or not 0 <= y.place(py) <= 1:
            continue
        cx = _pc(x.place(px))
        if e := errors.get((px, py)):
            top, foot = _pc(1 - y.place(py + e)), _pc(1 - y.place(py - e))
            out.append(f'<line x1="{cx}" x2="{cx}" y1="{top}" y2="{foot}"/>')
        out.append(f'<circle cx="{cx}" cy="{_pc(1 - y.place(py))}" r="{radius}"/>')
    many = " many" if len(points) > 120 else ""
    return f'<g class="dots{many} {mark.css}">{"".join(out)}</g>'


def _levels(marks: Sequence[Level], y: Axis, height: int) -> str:
    """Reference lines; labels that would touch are pushed apart, downwards, by two lines of text."""
    out, floor = [], -math.inf
    for mark in sorted(marks, key=lambda m: -m.value):
        at = 1 - y.place(mark.value)
        label = max(at * height, floor)
        floor = label + 28
        out.append(
            f'<g class="level {mark.css}"><line x1="0" x2="100%" y1="{_pc(at)}" y2="{_pc(at)}"/>'
            f'<text class="shown" x="100%" y="{label:.1f}">{escape(mark.shown)}</text>'
            f'<text class="name" x="100%" y="{label:.1f}">{escape(mark.label)}</text></g>'
        )
    return "".join(out)


def _rug(mark: Rug, x: Axis) -> str:
    xs = [_pc(x.place(v)) for v in mark.xs]
    strokes = "".join(f'<line x1="{v}" x2="{v}" y1="95%" y2="100%"/>' for v in dict.fromkeys(xs))
    return f'<g class="rug {mark.css}">{strokes}</g>'


def _grid(x: Axis, y: Axis) -> str:
    """Horizontal hairlines, the two axes' tick labels and the x axis' unit."""
    out = ['<g class="grid">']
    out += [f'<line x1="0" x2="100%" y1="{p}" y2="{p}"/>' for p in (_pc(1 - y.place(t)) for t in y.ticks)]
    out.append('</g><g class="axis"><line x1="0" x2="100%" y1="100%" y2="100%"/>')
    out += [
        f'<text class="y" x="-9" y="{_pc(1 - y.place(t))}">{escape(s)}</text>'
        for t, s in zip(y.ticks, y.labels, strict=True)
    ]
    for i, (t, s) in enumerate(zip(x.ticks, x.labels, strict=True)):
        at = _pc(x.place(t))
        spare = " spare" if len(x.ticks) > 5 and i % 2 else ""  # a phone has no room for it
        out.append(f'<line x1="{at}" x2="{at}" y1="100%" y2="100%" class="tick"/>')
        out.append(f'<text class="x{spare}" x="{at}" y="100%">{escape(s)}</text>')
    return "".join([*out, f'<text class="unit" x="100%" y="100%">{escape(x.unit)}</text></g>'])


def chart(slug: str, title: str, desc: str, x: Axis, y: Axis, marks: Sequence[Mark], *, height: int = 220) -> str:
    """One chart as an <svg>; ``slug`` makes its ids unique in the page, ``desc`` is what a reader hears."""
    curves = "".join(_curve(m, x, y) for m in marks if isinstance(m, Line | Dots))
    lone = [Dots("", m.points, m.css) for m in marks if isinstance(m, Line) and _is_lone(m)]
    dots = "".join(_dots(m, x, y) for m in [*marks, *lone] if isinstance(m, Dots))
    rugs = "".join(_rug(m, x) for m in marks if isinstance(m, Rug))
    return (
        f'<svg class="chart" role="img" aria-labelledby="{slug}-t {slug}-d" width="100%" height="{height}" '
        f'data-x="{x.lo:.9g} {x.hi:.9g}" data-y="{y.lo:.9g} {y.hi:.9g}" data-log="{int(y.log)}" '
        f'data-unit="{escape(y.unit)}">'
        f'<title id="{slug}-t">{escape(title)}</title><desc id="{slug}-d">{escape(desc)}</desc>'
        f'<rect class="area" width="100%" height="100%"/>{_grid(x, y)}'
        f'<svg class="curves" viewBox="0 0 {BOX} {BOX}" preserveAspectRatio="none" width="100%" height="100%">'
        f"{curves}</svg>{rugs}{_levels([m for m in marks if isinstance(m, Level)], y, height)}{dots}</svg>"
    )


def legend(marks: Sequence[Mark]) -> str:
    """What the curves are, as HTML; a chart of one curve needs none. References carry their labels themselves."""
    named = [m for m in marks if not isinstance(m, Level) and m.name]
    if len(named) < 2:
        return ""
    items = "".join(
        f'<li><span class="key {type(m).__name__.lower()} {m.css}"></span>{escape(m.name)}</li>' for m in named
    )
    return f'<ul class="legend">{items}</ul>'
