"""A run folder -> ``report.html``: one file that opens by double click, complete without network or script.

``write_report(Path("runs/demo"))`` may be called at any moment of a run, by the trainer or by hand; the page
is written beside and renamed, so a browser never sees half of it. Whatever comes from the run is escaped, and
a Content-Security-Policy forbids the page to load anything at all.
"""

import base64
import hashlib
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from aymen_gpt.errors import CannotWrite
from aymen_gpt.files import replace_text
from aymen_gpt.reporting.anchors import CHANCE, neighbours
from aymen_gpt.reporting.charts import (
    Axis,
    Dots,
    Level,
    Line,
    Mark,
    Rug,
    chart,
    human,
    legend,
    linear_axis,
    percent,
    smooth,
    value_axis,
)
from aymen_gpt.reporting.runs import Row, Run, Sample, Score, Series, number, read_run

PROTOCOLS = {
    "completion": "completion protocol: context + ending as they are, loss per token of the ending",
    "harness": "lm-evaluation-harness protocol: cleaned text, log-likelihood per character of the ending",
}
STATES = {"running": "Running", "stopped": "Stopped, saved", "done": "Done", "failed": "Failed"}
UNITS = {  # of config.json's keys, where the name does not say it
    "steps": "updates", "warmup_steps": "updates", "val_every": "updates", "hellaswag_every": "updates",
    "hellaswag_limit": "examples", "checkpoint_every": "updates", "tokens_per_step": "tokens",
    "block_size": "tokens", "micro_batch": "rows", "vocab_size": "tokens", "n_params": "parameters",
    "flops_per_token": "FLOP", "train_tokens": "tokens", "val_tokens": "tokens", "memory_gb": "GB",
    "peak_tflops": "TFLOP/s", "cores": "cores",
}  # fmt: skip
MAX_SECTIONS, MAX_SAMPLES, MAX_CHARS = 24, 6, 2000  # samples shown: steps, per step, characters each


# ---- words -------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """42 -> "42 s", 500 -> "8 min 20 s", 11100 -> "3 h 05 min", 187200 -> "2 d 4 h"."""
    s = max(0, round(seconds))
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 2 * 86400:
        return f"{s // 3600} h {s % 3600 // 60:02d} min"
    return f"{s // 86400} d {s % 86400 // 3600} h"


def moment(value: Any) -> datetime | None:
    """An ISO time as UTC; None where it is none. A time without a zone is taken as UTC."""
    try:
        when = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).astimezone(UTC)


def day(when: datetime) -> str:
    return f"{when.day} {when:%B %Y, %H:%M} UTC"


def value_text(key: str, value: Any) -> str:
    """A configuration value for people: numbers with separators and units, true as "yes", absent as "—"."""
    if value is None or value == "":
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        said = {k: value_text(k, v) for k, v in value.items() if v is not None}
        return said.get("name") or ", ".join(f"{k}: {text}" for k, text in said.items())
    if isinstance(value, list):
        more = f" and {len(value) - 3:,} more" if len(value) > 3 else ""
        return ", ".join(value_text("", v) for v in value[:3]) + more
    if isinstance(value, str) or number(value) is None:
        return str(value)
    if isinstance(value, int):
        text = str(value) if key == "seed" else f"{value:,}"
    else:
        text = human(value) if abs(value) < 0.01 else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    unit = UNITS.get(key, "")
    return f"{text} {unit.removesuffix('s') if value == 1 else unit}".rstrip()


def describe_model(run: Run) -> str:
    """ "16.1M-parameter GPT, 4 layers, 256 wide", as far as config.json says it."""
    n, layers, width = (number(run.get(*k)) for k in (("n_params",), ("model", "n_layer"), ("model", "n_embd")))
    heads, context = number(run.get("model", "n_head")), number(run.get("model", "block_size"))
    parts = [f"{human(n)}-parameter GPT" if n else "GPT"]
    named = ((layers, "layers"), (heads, "heads"), (width, "wide"), (context, "tokens of context"))
    return ", ".join([*parts, *(f"{v:,.0f} {word}" for v, word in named if v)])


