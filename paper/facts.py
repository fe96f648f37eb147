"""Every number that may be stated about a run, each with the file it was read from.

A text never holds such a number itself. research-report.tex says ``\\R{run.val-loss}``; README and docs/ say the
number followed by a comment that names it, ``5.335<!--run.val-loss-->``, and a test compares the two. So a result
can be stated only while the artefact that shows it is there.
"""

import json
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
from benchmarks.recipe import finals

BENCHMARKS, RECIPES = "docs/results/benchmarks", "docs/results/recipe"
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
    found += recipe_facts(root)
    names = [fact.name for fact in found]
    assert len(set(names)) == len(names), "two facts have one name"
    return found


def known(facts: list[Fact]) -> dict[str, str]:
    """{name: shown} of what was measured and whose artefact is there."""
    return {f.name: f.shown for f in facts if f.shown is not None and f.artefact.path.is_file()}


def plain(value: Any) -> str:
    """Counts with commas, 0.003 as "0.003" and 6e-05 as "6e-5", text as it is."""
    if isinstance(value, int):
        return f"{value:,}"
    return str(value) if isinstance(value, str) else human(value) if value < 0.001 else f"{value:g}"


def fact(name: str, value: Any, source: Artefact, where: str, form: Form = plain) -> Fact:
    """``form`` is a format string or a function; None and what is not finite stay unknown."""
    if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
        return Fact(name, None, source, where)
    return Fact(name, form.format(value) if isinstance(form, str) else form(value), source, where)


def share(value: float) -> str:
    """0.2381 -> "23.8 %": a decimal of a percent is finer than any error here."""
    return percent(value, digits=1)


