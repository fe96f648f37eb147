"""Every number that may be stated about a run, each with the file it was read from.

A text never holds such a number itself. research-report.tex says ``\\R{run.val-loss}``; README and docs/ say the
number followed by a comment that names it, ``5.335<!--run.val-loss-->``, and a test compares the two. So a result
can be stated only while the artefact that shows it is there.
"""

import math
import re
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
    found = [*run_facts(run), *plan_facts(root, run), *published_facts(root), *benchmark_facts(root)]
    names = [fact.name for fact in found]
    assert len(set(names)) == len(names), "two facts have one name"
    return found


def known(facts: list[Fact]) -> dict[str, str]:
    """{name: shown} of what was measured and whose artefact is there."""
    return {f.name: f.shown for f in facts if f.shown is not None and f.artefact.path.is_file()}


def fact(name: str, value: Any, form: Form, source: Artefact, where: str) -> Fact:
    """``form`` is a format string or a function; None and what is not finite stay unknown."""
    unknown = value is None or value == "" or (isinstance(value, float) and not math.isfinite(value))
    return Fact(
        name, None if unknown else form.format(value) if isinstance(form, str) else form(value), source, where
    )


def share(value: float) -> str:
    """0.2381 -> "23.8 %": a decimal of a percent is finer than any error here."""
    return percent(value, digits=1)


def rate(value: float) -> str:
    """0.003 -> "0.003", 6e-05 -> "6e-5"."""
    return human(value) if value < 0.001 else f"{value:g}"


def slug(text: str) -> str:
    """A name's part in lower case, words joined by dashes: "GPT-2 124M" -> "gpt-2-124m"."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


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
    typed = run.get("command") or ["python", "pretrain.py"]
    if name == "hellaswag.json":
        found = run.hellaswag
        typed = ["python", "hellaswag.py", "-m", found.get("model"), "--limit", found.get("n"), "--json", name]
    return Artefact(run.folder / name, shlex.join(map(str, typed)))


def run_facts(run: Run) -> Iterator[Fact]:
    """All facts of a run folder or of its digest (tools/record.py), named run.*"""
    config, metrics = artefact(run, "config.json"), artefact(run, "metrics.jsonl")
    status, texts = artefact(run, "status.json"), artefact(run, "samples.jsonl")
    for name, (path, form) in CONFIG.items():
        yield fact(f"run.{name}", run.get(*path.split(".")), form, config, path)
    names = [str(file.get("name")) for file in run.get("data", "source", "files") or []]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    vals = [(step, v) for step, v in run.series("val_loss") if v is not None]
    loss, speed, seconds, mfu = map(run.finite, ("loss", "tokens_per_second", "step_seconds", "mfu"))
    tokens, train = run.last("tokens"), number(run.get("data", "train_tokens"))
    last_step, last = vals[-1] if vals else (None, None)
    complete = bool(seconds) and len(seconds) == run.step
    skipped = sum(bool(row.get("skipped")) for row in run.rows) if run.rows else None
    facts: list[tuple[Artefact, str, Any, Form, str]] = [
        (config, "continued-at", ", ".join(f"{step:,}" for step in continued(run)), "{}", "history"),
        (config, "data-files", ", ".join(names[:3]) + more, "{}", "data.source.files"),
        (
            config,
            "builtin",
            "yes" if names and names[0].startswith("builtin-") else None,
            "{}",
            "data.source.files",
        ),
        (
            config,
            "matrix-rate",
            run.get("run", "matrix_rate") if run.get("run", "optimizer") == "muon" else None,
            rate,
            "run.matrix_rate",
        ),
        (config, "linear", "yes" if run.get("run", "schedule") == "linear" else None, "{}", "run.schedule"),
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
        (status, "state", run.status.get("state"), "{}", "state"),
        (texts, "samples", len(run.samples) or None, "{}", "samples, counted"),
    ]
    for source, name, value, form, where in facts:
        yield fact(f"run.{name}", value, form, source, where)
    for protocol in PROTOCOLS:
        yield from score_facts(run, protocol)
    latest = run.score("completion") or run.score("harness")
    source = artefact(run, latest.file if latest else "metrics.jsonl")
    yield fact("run.hellaswag-n", latest and latest.n, "{:,}", source, "n")


def score_facts(run: Run, protocol: str) -> Iterator[Fact]:
    """The newest and largest score by a protocol, of training or of hellaswag.json, acc and acc_norm."""
    score = run.score(protocol)
    source = artefact(run, score.file if score else "metrics.jsonl")
    away = (score.value - CHANCE) / score.error if score and score.error else None
    apart = f"{{:.1f}} standard errors {'above' if (away or 0) > 0 else 'below'}"
    yield fact(f"run.{protocol}-from-chance", away and abs(away), apart, source, protocol)
    for key in ("n", "step"):
        yield fact(f"run.{protocol}-{key}", getattr(score, key, None), "{:,}", source, key)
    for metric in ("acc", "acc_norm"):
        value, error = (getattr(score, key, None) for key in (metric, f"{metric}_stderr"))
        name, where = f"run.{protocol}-{slug(metric)}", f"{protocol}.{metric}"
        yield fact(name, value, share, source, where)
        yield fact(f"{name}-stderr", error and 100 * error, "{:.1f}", source, f"{where}_stderr, points")


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
        yield fact(f"plan.{name}", value, form, source, where)


def published_facts(root: Path) -> Iterator[Fact]:
    """Scores of others, named published.MODEL.PROTOCOL.METRIC, and what chance would score."""
    source = Artefact(root / "aymen_gpt/reporting/published_scores.py", "kept by hand, each with its source")
    for a in ANCHORS:
        name = f"published.{slug(a.model)}.{a.protocol}.{slug(a.metric)}"
        yield fact(name, 100 * a.value, "{:.4g} %", source, a.source)
    yield fact("published.chance", 100 * CHANCE, "{:.0f} %", source, "one ending of four")
    yield fact("published.n", HELLASWAG_EXAMPLES, "{:,}", source, "examples of the validation set")
    spread = 100 * math.sqrt(0.337 * (1 - 0.337) / (HELLASWAG_EXAMPLES - 1))
    where = "sqrt(p(1 - p) / (n - 1)) at GPT-3 Small's p, in points"
    yield fact("published.stderr", spread, "{:.2f}", source, where)


def benchmark_facts(root: Path) -> Iterator[Fact]:
    """The training step beside other programs': benchmark.FILE.SHAPE.VARIANT.MEASURE."""
    forms: dict[str, Form] = {"tokens_per_second": "{:,.0f}", "ours_is_times": "{:.2f}x", "mfu": share}
    for path in sorted((root / BENCHMARKS).glob("*.json")):
        found = read_object(path, [])
        for row in found.get("results", []):
            name = ".".join(["benchmark", path.stem, slug(row["shape"]), slug(row["variant"])])
            for key, form in forms.items():
                where = f"{row['shape']}, {row['variant']}: {key}"
                source = Artefact(path, str(found.get("command")))
                yield fact(f"{name}.{slug(key)}", number(row.get(key)), form, source, where)
