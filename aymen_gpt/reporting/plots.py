"""Every curve of a run, drawn once: as SVG inside report.html, as PDF for the paper, as a picture in the notebook.

A function takes runs and a size in points (on the page a point is a CSS pixel) and gives a matplotlib Figure.
pyplot is not used, so a report can be drawn in a thread of its own while training goes on.
"""

import io
import logging
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from aymen_gpt.reporting.published_scores import CHANCE, GPT2_FINEWEB_EDU, neighbours
from aymen_gpt.reporting.run_folder import Run, number
from aymen_gpt.wording import PROTOCOLS, human

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would tell of its font cache on the first start

Size = tuple[float, float]
Curve = tuple[np.ndarray, np.ndarray]  # x and y, NaN where nothing finite was measured

# The light colours of the page; in an SVG each becomes var(--NAME), so the page may be dark.
STYLE = Path(__file__).with_name("page.css").read_text("utf-8").split("*{")[0]  # the variables, light and dark
COLOURS = dict(re.findall(r"--(\w+):(#[0-9a-f]{6})", STYLE.split("@media")[0]))
INK, SOFT, GRID, TRAIN, VAL, BAD = (COLOURS[name] for name in ("ink", "soft", "grid", "train", "val", "bad"))
RUNS = ("train", "val", "good", "violet", "ochre", "teal")  # of several runs, in turn
TEXT = 12  # points
LABEL: dict[str, Any] = {"size": TEXT, "color": SOFT, "va": "center"}
LINE: dict[str, Any] = {"color": TRAIN, "linewidth": 1.8, "solid_capstyle": "round", "solid_joinstyle": "round"}
DOT: dict[str, Any] = {"fmt": "o", "color": INK, "markersize": 6, "elinewidth": 1.6}
POINTS = 1000  # of one curve: finer than a screen


# ---- numbers -----------------------------------------------------------------------------------------


def curve(run: Run, key: str) -> Curve:
    """A series of the run by tokens read, or by steps where tokens are not known."""
    found = run.series(key)
    steps, values = [step for step, _ in found], [np.nan if v is None else v for _, v in found]
    return np.array(steps, dtype=float) * (run.tokens_per_step or 1.0), np.array(values, dtype=float)


