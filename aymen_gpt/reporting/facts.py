"""Every number that may be stated about a run, each with the file it was read from.

A text never holds such a number itself. research-report.tex says ``\\R{run.val-loss}``; README and docs/ say the
number followed by a comment that names it, ``5.335<!--run.val-loss-->``, and a test compares the two. So a result
can be stated only while the artefact that shows it is there.
"""

import math
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from aymen_gpt.reporting.anchors import ANCHORS, CHANCE
from aymen_gpt.reporting.charts import human
from aymen_gpt.reporting.runs import Run, number, read_object

UNKNOWN = "not measured"
ALL_EXAMPLES = 10_042  # of HellaSwag's validation set


@dataclass(frozen=True)
class Artefact:
    """A file that numbers come from, and what made it."""

    path: Path
    command: str


@dataclass(frozen=True)
class Fact:
    """One number as a reader sees it ("5.335"), ``where`` in its artefact it stands; UNKNOWN if it does not."""

    name: str
    shown: str
    artefact: Artefact
    where: str


def shown(value: Any, form: Callable[[Any], str] | str = "{}") -> str:
    """A value in words: by a format string or a function; None and what is not finite are UNKNOWN."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return UNKNOWN
    return form.format(value) if isinstance(form, str) else form(value)


def share(value: float) -> str:
    """0.2381 -> "23.8 %": a decimal of a percent is finer than any error here."""
    return f"{100 * value:.1f} %"


def rate(value: float) -> str:
    """0.003 -> "0.003", 6e-05 -> "6e-5"."""
    return human(value) if value < 0.001 else f"{value:g}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 262 -> "4.4 minutes"."""
    for size, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


# name -> (path in config.json, how it is shown)
CONFIG: dict[str, tuple[tuple[str, ...], Callable[[Any], str] | str]] = {
    "name": (("run", "run"), str),
    "preset": (("run", "preset"), str),
    "params": (("n_params",), "{:,}"),
    "params-short": (("n_params",), human),
    "layers": (("model", "n_layer"), "{}"),
    "heads": (("model", "n_head"), "{}"),
    "width": (("model", "n_embd"), "{}"),
    "context": (("model", "block_size"), "{:,}"),
    "flops-per-token": (("flops_per_token",), human),
    "steps-planned": (("run", "steps"), "{:,}"),
    "tokens-per-step": (("run", "tokens_per_step"), "{:,}"),
    "peak-rate": (("run", "learning_rate"), rate),
    "min-rate-ratio": (("run", "min_lr_ratio"), "{:g}"),
    "warmup-steps": (("run", "warmup_steps"), "{:,}"),
    "weight-decay": (("run", "weight_decay"), "{:g}"),
    "beta1": (("run", "beta1"), "{:g}"),
    "beta2": (("run", "beta2"), "{:g}"),
    "grad-clip": (("run", "grad_clip"), "{:g}"),
    "seed": (("run", "seed"), "{}"),
    "dtype": (("run", "dtype"), str),
    "val-tokens": (("run", "val_tokens"), "{:,}"),
    "data": (("data", "folder"), str),
    "data-sha256": (("data", "manifest_sha256"), lambda text: f"{text[:16]}..."),
    "train-tokens": (("data", "train_tokens"), "{:,}"),
    "held-out-tokens": (("data", "val_tokens"), "{:,}"),
    "device": (("device", "name"), str),
    "cores": (("host", "cores"), "{}"),
    "memory": (("host", "memory_gb"), "{:.0f} GB"),
    "processes": (("world_size",), "{}"),
    "python": (("versions", "python"), str),
    "torch": (("versions", "torch"), str),
    "commit": (("git_commit",), lambda text: text[:12]),
    "started": (("started",), lambda text: text[:10]),
    "starts": (("history",), lambda starts: str(len(starts))),
}


def run_facts(run: Run) -> list[Fact]:
    """All facts of a run folder or of its digest (commands/report.py), named run.*"""
    config, metrics, samples = (artefact(run, n) for n in ("config.json", "metrics.jsonl", "samples.jsonl"))
    facts = [
        Fact(f"run.{name}", shown(run.get(*path), form), config, ".".join(path))
        for name, (path, form) in CONFIG.items()
    ]
    facts += [Fact(f"run.{name}", text, metrics, where) for name, text, where in _measured(run)]
    status = artefact(run, "status.json")
    facts.append(Fact("run.state", shown(run.status.get("state")), status, "state"))
    facts.append(
        Fact("run.samples", str(len(run.samples)) if run.samples else UNKNOWN, samples, "samples, counted")
    )
    return facts + _scores(run)


def artefact(run: Run, name: str) -> Artefact:
    """A file of the run, with the command that wrote it as far as the run's own files tell."""
    command = run.get("command")
    typed = shlex.join(str(word) for word in command) if isinstance(command, list) else "python pretrain.py"
    if name == "hellaswag.json":
        found = read_object(run.folder / name)
        typed = f"python hellaswag.py -m {found.get('model')} --limit {found.get('n')} --json hellaswag.json"
    return Artefact(run.folder / name, typed)