# ---- what the charts and tiles stand on --------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """A run with what every part of the page asks of it: the step it is at and the x axis of the charts."""

    run: Run
    step: int
    steps: int | None
    tokens_per_step: float | None

    @classmethod
    def of(cls, run: Run) -> "View":
        reached = number(run.status.get("step"))
        last = run.rows[-1]["step"] if run.rows else 0
        planned = number(run.status.get("steps")) or number(run.get("run", "steps"))
        per_step = number(run.get("run", "tokens_per_step"))
        for row in run.rows:
            if (tokens := number(row.get("tokens"))) and row["step"]:
                per_step = tokens / row["step"]
        return cls(run, max(int(reached or 0), last), int(planned) if planned else None, per_step)

    def x(self, step: float) -> float:
        return step * (self.tokens_per_step or 1.0)

    def points(self, key: str) -> Series:
        return [(self.x(step), value) for step, value in self.run.series(key)]

    def axis(self, count: int = 6) -> Axis:
        last = max(self.run.rows[-1]["step"], 1) if self.run.rows else 1
        unit = "tokens" if self.tokens_per_step else "steps"
        return linear_axis(0.0, self.x(last), unit, count=min(count, last))

    def at(self, step: float) -> str:
        """ "step 1,200, 4.9M tokens"."""
        tokens = f", {human(self.x(step))} tokens" if self.tokens_per_step else ""
        return f"step {step:,.0f}{tokens}"


def finite(points: Series) -> list[float]:
    return [y for _, y in points if y is not None]


def recent(run: Run, key: str, n: int = 50) -> float | None:
    """Median of the last ``n`` finite values: what the run does now, without its hiccups."""
    values: list[float] = []
    for row in reversed(run.rows):
        if (value := number(row.get(key))) is not None:
            values.append(value)
        if len(values) == n:
            break
    return sorted(values)[len(values) // 2] if values else None


def main_scores(run: Run) -> list[Score]:
    return run.scores("completion") or run.scores("harness")


# ---- head and tiles ----------------------------------------------------------------------------------


def _header(view: View) -> str:
    run = view.run
    state = str(run.status.get("state") or "")
    css = state if state in STATES else "unknown"
    when = moment(run.status.get("updated"))
    facts = [f"step {view.step:,}" + (f" of {view.steps:,}" if view.steps else "")]
    if view.tokens_per_step:
        planned = f" of {human(view.x(view.steps))}" if view.steps else ""
        facts.append(f"{human(view.x(view.step))}{planned} tokens")
    if when:
        facts.append(f'<time datetime="{when.isoformat()}">{day(when)}</time>')
    share = min(1.0, view.step / view.steps) if view.steps else 0.0
    message = str(run.status.get("message") or "")
    return (
        f'<header><p class="over">Aymen-GPT · training report</p><h1>{escape(run.name)}</h1>'
        f'<p class="lead">{escape(describe_model(run))}</p>'
        f'<p class="status"><span class="state {css}">{escape(STATES.get(state, state or "State unknown"))}</span>'
        f"{''.join(f'<span>{fact}</span>' for fact in facts)}</p>"
        f'<div class="bar {css}" role="progressbar" aria-label="steps done" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{100 * share:.0f}"><i style="width:{100 * share:.2f}%"></i></div>'
        + (f'<p class="note">{escape(message)}</p>' if message else "")
        + "".join(f'<p class="note warn">{escape(p)}</p>' for p in run.problems)
        + "</header>"
    )


def _tile(label: str, value: str, note: str = "", *, small: str = "") -> str:
    """``value`` large, ``small`` beside it, ``note`` under it; label and note are plain text."""
    beside = f" <small>{escape(small)}</small>" if small else ""
    return f"<div><dt>{escape(label)}</dt><dd><b>{escape(value)}</b>{beside}<p>{escape(note)}</p></dd></div>"


def _loss_tile(view: View) -> str:
    loss = view.run.last("loss")
    if loss is None:
        return _tile("Train loss", "—", "no update yet")
    series = view.run.series("loss")
    bad = sum(v is None for _, v in series)
    note = (
        f"{bad:,} of {len(series):,} steps not finite" if bad else f"perplexity {_perplexity(loss)}, latest step"
    )
    return _tile("Train loss", f"{loss:.3f}", note, small="nats/token")


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.1f}" if loss < 7 else human(math.exp(min(loss, 700)))


def _val_tile(view: View) -> str:
    measured = [(step, v) for step, v in view.run.series("val_loss") if v is not None]
    if not measured:
        return _tile("Validation loss", "—", "not measured yet")
    step, loss = measured[-1]
    return _tile(
        "Validation loss",
        f"{loss:.3f}",
        f"perplexity {_perplexity(loss)}, step {step:,.0f}",
        small="nats/token",
    )


