"""Run folders -> a page: one file that opens by double click, complete without network or script.

``write_report(read_run(Path("runs/demo")))`` may be called at any moment of a run, by the trainer or by hand; the
page is written beside and renamed, so a browser never sees half of it. Here are the values, report.html.j2 has the
words: it escapes whatever comes from a run. A Content-Security-Policy forbids the page to load anything at all.
"""

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from aymen_gpt.files import replace_text
from aymen_gpt.reporting import plots
from aymen_gpt.reporting.run_folder import Run, number
from aymen_gpt.wording import HELLASWAG_EXAMPLES, PROTOCOLS, duration, forecast, human, percent, shape

HERE = Path(__file__).parent
UNITS = {  # of config.json's keys, where the name does not say it
    "steps": "updates", "warmup_steps": "updates", "val_every": "updates", "hellaswag_every": "updates",
    "hellaswag_limit": "examples", "checkpoint_every": "updates", "tokens_per_step": "tokens",
    "block_size": "tokens", "micro_batch": "rows", "vocab_size": "tokens", "n_params": "parameters",
    "flops_per_token": "FLOP", "train_tokens": "tokens", "val_tokens": "tokens", "memory_gb": "GB",
    "peak_tflops": "TFLOP/s", "cores": "cores",
}  # fmt: skip
# Sizes of charts, in CSS pixels.
WHOLE, HALF, FLAT, THIRD, PHONE = (1056, 400), (508, 300), (508, 200), (326, 190), (354, 290)
MAX_SECTIONS, MAX_SAMPLES, MAX_CHARS = 24, 6, 2000  # samples shown: steps, per step, characters each
MAX_ROWS = 400  # of the table of validations


def write_report(run: Run, out: Path | None = None) -> Path:
    """Write the page of a run to report.html in its folder, or to ``out``, whole or not at all; its path."""
    path = out or run.folder / "report.html"
    rows = [row for row in run.rows if "val_loss" in row or "hellaswag" in row]
    page = TEMPLATES.get_template("report.html.j2").render(
        run=run,
        shape=shape(run.table("model"), run.get("n_params")) or "GPT",
        now=standing(run),
        loss=loss_chart(run),
        hellaswag=hellaswag_charts(run),
        small=small_charts(run),
        validations={"rows": thinned(rows, MAX_ROWS), "n": len(rows)},
        measured={score.step: score for score in run.scores("completion")},
        samples=samples(run),
        configuration=list(configuration(run).items()),
        commands=commands(run),
    )
    replace_text(path, page, follow=out is not None)
    return path