def decimate(x: np.ndarray, y: np.ndarray) -> Curve:
    """At most POINTS that look like all of them: least and greatest of each stretch, and the ends."""
    if len(x) <= POINTS:
        return x, y
    kept = [0]
    for part in np.array_split(np.arange(1, len(x) - 1), POINTS // 2 - 1):
        known = part[~np.isnan(y[part])]
        kept += sorted({known[y[known].argmin()], known[y[known].argmax()]}) if len(known) else [part[0]]
    kept.append(len(x) - 1)
    return x[kept], y[kept]


def window(n: int) -> int:
    """Steps of the running median of ``n``: odd, as many before a step as after it."""
    return max(9, n // 50) | 1


def smooth(x: np.ndarray, y: np.ndarray) -> Curve:
    """The running median at POINTS / 2 places at most; it passes over gaps."""
    places = np.unique(np.linspace(0, len(x) - 1, min(POINTS // 2, len(x))).astype(int))
    half = window(len(x)) // 2
    near = [y[max(0, i - half) : i + half + 1] for i in places]
    return x[places], np.array([np.median(v[~np.isnan(v)]) if not np.isnan(v).all() else np.nan for v in near])


# ---- the frame ---------------------------------------------------------------------------------------


def frame(size: Size, unit: str, *, left: float = 46, right: float = 14) -> tuple[Figure, Axes]:
    """An empty figure with one ``quiet`` panel."""
    width, height = size
    figure = Figure(figsize=(width / 72, height / 72), facecolor="white")
    box = (left / width, 44 / height, (width - left - right) / width, (height - 44 - 12) / height)
    axes = figure.add_axes(box, facecolor="none")
    quiet(axes, unit)
    return figure, axes


def quiet(axes: Axes, unit: str) -> None:
    """Hairlines, a base line, grey numbers without strokes, and the x axis' unit below its right end."""
    width, height = (float(side) * 0.72 for side in axes.get_window_extent().size)  # of 100 dots an inch
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color=SOFT, linewidth=0.8)
    axes.tick_params(length=0, pad=7, labelsize=TEXT, labelcolor=SOFT)
    axes.tick_params(axis="x", length=4, width=0.8, color=SOFT, pad=4)
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(8 if width > 540 else 4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: human(value))
    axes.yaxis.set_major_locator(MaxNLocator(6 if height > 164 else 4, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel(unit, loc="right", labelpad=4, size=TEXT, color=SOFT)


def unit(run: Run) -> str:
    return "tokens" if run.tokens_per_step else "steps"


def say(
    axes: Axes, text: str, x: float, y: float, dx: float, of: Any = ("axes fraction", "data"), **look: Any
) -> None:
    """Text ``dx`` points beside a place; x is a share of the width there, y a value, or as ``of`` says."""
    axes.annotate(text, (x, y), (dx, 0), xycoords=of, textcoords="offset points", **{**LABEL, **look})


def line(axes: Axes, x: np.ndarray, y: np.ndarray, **look: Any) -> None:
    """A curve; a value between two gaps, or the only one, is a dot."""
    look = {**LINE, **look}
    axes.plot(x, y, **look)
    known = np.concatenate([[False], ~np.isnan(y), [False]])
    alone = known[1:-1] & ~known[:-2] & ~known[2:]
    if alone.any():
        axes.plot(x[alone], y[alone], "o", color=look["color"], markersize=4)


def noisy(axes: Axes, x: np.ndarray, y: np.ndarray, name: str = "each step") -> None:
    """A measured series: faint as it is, strong as its running median."""
    n = window(len(x))
    line(axes, *decimate(x, y), linewidth=1, label=name, alpha=0.35 if len(x) > n else 1)
    if len(x) > n:
        line(axes, *smooth(x, y), label=f"median of {n:,} steps")
    rug(axes, x[np.isnan(y)], "not finite")


def rug(axes: Axes, x: Sequence[float] | np.ndarray, name: str) -> None:
    """Short strokes on the base line where something went wrong."""
    if len(x):
        where = axes.get_xaxis_transform()
        axes.plot(x, [0.03] * len(x), "|", color=BAD, markersize=11, transform=where, label=f"{name} ({len(x):,})")


def legend(axes: Axes) -> None:
    """The names of the curves in the upper right corner, each once."""
    curves, names = axes.get_legend_handles_labels()
    if once := dict(zip(names, curves, strict=True)):
        look: dict[str, Any] = {"frameon": False, "fontsize": TEXT, "labelcolor": SOFT, "handlelength": 1.4}
        axes.legend(once.values(), once.keys(), loc="upper right", borderpad=0, borderaxespad=0.2, **look)


# ---- one run -----------------------------------------------------------------------------------------


def loss(run: Run, size: Size = (1056, 400)) -> Figure:
    """Training and validation loss, the places where the run was continued, and GPT-2's loss where it compares."""
    figure, axes = frame(size, unit(run))
    x, y = curve(run, "loss")
    noisy(axes, x, y, "training, each step")
    vx, vy = curve(run, "val_loss")
    per_step, (lo, hi), end = run.tokens_per_step or 1.0, loss_limits((x, y), (vx, vy)), max(run.step, 1)
    if run.forecasts and (steps := int(number(run.get("run", "steps")) or 0)) > run.step:
        end, expected = steps, run.forecasts[-1]
        span = [[expected["loss"] - expected["low"]], [expected["high"] - expected["loss"]]]
        look: dict[str, Any] = {"fmt": "o", "color": VAL, "markerfacecolor": COLOURS["bg"], "clip_on": False}
        axes.errorbar([end * per_step], [expected["loss"]], span, capsize=4, label="forecast of the end", **look)
        lo = min(lo, expected["low"] - 0.02 * (hi - lo))
    if not np.isnan(vy).all():
        validation(axes, *decimate(vx, vy), hi, color=VAL)
    for what in ("spike", "skipped"):
        rug(axes, [row["step"] * per_step for row in run.rows if row.get(what)], what)
    for i, step in enumerate(starts := continued(run)):
        axes.axvline(step * per_step, 0, 0.62, color=SOFT, linewidth=1, dashes=(2, 3))
        if i == 0:
            text = "stopped here and continued" if size[0] > 500 else "continued"  # on a phone it must fit beside
            text += f", {len(starts)} times" if len(starts) > 1 else ""
            side, shift = ("left", 5) if step < 0.6 * run.step else ("right", -5)
            say(axes, text, step * per_step, 0.62, shift, of=("data", "axes fraction"), va="top", ha=side)
    if "fineweb-edu" in str(run.get("data", "source", "repo")).lower():
        axes.axhline(GPT2_FINEWEB_EDU, color=INK, linewidth=1, dashes=(6, 4), label="GPT-2 124M, validation")
    axes.set_xlim(0, end * per_step)
    axes.set_ylim(lo, hi)
    legend(axes)
    return figure


def validation(axes: Axes, x: np.ndarray, y: np.ndarray, top: float, **look: Any) -> None:
    """Measured points, joined by a thin line that may leave the frame; a point does not. Many are a line alone."""
    many = len(x) > 60
    axes.plot(x, y, **look, linewidth=1.2, alpha=1 if many else 0.6, label="validation" if many else None)
    if not many:
        dots: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 5.5, "clip_on": False, "zorder": 5}
        axes.plot(x[y < top], y[y < top], label="validation", **look | dots)


def loss_limits(*curves: Curve, leave_out: float = 0.02) -> tuple[float, float]:
    """The range of a loss chart, fitted to what follows the first ``leave_out`` of a long run.

    That part falls from 11 to 5 and would press all that follows into the lowest third. So would a rare spike: it
    leaves the frame.
    """
    begin = max((x[int(leave_out * len(x))] for x, _ in curves if len(x) >= 1000), default=0.0)
    shown = np.concatenate([y[(x >= begin) & ~np.isnan(y)] for x, y in curves])
    lo, hi = (shown.min(), np.quantile(shown, 0.999)) if len(shown) else (0.0, 1.0)
    margin = max(0.05 * (hi - lo), 0.01 * abs(hi), 1e-6)
    return lo - margin, hi + margin


def continued(run: Run) -> list[int]:
    """The steps after which the run was started again."""
    return [entry["step"] for entry in run.history if entry.get("step")]


def small(run: Run, key: str, size: Size = (326, 190)) -> Figure:
    """One number by tokens from zero on, or on a log scale where it spreads thirtyfold: rate, norm, speed, MFU."""
    figure, axes = frame(size, unit(run))
    x, y = curve(run, key)
    line(axes, *decimate(x, y)) if key == "lr" else noisy(axes, x, y)
    positive = y[y > 0]
    axes.set_xlim(0, max(run.step, 1) * (run.tokens_per_step or 1.0))
    if key == "grad_norm" and len(positive) and positive.max() >= 30 * positive.min():
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, 1.08 * positive.max() if len(positive) else 1.0)
    axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.3g} %" if key == "mfu" else human(v))
    return figure


def hellaswag(run: Run, size: Size = (508, 300)) -> Figure:
    """The scores made while training, with one standard error, between chance and published models."""
    figure, axes = frame(size, unit(run), left=50, right=134)
    found, per_step = run.scores("completion"), run.tokens_per_step or 1.0
    x, y = [s.step * per_step for s in found], [100 * s.value for s in found]
    errors = [100 * (s.error or 0.0) for s in found]
    axes.errorbar(x, y, errors, fmt="o-", color=VAL, linewidth=1, elinewidth=1.3, markersize=5.5, clip_on=False)
    levels, best = [(CHANCE, "chance", (1, 0))], max(s.value for s in found)
    for measured_by, dashes, star in (("completion", (6, 4), ""), ("gpt3-paper", (1, 3), "*")):
        near = neighbours(measured_by, found[-1].metric, best)
        near = near[:1] + [a for a in near[1:] if a.value < best + 0.06]  # a far one presses the points flat
        levels += [(anchor.value, anchor.model + star, dashes) for anchor in near]
    for value, _, dashes in levels:
        axes.axhline(100 * value, color=SOFT, linewidth=1, dashes=dashes)
    axes.margins(y=0.08)
    line_of_text = 16 / (size[1] - 56) * np.ptp(axes.get_ylim())
    place = np.inf
    for value, name, _ in sorted(levels, reverse=True):
        place = min(100 * value, place - line_of_text)  # labels that would touch are pushed apart
        say(axes, f"{100 * value:.4g} %  {name}", 1, place, 8)
    axes.set_xlim(0, max(run.step, 1) * per_step)
    axes.yaxis.set_major_formatter("{x:g} %")
    return figure


def scores(run: Run, size: Size = (508, 300)) -> Figure:
    """The run's latest score by each protocol beside published ones, in groups: only rows of a group compare."""
    figure, axes = frame(size, "accuracy", left=112, right=66)
    place, found = 0.0, [score for protocol in PROTOCOLS if (score := run.score(protocol))]
    title = {"bbox": {"facecolor": COLOURS["bg"], "linewidth": 0, "pad": 1}}  # on top of the line of chance
    for score in found:
        say(axes, f"{score.protocol} protocol, {score.metric}", 0, place, -110, **title)
        row(axes, place + 1, "this run", score.value, score.error, color=VAL)
        near = neighbours(score.protocol, score.metric, score.value)
        for i, anchor in enumerate(near, 2):
            row(axes, place + i, anchor.model, anchor.value, markerfacecolor=COLOURS["bg"])
        place += 2.4 + len(near)
    say(axes, "the GPT-3 paper's own, acc_norm", 0, place, -110, **title)
    for anchor in neighbours("gpt3-paper", "acc_norm", max(score.value for score in found)):
        place += 1
        row(axes, place, anchor.model, anchor.value, fmt="D", markerfacecolor=COLOURS["bg"], color=SOFT)
    axes.axvline(100 * CHANCE, color=SOFT, linewidth=1, dashes=(2, 3))
    say(axes, "chance", 100 * CHANCE, 1, 4, of=("data", "axes fraction"), va="top")
    axes.set_ylim(place + 0.6, -0.9)
    axes.set_yticks([])
    axes.margins(x=0.08)
    axes.xaxis.set_major_formatter("{x:g} %")
    return figure


def row(axes: Axes, place: float, name: str, value: float, error: float | None = None, **look: Any) -> None:
    """A dot with its standard error, its name at the left and its number at the right."""
    axes.axhline(place, color=GRID, linewidth=1, zorder=0)
    axes.errorbar(100 * value, place, xerr=100 * error if error else None, **{**DOT, **look})
    shown = f"{100 * value:.4g}" if error is None else f"{100 * value:.2f} ± {100 * error:.2f}"
    say(axes, name, 0, place, -100, color=INK)
    say(axes, shown, 1, place, 64, color=INK, ha="right")


# ---- several runs ------------------------------------------------------------------------------------


def losses(runs: Sequence[Run], size: Size = (1056, 400)) -> Figure:
    """Validation loss of several runs by tokens, and their training loss (running median) faint."""
    figure, axes = frame(size, "tokens")
    curves = [(curve(run, "loss"), curve(run, "val_loss")) for run in runs]
    lo, hi = loss_limits(*(c for pair in curves for c in pair), leave_out=0.1)
    for i, (train, measured) in enumerate(curves):
        look = {"color": COLOURS[RUNS[i % len(RUNS)]], "linestyle": "-" if i < len(RUNS) else "--"}
        line(axes, *smooth(*train), **look, linewidth=1.2, alpha=0.45)
        validation(axes, *decimate(*measured), hi, **look)
    axes.set_xlim(0, max((x[-1] for pair in curves for x, _ in pair if len(x)), default=1.0))
    axes.set_ylim(lo, hi)
    return figure


# ---- into a page -------------------------------------------------------------------------------------


def svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an element of a page: colours are the page's, text stays text, ids begin with ``name``."""
    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    width, height = (72 * inches for inches in figure.get_size_inches())
    body = re.sub(r"<metadata>.*?</metadata>", "", text[text.index(">", text.index("<svg")) + 1 :], flags=re.S)
    used = set(re.findall(r"#([\w-]+)(?=[\")])", body))
    body = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r"((?:href=\"|url\()#)([\w-]+)", rf"\1{name}-\2", body).replace("xlink:href", "href")
    body = re.sub(r"<[^>]+>", lambda tag: re.sub(r"-?\d+\.\d\d+", lambda m: f"{float(m[0]):.1f}", tag[0]), body)
    for colour, value in COLOURS.items():
        body = body.replace(value, f"var(--{colour})")
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">{body}'


def picture(figure: Figure, name: str, label: str) -> str:
    """The same as a file of its own, which has the page's colours in it, for a light and for a dark screen."""
    style = f"<style>{STYLE}svg{{background:var(--bg)}}svg text{{font-family:var(--sans)!important}}</style>"
    width, height = (72 * inches for inches in figure.get_size_inches())
    tag = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
    return svg(figure, name, label).replace("<svg ", tag, 1).replace(">", f">{style}", 1) + "\n"