def _accuracy(score: Score) -> tuple[str, float | None, float | None]:
    """The metric we show, acc_norm where there is one, with its value and standard error."""
    if score.acc_norm is not None:
        return "acc_norm", score.acc_norm, score.acc_norm_stderr
    return "acc", score.acc, score.acc_stderr


def _hellaswag_tile(view: View) -> str:
    scores = main_scores(view.run)
    if not scores:
        return _tile("HellaSwag", "—", f"not scored yet; chance is {percent(CHANCE)}")
    metric, value, error = _accuracy(scores[-1])
    n = f", {scores[-1].n:,} examples" if scores[-1].n else ""
    return _tile(
        f"HellaSwag {metric}",
        f"{100 * (value or 0):.2f} %",
        f"{scores[-1].protocol}{n}; chance {percent(CHANCE)}",
        small=f"± {100 * error:.2f}" if error is not None else "",
    )


def _speed_tile(view: View) -> str:
    speed, mfu = recent(view.run, "tokens_per_second"), recent(view.run, "mfu")
    if speed is None:
        return _tile("Throughput", "—", "no update yet")
    world = number(view.run.get("world_size")) or 1
    device = str(view.run.get("device", "name") or view.run.get("run", "device") or "")
    on = f"{world:,.0f} x {device}" if world > 1 else device
    note = ", ".join(part for part in (f"MFU {percent(round(mfu, 3))}" if mfu else "", on) if part)
    return _tile("Throughput", human(speed), note, small="tokens/s")


def _time_tile(view: View) -> str:
    run = view.run
    spent = sum(finite(run.series("step_seconds")))
    started, updated = moment(run.get("started")), moment(run.status.get("updated"))
    wall = (updated - started).total_seconds() if started and updated else None
    if not spent and wall is None:
        return _tile("Elapsed", "—", "not measured yet")
    note = f"started {day(started)}" if started else ""
    each = recent(run, "step_seconds")
    if run.status.get("state") == "running" and view.steps and each and view.steps > view.step:
        note = f"about {duration((view.steps - view.step) * each)} of training left"
    elif spent and wall is not None and wall > spent:
        note = f"{duration(spent)} of it in training steps"
    return _tile("Elapsed", duration(spent if wall is None else max(wall, spent)), note)


# ---- charts ------------------------------------------------------------------------------------------


def _figure(title: str, unit: str, svg: str, marks: Sequence[Mark], *, note: str = "", css: str = "") -> str:
    return (
        f'<figure class="{css}"><figcaption><h3>{escape(title)} <span>{escape(unit)}</span></h3>'
        f'{legend(marks)}</figcaption><div class="plot">{svg}<output aria-hidden="true"></output></div>'
        + (f'<p class="note">{escape(note)}</p>' if note else "")
        + "</figure>"
    )


def _absent(title: str, note: str, css: str = "") -> str:
    head = f"<figcaption><h3>{escape(title)}</h3></figcaption>"
    return f'<figure class="{css}">{head}<p class="absent">{escape(note)}</p></figure>'


def _loss_axis(loss: Series, val: Series) -> tuple[Axis, str]:
    """The frame of the loss chart, and a note when the start of a long run does not fit into it.

    The first 2 % of a long run fall from 11 to 5 and would press all that follows into the lowest third.
    """
    start = len(loss) // 50 if len(loss) >= 1000 else 0
    begin = loss[start][0] if start else 0.0
    shown = finite(loss[start:]) + [y for x, y in val if y is not None and x >= begin]
    shown = shown or finite(loss) or finite(val) or [0.0]
    lo, hi = min(shown), max(shown)
    margin = max(0.05 * (hi - lo), 0.01 * hi)
    axis = linear_axis(lo - margin, hi + margin, count=6)
    peak = max([*finite(loss), *finite(val)], default=hi)
    if peak <= axis.hi or not start:
        return axis, ""
    return (
        axis,
        f"The run begins at {peak:.2f}, above the frame, which is fitted to what follows its first 2 %.",
    )


