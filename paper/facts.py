"""Every number that may be stated about a run, each with the file it was read from.

A text never holds such a number itself. research-report.tex says ``\\R{run.val-loss}``; README and docs/ say the
number followed by a comment that names it, ``5.335<!--run.val-loss-->``, and a test compares the two. So a result
can be stated only while the artefact that shows it is there.
"""

import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any

from aymen_gpt.model.gpt import GPTConfig
from aymen_gpt.reporting.plots import continued
from aymen_gpt.reporting.published_scores import ANCHORS, CHANCE
from aymen_gpt.reporting.run_folder import Run, number, read_object
from aymen_gpt.training.config import TrainConfig, resolve
from aymen_gpt.wording import HELLASWAG_EXAMPLES, PROTOCOLS, duration, human, percent

BENCHMARKS = "docs/results/benchmarks"
CLAIMED_HOURS = 7  # the first version's README, for 40B tokens on eight A100
A100_PEAK = 312e12  # bf16 FLOP/s, NVIDIA's data sheet

Form = Callable[[Any], str] | str


@dataclass(frozen=True)
class Artefact:
    """A file that numbers come from, and what made it."""

    path: Path
    command: str


@dataclass(frozen=True)
class Fact:
    """One number as a reader sees it ("5.335"), None if not measured, and ``where`` in its artefact it stands."""

    name: str
    shown: str | None
    artefact: Artefact
    where: str


def all_facts(run: Run, root: Path) -> list[Fact]:
    """Everything that README, docs and paper of the checkout ``root`` may state."""
    found = [*run_facts(run), *plan_facts(root, run), *published_facts(root)]
    found += [fact for record in benchmarks(root) for row in record.rows.values() for fact in row]
    names = [fact.name for fact in found]
    assert len(set(names)) == len(names), "two facts have one name"
    return found


def known(facts: list[Fact]) -> dict[str, str]:
    """{name: shown} of what was measured and whose artefact is there."""
    return {f.name: f.shown for f in facts if f.shown is not None and f.artefact.path.is_file()}


def shown(value: Any, form: Form = "{}") -> str | None:
    """A value in words: by a format string or a function; None and what is not finite stay unknown."""
    if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return form.format(value) if isinstance(form, str) else form(value)


def share(value: float) -> str:
    """0.2381 -> "23.8 %": a decimal of a percent is finer than any error here."""
    return percent(value, digits=1)


def rate(value: float) -> str:
    """0.003 -> "0.003", 6e-05 -> "6e-5"."""
    return human(value) if value < 0.001 else f"{value:g}"


def slug(text: str) -> str:
    """A name's part in lower case, words joined by dashes: "GPT-2 124M" -> "gpt-2-124m"."""
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in text.lower()).split())


# ---- of the run --------------------------------------------------------------------------------------

CONFIG: dict[str, tuple[str, Form]] = {  # name -> path in config.json, how it is shown
    "name": ("run.run", str),
    "params": ("n_params", "{:,}"),
    "layers": ("model.n_layer", "{}"),
    "heads": ("model.n_head", "{}"),
    "width": ("model.n_embd", "{}"),
    "context": ("model.block_size", "{:,}"),
    "flops-per-token": ("flops_per_token", human),
    "steps-planned": ("run.steps", "{:,}"),
    "tokens-per-step": ("run.tokens_per_step", "{:,}"),
    "peak-rate": ("run.learning_rate", rate),
    "min-rate-ratio": ("run.min_lr_ratio", "{:g}"),
    "warmup-steps": ("run.warmup_steps", "{:,}"),
    "weight-decay": ("run.weight_decay", "{:g}"),
    "beta1": ("run.beta1", "{:g}"),
    "beta2": ("run.beta2", "{:g}"),
    "grad-clip": ("run.grad_clip", "{:g}"),
    "seed": ("run.seed", "{}"),
    "dtype": ("run.dtype", str),
    "val-tokens": ("run.val_tokens", "{:,}"),
    "init-from": ("run.init_from", str),
    "data": ("data.folder", str),
    "data-repo": ("data.source.repo", str),
    "data-sha256": ("data.manifest_sha256", lambda text: f"{text[:16]}..."),
    "train-tokens": ("data.train_tokens", "{:,}"),
    "held-out-tokens": ("data.val_tokens", "{:,}"),
    "device": ("device.name", str),
    "cores": ("host.cores", "{}"),
    "processes": ("world_size", "{}"),
    "torch": ("versions.torch", str),
    "commit": ("git_commit", lambda text: text[:12]),
    "started": ("started", lambda text: text[:10]),
    "command": ("command", lambda words: shlex.join(map(str, words))),
}