def slug(text: str) -> str:
    """A name's part in lower case, words joined by dashes: "GPT-2 124M" -> "gpt-2-124m"."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


# ---- of the run --------------------------------------------------------------------------------------

CONFIG = {  # name -> path in config.json
    "name": "run.run",
    "params": "n_params",
    "layers": "model.n_layer",
    "heads": "model.n_head",
    "width": "model.n_embd",
    "context": "model.block_size",
    "flops-per-token": "flops_per_token",
    "steps-planned": "run.steps",
    "tokens-per-step": "run.tokens_per_step",
    "peak-rate": "run.learning_rate",
    "min-rate-ratio": "run.min_lr_ratio",
    "warmup-steps": "run.warmup_steps",
    "weight-decay": "run.weight_decay",
    "beta1": "run.beta1",
    "beta2": "run.beta2",
    "grad-clip": "run.grad_clip",
    "seed": "run.seed",
    "dtype": "run.dtype",
    "val-tokens": "run.val_tokens",
    "init-from": "run.init_from",
    "data": "data.folder",
    "data-repo": "data.source.repo",
    "data-sha256": "data.manifest_sha256",
    "train-tokens": "data.train_tokens",
    "held-out-tokens": "data.val_tokens",
    "device": "device.name",
    "cores": "host.cores",
    "processes": "world_size",
    "torch": "versions.torch",
    "commit": "git_commit",
    "started": "started",
    "command": "command",
}
FORMS: dict[str, Form] = {
    "flops-per-token": human,
    "seed": "{}",
    "data-sha256": "{:.16}...",
    "commit": "{:.12}",
    "started": "{:.10}",
    "command": lambda words: shlex.join(map(str, words)),
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
    for name, path in CONFIG.items():
        yield fact(f"run.{name}", run.get(*path.split(".")), config, path, FORMS.get(name, plain))
    names = [str(file.get("name")) for file in run.get("data", "source", "files") or []]
    files = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    builtin = "yes" if files.startswith("builtin-") else None
    yield fact("run.continued-at", ", ".join(map(plain, continued(run))), config, "history")
    yield fact("run.data-files", files, config, "data.source.files")
    yield fact("run.builtin", builtin, config, "data.source.files")
    matrix_rate = run.get("run", "matrix_rate") if run.get("run", "optimizer") == "muon" else None
    yield fact("run.matrix-rate", matrix_rate, config, "run.matrix_rate")
    linear = "yes" if run.get("run", "schedule") == "linear" else None
    yield fact("run.linear", linear, config, "run.schedule")

    tokens, train = run.last("tokens"), number(run.get("data", "train_tokens"))
    epochs = tokens and train and tokens / train
    yield fact("run.steps", run.step or None, metrics, "step of the last row")
    yield fact("run.tokens", tokens, metrics, "tokens of the last row", "{:,.0f}")
    yield fact("run.epochs", epochs, metrics, "last tokens / config's train_tokens", "{:.2f}")

    vals = [(step, v) for step, v in run.series("val_loss") if v is not None]
    first, (last_step, last) = vals[0][1] if len(vals) > 1 else None, vals[-1] if vals else (None, None)
    perplexity = last and math.exp(min(last, 100))
    yield fact("run.first-val-loss", first, metrics, "first val_loss", "{:.2f}")
    yield fact("run.val-loss", last, metrics, "last val_loss", "{:.3f}")
    yield fact("run.val-step", last_step, metrics, "step of the last val_loss")
    yield fact("run.perplexity", perplexity, metrics, "exp of the last val_loss", "{:,.0f}")

    expected = run.forecasts[-1] if run.forecasts else {}
    forms: dict[str, Form] = {"step": plain, "loss": "{:.3f}", "low": "{:.3f}", "high": "{:.3f}", "odds": share}
    for key, form in forms.items():
        yield fact(f"run.forecast-{key}", expected.get(key), metrics, f"last forecast, {key}", form)

    loss, speed, seconds, mfu = map(run.finite, ("loss", "tokens_per_second", "step_seconds", "mfu"))
    time = sum(seconds) if seconds and len(seconds) == run.step else None
    skipped = sum(bool(row.get("skipped")) for row in run.rows) if run.rows else None
    yield fact(
        "run.train-loss", fmean(loss[-50:]) if loss else None, metrics, "loss, mean of the last 50", "{:.3f}"
    )
    yield fact("run.speed", median(speed) if speed else None, metrics, "tokens_per_second, median", "{:,.0f}")
    yield fact("run.training-time", time, metrics, "step_seconds, summed", duration)
    yield fact("run.mfu", median(mfu) if mfu else None, metrics, "mfu, median", share)
    yield fact("run.skipped", skipped, metrics, "rows with skipped, counted")
    yield fact("run.state", run.status.get("state"), artefact(run, "status.json"), "state")
    yield fact("run.samples", len(run.samples) or None, artefact(run, "samples.jsonl"), "samples, counted")
    for protocol in PROTOCOLS:
        yield from score_facts(run, protocol)
    latest = run.score("completion") or run.score("harness")
    yield fact("run.hellaswag-n", latest and latest.n, artefact(run, latest.file) if latest else metrics, "n")


def score_facts(run: Run, protocol: str) -> Iterator[Fact]:
    """The newest and largest score by a protocol, of training or of hellaswag.json, acc and acc_norm."""
    score = run.score(protocol)
    source = artefact(run, score.file if score else "metrics.jsonl")
    away = (score.value - CHANCE) / score.error if score and score.error else None
    apart = f"{{:.1f}} standard errors {'above' if (away or 0) > 0 else 'below'}"
    yield fact(f"run.{protocol}-from-chance", away and abs(away), source, protocol, apart)
    for key in ("n", "step"):
        yield fact(f"run.{protocol}-{key}", getattr(score, key, None), source, key)
    for metric in ("acc", "acc_norm"):
        value, error = (getattr(score, key, None) for key in (metric, f"{metric}_stderr"))
        name, where = f"run.{protocol}-{slug(metric)}", f"{protocol}.{metric}"
        yield fact(name, value, source, where, share)
        yield fact(f"{name}-stderr", error and 100 * error, source, f"{where}_stderr, points", "{:.1f}")


# ---- of the recipe, of others, of benchmarks ---------------------------------------------------------


def plan_facts(root: Path, run: Run) -> Iterator[Fact]:
    """The recipe of the published run, as `python pretrain.py` without options would do it: plan.*"""
    plan, shape = resolve({}), GPTConfig()
    recipe = Artefact(root / "aymen_gpt/training/config.py", "python pretrain.py --help")
    code = Artefact(root / "aymen_gpt/model/gpt.py", "python pretrain.py --help")
    tokens, done = plan.steps * plan.tokens_per_step, run.last("tokens")
    speed = tokens / CLAIMED_HOURS / 3600
    mfu, by = (
        speed * shape.flops_per_token / (8 * A100_PEAK),
        "claimed-speed x flops-per-token / (8 x 312 TFLOP/s)",
    )
    repeated = "yes" if run.get("n_params") == shape.n_params and (done or 0) >= tokens else None
    warmup = plan.warmup_steps * plan.tokens_per_step
    yield fact("plan.tokens", tokens, recipe, "steps x tokens_per_step")
    yield fact("plan.tokens-short", tokens, recipe, "steps x tokens_per_step", human)
    yield fact("plan.warmup-tokens", warmup, recipe, "warmup x tokens", human)
    yield fact("plan.run-share", done and 100 * done / tokens, recipe, "run.tokens / plan.tokens", "{:.2g} %")
    yield fact("plan.repeated", repeated, recipe, "run.tokens and run.params are the plan's")
    yield fact("plan.claimed-speed", speed / 1e6, recipe, "plan.tokens / 7 hours", "{:.2f} million")
    yield fact("plan.claimed-mfu", mfu, recipe, by, share)
    yield fact("plan.params", shape.n_params, code, "GPTConfig().n_params")
    yield fact("plan.flops-per-token", shape.flops_per_token, code, "flops_per_token", human)
    yield fact("plan.padded-vocabulary", shape.padded_vocab_size, code, "GPTConfig().padded_vocab_size")
    for name, size in vars(shape).items():
        yield fact(f"plan.{slug(name)}", size, code, name)
    for f in fields(TrainConfig):
        value, told = getattr(plan, f.name), f.metadata["group"] in ("run", "recipe", "watching")
        if told and f.name != "block_size" and not isinstance(value, str | bool | None):
            yield fact(f"plan.{slug(f.name)}", value, recipe, f.name, FORMS.get(f.name, plain))


def published_facts(root: Path) -> Iterator[Fact]:
    """Scores of others, named published.MODEL.PROTOCOL.METRIC, and what chance would score."""
    source = Artefact(root / "aymen_gpt/reporting/published_scores.py", "kept by hand, each with its source")
    for a in ANCHORS:
        name = f"published.{slug(a.model)}.{a.protocol}.{slug(a.metric)}"
        yield fact(name, 100 * a.value, source, a.source, "{:.4g} %")
    yield fact("published.chance", 100 * CHANCE, source, "one ending of four", "{:.0f} %")
    yield fact("published.n", HELLASWAG_EXAMPLES, source, "examples of the validation set")
    spread = 100 * math.sqrt(0.337 * (1 - 0.337) / (HELLASWAG_EXAMPLES - 1))
    where = "sqrt(p(1 - p) / (n - 1)) at GPT-3 Small's p, in points"
    yield fact("published.stderr", spread, source, where, "{:.2f}")


def benchmark_facts(root: Path) -> Iterator[Fact]:
    """The training step beside other programs': benchmark.FILE.SHAPE.VARIANT.MEASURE."""
    for path in sorted((root / BENCHMARKS).glob("*.json")):
        found = read_object(path, [])
        source = Artefact(path, str(found.get("command")))
        for row in found.get("results", []):
            name = ".".join(["benchmark", path.stem, slug(row["shape"]), slug(row["variant"])])
            for key, form in (("tokens_per_second", "{:,.0f}"), ("ours_is_times", "{:.2f}x")):
                where = f"{row['shape']}, {row['variant']}: {key}"
                yield fact(f"{name}.{slug(key)}", number(row.get(key)), source, where, form)