def _measured(run: Run) -> list[tuple[str, str, str]]:
    """(name, shown, where) of what metrics.jsonl says."""
    vals = [(step, v) for step, v in run.series("val_loss") if v is not None]
    losses = [v for _, v in run.series("loss") if v is not None][-50:]
    speeds = [v for _, v in run.series("tokens_per_second") if v is not None]
    seconds = [v for _, v in run.series("step_seconds") if v is not None]
    steps = run.rows[-1]["step"] if run.rows else None
    tokens, mfu = run.last("tokens"), [v for _, v in run.series("mfu") if v is not None]
    complete = steps is not None and len(seconds) == steps
    train = number(run.get("data", "train_tokens"))
    last_val = vals[-1][1] if vals else None
    skipped = sum(bool(row.get("skipped")) for row in run.rows) if run.rows else None
    return [
        ("steps", shown(steps, "{:,}"), "step of the last row"),
        ("tokens", shown(tokens, "{:,.0f}"), "tokens of the last row"),
        ("tokens-short", shown(tokens, human), "tokens of the last row"),
        ("epochs", shown(tokens and train and tokens / train, "{:.2f}"), "last tokens / config's train_tokens"),
        ("first-val-loss", shown(vals[0][1] if vals else None, "{:.2f}"), "first val_loss"),
        ("val-loss", shown(last_val, "{:.3f}"), "last val_loss"),
        ("val-step", shown(vals[-1][0] if vals else None, "{:,}"), "step of the last val_loss"),
        ("perplexity", shown(last_val and math.exp(min(last_val, 100)), "{:,.0f}"), "exp of the last val_loss"),
        ("train-loss", shown(fmean(losses) if losses else None, "{:.3f}"), "loss, mean of the last 50"),
        ("speed", shown(median(speeds) if speeds else None, "{:,.0f}"), "tokens_per_second, median"),
        ("training-time", shown(sum(seconds) if complete else None, duration), "step_seconds, summed"),
        ("mfu", shown(median(mfu) if mfu else None, share), "mfu, median"),
        ("skipped", shown(skipped, "{:,}"), "rows with skipped, counted"),
    ]


def _scores(run: Run) -> list[Fact]:
    """The last word on HellaSwag: hellaswag.json, both protocols, acc and acc_norm."""
    source, found = artefact(run, "hellaswag.json"), read_object(run.folder / "hellaswag.json")
    facts = [Fact("run.hellaswag-n", shown(found.get("n"), "{:,}"), source, "n")]
    for protocol in ("completion", "harness"):
        part = scored(found, protocol)
        for metric in ("acc", "acc_norm"):
            name = f"run.{protocol}-{metric.replace('_', '-')}"
            value, error = number(part.get(metric)), number(part.get(f"{metric}_stderr"))
            facts.append(Fact(name, shown(value, share), source, f"{protocol}.{metric}"))
            points = shown(error, lambda e: f"{100 * e:.1f}")
            facts.append(Fact(f"{name}-stderr", points, source, f"{protocol}.{metric}_stderr, points"))
    return facts


def scored(found: dict[str, Any], protocol: str) -> dict[str, Any]:
    """The part of a hellaswag.json that one protocol made, {} where it did not score."""
    part = found.get(protocol)
    return part if isinstance(part, dict) else {}


def published_facts(code: Path) -> list[Fact]:
    """Scores of others, from anchors.py, named published.MODEL.PROTOCOL.METRIC, and what chance would score."""
    source = Artefact(code, "kept by hand, each with its source")
    facts = [
        Fact(
            f"published.{slug(a.model)}.{a.protocol}.{slug(a.metric)}",
            f"{100 * a.value:.2f}".rstrip("0").rstrip(".") + " %",
            source,
            a.source,
        )
        for a in ANCHORS
    ]
    spread = math.sqrt(0.337 * (1 - 0.337) / (ALL_EXAMPLES - 1))
    facts.append(Fact("published.chance", share(CHANCE).replace(".0", ""), source, "one ending of four"))
    facts.append(Fact("published.n", f"{ALL_EXAMPLES:,}", source, "examples of the validation set"))
    where = "sqrt(p(1 - p) / (n - 1)) at GPT-3 Small's p, in points"
    return facts + [Fact("published.stderr", f"{100 * spread:.2f}", source, where)]


def slug(text: str) -> str:
    """A name's part in lower case, words joined by dashes: "GPT-2 124M" -> "gpt-2-124m"."""
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in text.lower()).split())


def by_name(facts: Iterable[Fact]) -> dict[str, Fact]:
    found = {}
    for fact in facts:
        assert fact.name not in found, f"two facts are named {fact.name}"
        found[fact.name] = fact
    return found