def write_comparison(runs: Sequence[Run], out: Path) -> Path:
    """Write one page with the curves of several runs on shared axes, and what differs between them."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [run.folder.as_posix() for run in runs]
    title = "Loss by tokens read"
    page = TEMPLATES.get_template("compare.html.j2").render(
        title=" · ".join(names),
        runs=[(name, run, standing(run)) for name, run in zip(names, runs, strict=True)],
        colours=[plots.RUNS[i % len(plots.RUNS)] for i in range(len(runs))],
        chart=Chart(title, "nats per token", drawings("tokens", title, partial(plots.losses, runs), WHOLE)),
        differences=differences(runs),
    )
    replace_text(out, page, follow=True)
    return out


# ---- where a run stands ------------------------------------------------------------------------------


def standing(run: Run) -> dict[str, Any]:
    """Where the run stands, in numbers; None for what is not known."""
    steps = number(run.status.get("steps")) or number(run.get("run", "steps"))
    step = max(int(number(run.status.get("step")) or 0), run.step)
    n_loss, spent, each = len(run.series("loss")), sum(run.finite("step_seconds")), recent(run, "step_seconds")
    wall = wall_seconds(run)
    left = steps - run.step if steps and run.status.get("state") == "running" else 0
    return {
        "step": step,
        "steps": int(steps) if steps else None,
        "per_step": run.tokens_per_step,
        "share": min(1.0, step / steps) if steps else 0.0,
        "updated": moment(run.status.get("updated")),
        "started": moment(run.get("started")),
        "loss": run.last("loss"),
        "n_loss": n_loss,
        "n_bad": n_loss - len(run.finite("loss")),
        "validation": next(((s, v) for s, v in reversed(run.series("val_loss")) if v is not None), None),
        "score": run.score("completion") or run.score("harness"),
        "speed": recent(run, "tokens_per_second"),
        "mfu": recent(run, "mfu"),
        "world": int(number(run.get("world_size")) or 1),
        "spent": spent,
        "elapsed": max(wall or 0.0, spent) if spent or wall is not None else None,
        "left": left * each if each and left > 0 else None,
    }


def wall_seconds(run: Run) -> float | None:
    """How long the parts of a run took together, without the pauses between them; None when that is not known."""
    parts = run.history or [{"started": run.get("started")}]
    ends = [part.get("ended") for part in parts[:-1]] + [run.status.get("updated")]
    seconds = 0.0
    for part, ended in zip(parts, ends, strict=True):
        start, end = moment(part.get("started")), moment(ended)
        if start is None or end is None:
            return None
        seconds += (end - start).total_seconds()
    return seconds


def recent(run: Run, key: str, n: int = 50) -> float | None:
    """Median of the last ``n`` finite values: what the run does now, without its hiccups."""
    values = sorted(run.finite(key)[-n:])
    return values[len(values) // 2] if values else None


def thinned(values: list[Any], most: int) -> list[Any]:
    """At most ``most`` of them, the last first: evenly spread, the first and the last among them."""
    if len(values) <= most:
        return values[::-1]
    return [values[i * (len(values) - 1) // (most - 1)] for i in range(most - 1, -1, -1)]


# ---- charts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chart:
    """A figure of the page: its drawings, each with the class that says for which width; none: only the note."""

    title: str
    unit: str = ""
    drawings: Sequence[tuple[str, Markup]] = ()
    note: str = ""


def drawings(name: str, label: str, draw: Callable[..., Figure], size: plots.Size) -> list[tuple[str, Markup]]:
    """A drawing for any width if it is small, else one for wide windows and one for phones; ``label`` is heard."""
    sizes = {"": size} if size == THIRD else {"wide": size, "phone": PHONE}
    return [(kind, Markup(plots.svg(draw(size=size), f"{name}{kind}", label))) for kind, size in sizes.items()]


def loss_chart(run: Run) -> Chart:
    loss, measured = run.finite("loss"), run.finite("val_loss")
    if not loss and not measured:
        return Chart("Loss", note="No loss yet: the first update will put a point here.")
    said = [f"{name} {found[-1]:.3f}" for name, found in (("training", loss), ("validation", measured)) if found]
    label = f"Loss by {plots.unit(run)}, now: {', '.join(said)}."
    top = plots.loss_limits(plots.curve(run, "loss"), plots.curve(run, "val_loss"))[1]
    above = {"begins at": max(loss[:1] + measured[:1]), "reaches": max(loss + measured)}
    word = next((word for word, value in above.items() if value > top), "")
    notes = [f"The run {word} {above[word]:.2f}, above the frame."] if word else []
    note = " ".join(notes + forecast_notes(run))
    return Chart("Loss", "nats per token", drawings("loss", label, partial(plots.loss, run), WHOLE), note)


def forecast_notes(run: Run) -> list[str]:
    """A sentence about the latest forecast; of a run at its end, how many forecasts were right."""
    found, end = run.forecasts, dict(run.series("val_loss")).get(run.get("run", "steps"))
    if found and end is not None:
        right = sum(f["low"] <= end <= f["high"] for f in found)
        return [f"{right} of the run's {len(found)} forecasts held the final validation loss in their interval."]
    last = [f"After step {f['step']:,} the final validation loss is forecast as {forecast(f)}" for f in found[-1:]]
    return [f"{text}; odds {percent(found[-1].get('odds'), digits=0)}." for text in last]


def hellaswag_charts(run: Run) -> list[Chart]:
    """The scores made while training, where there are two to see, and the latest ones beside published ones."""
    charts, scores = [], run.scores("completion")  # the protocol of training
    if len(scores) > 1:
        label = f"{scores[-1].metric} by the completion protocol, now {percent(scores[-1].value)}."
        drawn = drawings("hellaswag-completion", label, partial(plots.hellaswag, run), HALF)
        charts.append(Chart("HellaSwag while training", f"{scores[-1].metric}, completion", drawn))
    latest = [score for protocol in PROTOCOLS if (score := run.score(protocol))]
    if latest:
        label = "; ".join(f"{s.metric}, {s.protocol}: {percent(s.value, s.error)}" for s in latest)
        how = " ".join(f"{s.protocol.capitalize()}: {PROTOCOLS[s.protocol]}." for s in latest)
        note = f"Bars: one standard error. Only rows of one group compare. {how}"
        drawn = drawings("scores", label, partial(plots.scores, run), HALF)
        charts.append(Chart("HellaSwag, latest", "", drawn, note))
    return charts


def small_charts(run: Run) -> list[Chart]:
    named = {
        "lr": ("Learning rate", ""),
        "grad_norm": ("Gradient norm", "before clipping"),
        "tokens_per_second": ("Throughput", "tokens/s"),
        "mfu": ("MFU", "of peak FLOP/s"),
    }
    charts, size = [], FLAT if run.last("mfu") is not None else THIRD
    for key, (title, unit) in named.items():
        now = run.last(key)
        if now is not None:
            label = f"{title} by {plots.unit(run)}, now {human(now)}."
            charts.append(Chart(title, unit, drawings(key, label, partial(plots.small, run, key), size)))
        elif key != "mfu":
            charts.append(Chart(title, unit, note="Not measured yet."))
    return charts


# ---- words -------------------------------------------------------------------------------------------


def moment(value: Any) -> datetime | None:
    """An ISO time as UTC; None where it is none. A time without a zone is taken as UTC."""
    try:
        when = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).astimezone(UTC)


def day(when: datetime) -> str:
    return f"{when.day} {when:%B %Y, %H:%M} UTC"


def perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.1f}" if loss < 7 else human(math.exp(min(loss, 700)))


def value_text(value: Any, key: str = "") -> str:
    """A configuration value for people: numbers with separators and units, true as "yes", absent as "—"."""
    if value is None or value == "":
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        said = {k: value_text(v, k) for k, v in value.items() if v is not None}
        return said.get("name") or ", ".join(f"{k}: {text}" for k, text in said.items())
    if isinstance(value, list):
        more = f" and {len(value) - 3:,} more" if len(value) > 3 else ""
        return ", ".join(value_text(v) for v in value[:3]) + more
    if isinstance(value, str) or number(value) is None:
        return str(value)
    if isinstance(value, int):
        text = str(value) if key == "seed" else f"{value:,}"
    else:
        text = human(value) if abs(value) < 0.01 else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    unit = UNITS.get(key, "")
    return f"{text} {unit.removesuffix('s') if value == 1 else unit}".rstrip()


def samples(run: Run) -> dict[str, Any]:
    """sections: (step, [(prompt, text)], how many more) of some steps, the last first; n: of how many steps."""
    by_step: dict[int, list[tuple[str, str]]] = {}
    for s in run.samples:
        text = s.text.removeprefix(s.prompt)
        cut = text[:MAX_CHARS] + (" …" if len(text) > MAX_CHARS else "")
        by_step.setdefault(s.step, []).append((s.prompt, cut))
    steps = thinned(list(by_step), MAX_SECTIONS)
    sections = [(s, by_step[s][:MAX_SAMPLES], max(0, len(by_step[s]) - MAX_SAMPLES)) for s in steps]
    return {"sections": sections, "n": len(by_step)}


def configuration(run: Run) -> dict[str, dict[str, Any]]:
    """Tables of config.json by title, empty ones left out."""

    def top(*keys: str) -> dict[str, Any]:
        return {key: run.config[key] for key in keys if key in run.config}

    train, steps, per_step = (
        number(run.get("data", "train_tokens")),
        number(run.get("run", "steps")),
        run.tokens_per_step,
    )
    epochs = {"epochs planned": round(steps * per_step / train, 2)} if train and steps and per_step else {}
    device = {"device": run.get("device", "name"), "peak_tflops": run.get("device", "peak_tflops")}
    tables = {
        "Training": run.table("run"),
        "Model": run.table("model") | top("n_params", "flops_per_token"),
        "Data": run.table("data") | epochs,
        "Machine": run.table("host") | top("world_size") | (device if run.table("device") else {}),
        "Versions": run.table("versions") | top("git_commit", "started"),
        "Starts": starts(run),
    }
    return {title: values for title, values in tables.items() if values}


def starts(run: Run) -> dict[str, str]:
    """When the run was started and continued, at which step, and what had changed by then."""
    told = {}
    for entry in run.history:
        words = [f"{key} {old} → {new}" for key, (old, new) in (entry.get("changed") or {}).items()]
        told[f"step {entry.get('step')}"] = ", ".join([str(entry.get("started")), *words])
    return told


def commands(run: Run) -> list[tuple[str, str]]:
    """What to type to go on from here. Starting a run's command again continues it."""
    folder = run.folder.resolve()
    shown = (folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder).as_posix()
    typed = run.get("command") or ["python", "pretrain.py", "--run-dir", shown]
    world = int(number(run.get("world_size")) or 1)
    launch = ["torchrun", "--standalone", f"--nproc_per_node={world}"] if world > 1 else ["python"]
    model, score = shlex.quote(shown), shlex.quote(f"{shown}/hellaswag.json")
    return [
        ("Continue the run", shlex.join([*launch, *(str(part) for part in typed[1:])])),
        ("Generate text", f'python generate.py -m {model} "Once upon a time"'),
        ("Score on HellaSwag", f"python hellaswag.py -m {model} --json {score}"),
        ("Draw this page anew, with the score", f"python -m aymen_gpt report {model}"),
    ]


def differences(runs: Sequence[Run]) -> list[tuple[str, str, list[str]]]:
    """(table, key, a value of each run) of the configuration, where the runs do not agree."""
    tables = [configuration(run) for run in runs]
    found = []
    for title in ("Training", "Model", "Data", "Machine", "Versions"):
        for key in dict.fromkeys(key for table in tables for key in table.get(title, {})):
            texts = [value_text(table.get(title, {}).get(key), key) for table in tables]
            if len(set(texts)) > 1 and key not in ("run", "name", "started"):
                found.append((title, key, texts))
    return found


TEMPLATES = Environment(  # which escape every value unless it is Markup of ours
    loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
)
TEMPLATES.filters |= {word.__name__: word for word in (human, percent, duration, perplexity, value_text, day)}
TEMPLATES.filters |= {"count": "{:,.0f}".format, "finite": number}
TEMPLATES.globals |= {"css": Markup((HERE / "page.css").read_text("utf-8")), "all_examples": HELLASWAG_EXAMPLES}