def artefact(run: Run, name: str) -> Artefact:
    """A file of the run, with the command that wrote it as far as the run's own files tell."""
    typed = shown(run.get("command"), CONFIG["command"][1]) or "python pretrain.py"
    if name == "hellaswag.json":
        found = run.hellaswag
        typed = f"python hellaswag.py -m {found.get('model')} --limit {found.get('n')} --json hellaswag.json"
    return Artefact(run.folder / name, typed)


def run_facts(run: Run) -> Iterator[Fact]:
    """All facts of a run folder or of its digest (tools/record.py), named run.*"""
    for name, (path, form) in CONFIG.items():
        yield Fact(f"run.{name}", shown(run.get(*path.split(".")), form), artefact(run, "config.json"), path)
    for file, name, value, form, where in counted(run):
        yield Fact(f"run.{name}", shown(value, form), artefact(run, file), where)
    yield from scores(run)


def data_files(run: Run) -> str | None:
    """The names of the text's files, at most three."""
    files = run.get("data", "source", "files")
    names = [str(f.get("name")) for f in files if isinstance(f, dict)] if isinstance(files, list) else []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else None


def counted(run: Run) -> list[tuple[str, str, Any, Form, str]]:
    """(file, name, value, form, where) of what is counted or computed from a file of the run; None: not known."""
    vals = [(step, v) for step, v in run.series("val_loss") if v is not None]
    loss, speed, seconds, mfu = map(run.finite, ("loss", "tokens_per_second", "step_seconds", "mfu"))
    tokens, train, files = run.last("tokens"), number(run.get("data", "train_tokens")), data_files(run)
    last_step, last = vals[-1] if vals else (None, None)
    complete = bool(seconds) and len(seconds) == run.step
    skipped = sum(bool(row.get("skipped")) for row in run.rows) if run.rows else None
    builtin = "yes" if (files or "").startswith("builtin-") else None
    config, metrics = "config.json", "metrics.jsonl"
    return [
        (config, "continued-at", ", ".join(f"{step:,}" for step in continued(run)), "{}", "history"),
        (config, "data-files", files, "{}", "data.source.files"),
        (config, "builtin", builtin, "{}", "data.source.files"),
        (metrics, "steps", run.step or None, "{:,}", "step of the last row"),
        (metrics, "tokens", tokens, "{:,.0f}", "tokens of the last row"),
        (metrics, "epochs", tokens and train and tokens / train, "{:.2f}", "last tokens / config's train_tokens"),
        (metrics, "first-val-loss", vals[0][1] if len(vals) > 1 else None, "{:.2f}", "first val_loss"),
        (metrics, "val-loss", last, "{:.3f}", "last val_loss"),
        (metrics, "val-step", last_step, "{:,}", "step of the last val_loss"),
        (metrics, "perplexity", last and math.exp(min(last, 100)), "{:,.0f}", "exp of the last val_loss"),
        (metrics, "train-loss", fmean(loss[-50:]) if loss else None, "{:.3f}", "loss, mean of the last 50"),
        (metrics, "speed", median(speed) if speed else None, "{:,.0f}", "tokens_per_second, median"),
        (metrics, "training-time", sum(seconds) if complete else None, duration, "step_seconds, summed"),
        (metrics, "mfu", median(mfu) if mfu else None, share, "mfu, median"),
        (metrics, "skipped", skipped, "{:,}", "rows with skipped, counted"),
        ("status.json", "state", run.status.get("state"), "{}", "state"),
        ("samples.jsonl", "samples", len(run.samples) or None, "{}", "samples, counted"),
    ]