def _noisy(name: str, points: Series) -> list[Mark]:
    """A measured series: faint as it is, strong as its running median, and where it was not finite."""
    marks: list[Mark] = [Line(name, points, "raw")]
    window = max(9, len(points) // 100) | 1  # odd: as many steps before as after
    if len(points) > window:
        marks.append(Line(f"median of {window:,} steps", smooth(points, window), "train"))
    if bad := [x for x, y in points if y is None]:
        marks.append(Rug(f"not finite ({len(bad):,})", bad, "bad"))
    return marks


def _loss_chart(view: View) -> str:
    loss, val = view.points("loss"), view.points("val_loss")
    if not finite(loss) and not finite(val):
        return _absent("Loss", "No loss yet: the first update will put a point here.", "wide")
    axis, note = _loss_axis(loss, val)
    marks = _noisy("train, each step", loss)
    if finite(val):
        marks.append(Dots("validation", val, "val"))
    for what in ("spike", "skipped"):
        if steps := [view.x(row["step"]) for row in view.run.rows if row.get(what)]:
            marks.append(Rug(f"{what} ({len(steps):,})", steps, "bad"))
    last = view.run.last("loss")
    heard = f"Train loss by {view.axis().unit}, now {last if last is None else round(last, 3)}; " + (
        f"validation loss, now {finite(val)[-1]:.3f}." if finite(val) else "no validation yet."
    )
    svg = chart("loss", "Train and validation loss", heard, view.axis(8), axis, marks, height=340)
    return _figure("Loss", "nats per token", svg, marks, note=note, css="wide")


def _levels(protocol: str, metric: str, best: float) -> list[Level]:
    """Chance, the nearest published GPT-2 of the same protocol, and GPT-3's own for orientation."""
    levels = [Level("chance", CHANCE, percent(CHANCE), "chance")]
    for measured_by, css, star in ((protocol, "same", ""), ("gpt3-paper", "paper", " *")):
        near = neighbours(measured_by, metric, best)
        near = near[:1] + [a for a in near[1:] if a.value - best <= 0.06]  # a far one presses the points flat
        levels += [Level(a.model + star, a.value, percent(a.value), css) for a in near]
    return levels


def _hellaswag_chart(view: View, protocol: str) -> str:
    scores = view.run.scores(protocol)
    measured = [(view.x(view.step if s.step is None else s.step), *_accuracy(s)[1:]) for s in scores]
    metric = _accuracy(scores[-1])[0]
    points: Series = [(x, value) for x, value, _ in measured]
    errors = [error for _, _, error in measured]
    marks: list[Mark] = [Dots("", points, "val", errors), *_levels(protocol, metric, max(finite(points)))]
    ends = [v + s * (e or 0.0) for _, v, e in measured if v is not None for s in (-1, 1)]
    ends += [m.value for m in marks if isinstance(m, Level)]
    margin = 0.06 * (max(ends) - min(ends))
    y = linear_axis(min(ends) - margin, max(ends) + margin, unit="%", label=lambda t: f"{100 * t:.4g} %")
    n = scores[-1].n
    some = "Validation set" if n is None else f"All {n:,} examples" if n == 10_042 else f"{n:,} of 10,042 examples"
    note = f"{some}, {PROTOCOLS[protocol]}. Bars: ± one standard error. Dashed: GPT-2 by the same protocol."
    if metric == "acc_norm":
        note += " * Dotted: the GPT-3 paper's own protocol, for orientation, not for comparison."
    heard = f"{metric} by the {protocol} protocol, now {percent(finite(points)[-1])}, chance {percent(CHANCE)}."
    svg = chart(f"hellaswag-{protocol}", "HellaSwag accuracy", heard, view.axis(8), y, marks, height=300)
    return _figure("HellaSwag", f"{metric}, {protocol}", svg, marks, note=note, css="wide labelled")


def _small_chart(
    view: View, key: str, title: str, unit: str, *, label: Callable[[float], str] | None = None
) -> str:
    points = view.points(key)
    if not finite(points):
        return _absent(title, "Not measured yet.")
    y = value_axis(finite(points), log_from=30.0 if key == "grad_norm" else math.inf)
    if label:
        y = Axis(y.lo, y.hi, y.ticks, [label(t) for t in y.ticks], "%")
    marks = [Line("", points, "train")] if key == "lr" else _noisy("each step", points)
    heard = f"{title} by {view.axis().unit}, now {human(finite(points)[-1])}."
    svg = chart(key, title, heard, view.axis(4), y, marks, height=170)
    return _figure(title, unit + (", log scale" if y.log else ""), svg, marks)


def _charts(view: View) -> str:
    scored = [p for p in PROTOCOLS if view.run.scores(p)]
    hellaswag = [_hellaswag_chart(view, p) for p in scored]
    small = [
        _small_chart(view, "lr", "Learning rate", ""),
        _small_chart(view, "grad_norm", "Gradient norm", "before clipping"),
        _small_chart(view, "tokens_per_second", "Throughput", "tokens/s"),
    ]
    if finite(view.run.series("mfu")):
        small.append(_small_chart(view, "mfu", "MFU", "of peak FLOP/s", label=percent))
    missing = "Not scored in this run yet; python hellaswag.py scores its latest checkpoint (see Commands)."
    return (
        f'<section aria-label="Curves">{_loss_chart(view)}'
        + ("".join(hellaswag) or _absent("HellaSwag", missing, "wide"))
        + f'<div class="small n{len(small)}">{"".join(small)}</div>{_table(view)}</section>'
    )


def _table(view: View) -> str:
    """The measured points in numbers, latest first: what a screen reader, or a doubter, can use."""
    rows = [r for r in view.run.rows if "val_loss" in r or "hellaswag" in r]
    if not rows:
        return ""
    n, shown = len(rows), rows[:: max(1, -(-len(rows) // 400))]
    shown = shown if shown[-1] is rows[-1] else [*shown, rows[-1]]
    scores = {score.step: score for score in main_scores(view.run)}
    body = "".join(_table_row(view, row, scores.get(row["step"])) for row in reversed(shown))
    some = f", {len(shown):,} of {n:,} shown" if len(shown) < n else ""
    head = "".join(f'<th scope="col">{h}</th>' for h in ("step", "tokens", "val loss", "perplexity", "HellaSwag"))
    return (
        f"<details><summary>Validation in numbers <span>{n:,} measurements{some}</span></summary>"
        f'<div class="scroll"><table class="numbers"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></details>"
    )


def _table_row(view: View, row: Row, score: Score | None) -> str:
    val = number(row.get("val_loss"))
    cells = [f"{row['step']:,}", human(view.x(row["step"])) if view.tokens_per_step else "—"]
    cells += [f"{val:.4f}", _perplexity(val)] if val is not None else ["—", "—"]
    if score:
        metric, value, error = _accuracy(score)
        spread = f" ± {100 * error:.2f}" if error is not None else ""
        cells.append(f"{100 * (value or 0):.2f}{spread} % {metric}, {score.protocol}")
    else:
        cells.append("—")
    return "<tr>" + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>"


# ---- samples, configuration, commands ----------------------------------------------------------------


def _sample(sample: Sample) -> str:
    text = sample.text.removeprefix(sample.prompt)
    cut = text[:MAX_CHARS] + (" …" if len(text) > MAX_CHARS else "")
    return f"<blockquote><p><b>{escape(sample.prompt)}</b>{escape(cut)}</p></blockquote>"


def _spread(steps: list[int]) -> list[int]:
    """At most MAX_SECTIONS steps, latest first: evenly spread, the first and the last among them."""
    if len(steps) <= MAX_SECTIONS:
        return steps[::-1]
    last = MAX_SECTIONS - 1
    return [steps[i * (len(steps) - 1) // last] for i in range(last, -1, -1)]


def _samples(view: View) -> str:
    by_step: dict[int, list[Sample]] = {}
    for sample in view.run.samples:
        by_step.setdefault(sample.step, []).append(sample)
    if not by_step:
        return '<section><h2>Samples</h2><p class="absent">No samples yet.</p></section>'
    shown = _spread(list(by_step))
    parts = []
    for i, step in enumerate(shown):
        found = by_step[step]
        body = "".join(_sample(s) for s in found[:MAX_SAMPLES])
        if len(found) > MAX_SAMPLES:
            body += f'<p class="note">{len(found) - MAX_SAMPLES:,} more in samples.jsonl</p>'
        opening = f"{found[0].prompt} {found[0].text.removeprefix(found[0].prompt).strip()}"[:90]
        parts.append(
            f'<h3>{view.at(step)}</h3><div class="texts">{body}</div>'
            if i == 0
            else f"<details><summary>{view.at(step)} <span>{escape(opening)}</span></summary>"
            f'<div class="texts">{body}</div></details>'
        )
    some = f'<p class="note">{len(shown)} of {len(by_step):,} moments; all of them are in samples.jsonl.</p>'
    return f"<section><h2>Samples</h2>{''.join(parts)}{some if len(shown) < len(by_step) else ''}</section>"


def _part(run: Run, key: str) -> dict[str, Any]:
    value = run.get(key)
    return dict(value) if isinstance(value, dict) else {}


def _top(run: Run, *keys: str) -> dict[str, Any]:
    return {key: run.config[key] for key in keys if key in run.config}


def _facts(title: str, values: dict[str, Any]) -> str:
    """A table of names and values; nothing where there are none."""
    if not values:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(k))}</th><td>{escape(value_text(str(k), v))}</td></tr>'
        for k, v in values.items()
    )
    return f"<div><h3>{escape(title)}</h3><table>{rows}</table></div>"


def _starts(run: Run) -> dict[str, str]:
    """When the run was started and continued, at which step, and what had changed by then."""
    history = run.get("history")
    entries = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    return {
        f"step {entry.get('step')}": ", ".join(
            [str(entry.get("started")), *(f"{key} {old} → {new}" for key, (old, new) in _changed(entry))]
        )
        for entry in entries
    }


def _changed(entry: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    changed = entry.get("changed")
    pairs = changed.items() if isinstance(changed, dict) else []
    return [(key, values) for key, values in pairs if isinstance(values, list) and len(values) == 2]


def _configuration(view: View) -> str:
    run = view.run
    if not run.config:
        return '<section><h2>Configuration</h2><p class="absent">No config.json in this run.</p></section>'
    train = number(run.get("data", "train_tokens"))
    epochs = f"{view.x(view.steps) / train:.2f}" if train and view.steps and view.tokens_per_step else None
    device = {"device": run.get("device", "name"), "peak_tflops": run.get("device", "peak_tflops")}
    right = [
        ("Model", _part(run, "model") | _top(run, "n_params", "flops_per_token")),
        ("Data", _part(run, "data") | ({"epochs planned": epochs} if epochs else {})),
        ("Machine", _part(run, "host") | _top(run, "world_size") | (device if _part(run, "device") else {})),
        ("Versions", _part(run, "versions") | _top(run, "git_commit", "started")),
        ("Starts", _starts(run)),
    ]
    return (
        '<section><h2>Configuration and provenance</h2><div class="facts">'
        f"<div>{_facts('Training', _part(run, 'run'))}</div>"
        f"<div>{''.join(_facts(title, values) for title, values in right)}</div></div></section>"
    )


def commands(run: Run) -> list[tuple[str, str]]:
    """What to type to go on from here. Starting a run's command again continues it."""
    folder = run.folder.resolve()
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    typed = run.get("command")
    if not isinstance(typed, list) or not typed:
        preset = run.get("run", "preset")
        typed = [
            "python",
            "pretrain.py",
            *(["--preset", preset] if preset else []),
            "--run-dir",
            shown.as_posix(),
        ]
    world = int(number(run.get("world_size")) or 1)
    launch = ["torchrun", "--standalone", f"--nproc_per_node={world}"] if world > 1 else ["python"]
    again = shlex.join([*launch, *(str(part) for part in typed[1:])])
    model = shlex.quote(shown.as_posix())
    return [
        ("Continue the run", again),
        ("Generate text", f'python generate.py -m {model} "Once upon a time"'),
        ("Score on HellaSwag", f"python hellaswag.py -m {model}"),
    ]


def _commands(run: Run) -> str:
    rows = "".join(f"<dt>{escape(what)}</dt><dd><code>{escape(line)}</code></dd>" for what, line in commands(run))
    return f'<section><h2>Commands</h2><dl class="commands">{rows}</dl></section>'


# ---- the page ----------------------------------------------------------------------------------------


def build_page(run: Run) -> str:
    """The whole document as text."""
    view = View.of(run)
    tiles = (_loss_tile, _val_tile, _hellaswag_tile, _speed_tile, _time_tile)
    version = str(run.get("versions", "aymen_gpt") or "")
    style, script = ((resources.files(__package__) / f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{script_hash}'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(run.name)} · Aymen-GPT</title>\n<style>{style}</style></head>\n<body><main>"
        f'{_header(view)}<dl class="tiles">{"".join(tile(view) for tile in tiles)}</dl>\n'
        f"{_charts(view)}\n{_samples(view)}\n{_configuration(view)}\n{_commands(run)}"
        f"<footer>Aymen-GPT {escape(version)} · made from config.json, metrics.jsonl, status.json and "
        "samples.jsonl beside this file; it loads nothing else.</footer>"
        f"</main><script>{script}</script></body></html>\n"
    )


def write_report(folder: Path) -> Path:
    """Write ``folder``/report.html, whole or not at all, and return its path."""
    path = Path(folder) / "report.html"
    page = build_page(read_run(Path(folder)))
    try:
        replace_text(path, page)
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror or error}") from error
    return path