def recipe_facts(root: Path) -> Iterator[Fact]:
    """Muon beside AdamW, as the tables of benchmarks/recipe.py have it: recipe.FOLDER.ARM.MEASURE."""
    for path in sorted((root / RECIPES).glob("*/table.md")):
        name, text, curve = f"recipe.{path.parent.name}", path.read_text(), min(path.parent.glob("*.jsonl"))
        source = Artefact(path, "".join(re.findall("The same again: `(.*)`", text)))
        head, seeds = json.loads(curve.open().readline()), {seed for _, _, seed in finals(path.parent)}
        yield fact(f"{name}.params", head["n_params"], Artefact(curve, "benchmarks/recipe.py"), "n_params", human)
        yield fact(f"{name}.seeds", len(seeds), source, "the curves beside it, seeds")
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
        yield fact(f"{name}.trials", rows[2][1].count(";") + 1, source, "first arm's tuning, counted")
        whole = {row[0]: row[1:] for row in reversed(rows) if len(row) == 6}  # an arm's first row is of all tokens
        for arm, cells in whole.items():
            for key, shown in zip(("rates", "tokens", "loss", "share", "time"), cells, strict=True):
                yield fact(f"{name}.{slug(arm)}.{key}", shown, source, f"{arm}, {key}")
                mean = re.match(r"[\d.]+(?= \()", shown)
                yield fact(f"{name}.{slug(arm)}.{key}-mean", mean and mean[0], source, f"{arm}, mean {key}")