def scores(run: Run) -> Iterator[Fact]:
    """The newest and largest score of each protocol, of training or of hellaswag.json, acc and acc_norm."""
    found = {protocol: run.score(protocol) for protocol in PROTOCOLS}
    for protocol, score in found.items():
        away = (score.value - CHANCE) / score.error if score and score.error else None
        apart = f"{{:.1f}} standard errors {'above' if (away or 0) > 0 else 'below'}"
        said: list[tuple[str, Any, Form, str]] = [
            ("from-chance", away and abs(away), apart, protocol),
            ("n", score and score.n, "{:,}", "n"),
            ("step", score and score.step, "{:,}", "step"),
        ]
        for metric in ("acc", "acc_norm"):
            value, error = (getattr(score, key, None) for key in (metric, f"{metric}_stderr"))
            points, where = None if error is None else 100 * error, f"{protocol}.{metric}"
            said.append((slug(metric), value, share, where))
            said.append((f"{slug(metric)}-stderr", points, "{:.1f}", f"{where}_stderr, points"))
        source = artefact(run, score.file if score else "metrics.jsonl")
        for name, value, form, where in said:
            yield Fact(f"run.{protocol}-{name}", shown(value, form), source, where)
    latest = found["completion"] or found["harness"]
    source = artefact(run, latest.file if latest else "metrics.jsonl")
    yield Fact("run.hellaswag-n", shown(latest and latest.n, "{:,}"), source, "n")


# ---- of the recipe, of others, of benchmarks ---------------------------------------------------------


def plan_facts(root: Path, run: Run) -> Iterator[Fact]:
    """The recipe of the published run, as `python pretrain.py` without options would do it: plan.*"""
    plan, shape = resolve({}), GPTConfig()
    recipe = Artefact(root / "aymen_gpt/training/config.py", "python pretrain.py --help")
    code = Artefact(root / "aymen_gpt/model/gpt.py", "python pretrain.py --help")
    tokens, done = plan.steps * plan.tokens_per_step, run.last("tokens")
    claimed = tokens / CLAIMED_HOURS / 3600
    mfu = claimed * shape.flops_per_token / (8 * A100_PEAK)
    repeated = run.get("n_params") == shape.n_params and (done or 0) >= tokens
    facts: list[tuple[Artefact, str, Any, Form, str]] = [
        (recipe, "tokens", tokens, "{:,}", "steps x tokens_per_step"),
        (recipe, "tokens-short", tokens, human, "steps x tokens_per_step"),
        (recipe, "warmup-tokens", plan.warmup_steps * plan.tokens_per_step, human, "warmup x tokens"),
        (recipe, "run-share", done and 100 * done / tokens, "{:.2g} %", "run.tokens / plan.tokens"),
        (recipe, "repeated", "yes" if repeated else None, "{}", "run.tokens and run.params are the plan's"),
        (recipe, "claimed-speed", claimed / 1e6, "{:.2f} million", "plan.tokens / 7 hours"),
        (recipe, "claimed-mfu", mfu, share, "claimed-speed x flops-per-token / (8 x 312 TFLOP/s)"),
        (code, "params", shape.n_params, "{:,}", "GPTConfig().n_params"),
        (code, "flops-per-token", shape.flops_per_token, human, "flops_per_token"),
        (code, "padded-vocabulary", shape.padded_vocab_size, "{:,}", "GPTConfig().padded_vocab_size"),
    ]
    sizes = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    facts += [(code, slug(name), getattr(shape, name), "{:,}", name) for name in sizes]
    for f in fields(TrainConfig):
        value = getattr(plan, f.name)
        told = f.metadata["group"] in ("run", "recipe", "watching") and f.name != "block_size"
        if told and not isinstance(value, str | bool | None):
            counted = isinstance(value, int) and f.name != "seed"
            facts.append((recipe, slug(f.name), value, "{:,}" if counted else rate, f.name))
    for source, name, value, form, where in facts:
        yield Fact(f"plan.{name}", shown(value, form), source, where)


def published_facts(root: Path) -> Iterator[Fact]:
    """Scores of others, named published.MODEL.PROTOCOL.METRIC, and what chance would score."""
    source = Artefact(root / "aymen_gpt/reporting/published_scores.py", "kept by hand, each with its source")
    for a in ANCHORS:
        name = f"published.{slug(a.model)}.{a.protocol}.{slug(a.metric)}"
        yield Fact(name, f"{100 * a.value:.4g} %", source, a.source)
    yield Fact("published.chance", percent(CHANCE, digits=0), source, "one ending of four")
    yield Fact("published.n", f"{HELLASWAG_EXAMPLES:,}", source, "examples of the validation set")
    spread = math.sqrt(0.337 * (1 - 0.337) / (HELLASWAG_EXAMPLES - 1))
    where = "sqrt(p(1 - p) / (n - 1)) at GPT-3 Small's p, in points"
    yield Fact("published.stderr", f"{100 * spread:.2f}", source, where)


MEASURES: dict[str, tuple[str, Form]] = {  # keys of a benchmark's rows -> head of the column, how it is shown
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "examples_per_second": ("examples/s", "{:.2f}"),
    "ours_is_times": ("ours is", "{:.2f}x"),
    "ours_is_times.float32": ("ours, float32, is", "{:.2f}x"),
    "ours_is_times.bfloat16": ("ours, bfloat16, is", "{:.2f}x"),
    "gflops": ("GFLOP/s", "{:,.0f}"),
    "mfu": ("MFU", share),
    "peak_gb": ("peak GB", "{:.2f}"),
}


@dataclass(frozen=True)
class Record:
    """A file of docs/results/benchmarks: what it compares, on which machine, and its rows by their labels."""

    title: str
    artefact: Artefact
    rows: dict[tuple[str, ...], list[Fact]]  # ("gpt2-256", "transformers"): a fact for each of MEASURES


def benchmarks(root: Path) -> list[Record]:
    """The training step and the scorer beside other programs'; a fact is benchmark.FILE.WHAT.MEASURE."""
    records = []
    for path in sorted((root / BENCHMARKS).glob("*.json")):
        found = read_object(path, [])
        source = Artefact(path, str(found.get("command")))
        for title, key, labels in (
            ("The training step", "results", ("shape", "variant")),
            ("Scoring HellaSwag", "speed", ("scorer",)),
        ):
            rows = found.get(key)
            rows = [r for r in rows if isinstance(r, dict) and labels[-1] in r] if isinstance(rows, list) else []
            if rows:
                said = [tuple(str(row.get(label)) for label in labels) for row in rows]
                facts = {words: measures(words, row, source) for words, row in zip(said, rows, strict=True)}
                records.append(Record(f"{title} ({found.get('machine')})", source, facts))
    return records


def measures(labels: tuple[str, ...], row: dict[str, Any], source: Artefact) -> list[Fact]:
    """All MEASURES of a row, by their path in it."""
    facts, prefix = [], ".".join(["benchmark", source.path.stem, *map(slug, labels)])
    for path, (_, form) in MEASURES.items():
        value: Any = row
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        name, where = f"{prefix}.{slug(path.replace('.', ' '))}", f"{', '.join(labels)}: {path}"
        facts.append(Fact(name, shown(number(value), form), source, where))
    return facts
