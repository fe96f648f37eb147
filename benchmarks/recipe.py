"""How many tokens Muon needs to reach the loss at which AdamW ends: both tuned, then several seeds of each.

    python fineweb.py --source shared/data/edu-mini --out data/edu-mini
    python benchmarks/recipe.py --tokens 1e7 --jobs 2 --data data/edu-mini \\
        --n-layer 6 --n-head 4 --n-embd 256 --block-size 256 --tokens-per-step 4096

Options that are not listed below are pretrain.py's: the model, its data, the tokens of a step.

Tuning: each arm begins at a usual rate and climbs, trial after trial, to a neighbour of the best point so far,
with one rate twice or half as high; where all neighbours are known the factor becomes its root. All arms have the
same number of trials, runs of --tune of the tokens with a whole schedule each, and of a seed that is none of the
later ones. Then each arm trains --seeds models with its best rates on all tokens, muon also on --shares of them.
adamw is the published recipe (5 % warm-up, cosine to a tenth of the peak), adamw-linear has muon's schedule.

A process has one thread; --jobs of them run side by side. A finished run is a file of --out and is not trained
again, an unfinished one continues from its checkpoint: to go on, type the same command. The first line of a file
says what was run, each further one is a validation: step, tokens, loss (training, mean since the line before),
val_loss, seconds (of training steps so far). table.md and curves.svg have what was found, and are
written again when the command of a finished comparison is typed again.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from threading import Semaphore
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from aymen_gpt.commands import console, options
from aymen_gpt.commands.options import number
from aymen_gpt.errors import AymenError, UsageError
from aymen_gpt.files import replace_text
from aymen_gpt.model.folders import checkpoints
from aymen_gpt.reporting import plots
from aymen_gpt.reporting.run_folder import read_lines
from aymen_gpt.training.config import COUNT, Range, TrainConfig, flag, resolve

ROOT = Path(__file__).parent.parent
LINEAR = {"schedule": "linear", "min_lr_ratio": 0.0}
ARMS: dict[str, dict[str, Any]] = {  # what an arm changes; its rates are where tuning begins
    "adamw": {"optimizer": "adamw", "learning_rate": 2e-3},
    "adamw-linear": {"optimizer": "adamw", "learning_rate": 2e-3, **LINEAR},
    "muon": {"optimizer": "muon", "matrix_rate": 0.02, "learning_rate": 3e-3},
}
RATES = ("matrix_rate", "learning_rate")
Rates = tuple[float, ...]  # of an arm, in the order of RATES
Curves = dict[tuple[str, float, int], list[dict[str, Any]]]  # final runs: arm, share of the tokens, seed
TUNING_SEED = 1000
USUAL: tuple[Any, ...] = (None, False, [], "auto")  # what pretrain.py's options are that are none of a run's


@dataclass(frozen=True)
class Run:
    """One training: an arm with its rates, on so many tokens."""

    arm: str
    rates: Rates
    tokens: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-{'-'.join(f'{r:g}' for r in self.rates)}-{self.tokens}-seed{self.seed}"

    @property
    def options(self) -> dict[str, Any]:
        return ARMS[self.arm] | dict(zip(rates_of(self.arm), self.rates, strict=True)) | {"seed": self.seed}


def rates_of(arm: str) -> list[str]:
    return [name for name in RATES if name in ARMS[arm]]


class Runner:
    """Trains runs of one model on one folder of shards, each once."""

    def __init__(
        self, given: dict[str, Any], tokens: float, validations: int, out: Path, work: Path, jobs: int
    ) -> None:
        self.given, self.tokens, self.validations, self.out, self.work = given, tokens, validations, out, work
        self.free, self.stopped = Semaphore(jobs), False
        self.children: list[subprocess.Popen[str]] = []
        out.mkdir(parents=True, exist_ok=True)

    def stop(self, *_: object) -> None:
        """Let each run under way save and stop, and begin none (SIGINT, SIGTERM)."""
        self.stopped = True
        for child in self.children:
            child.terminate()

    def config(self, run: Run) -> TrainConfig:
        """The whole recipe of a run, the length of its schedule and its validations included."""
        tokens_per_step = resolve(self.given).tokens_per_step
        steps = max(run.tokens // tokens_per_step, 1)
        held_out_for = run.tokens if run.seed == TUNING_SEED else self.tokens  # final runs are compared
        rest = {
            "steps": steps,
            "run": str(self.work / run.name),
            "val_every": max(steps // self.validations, 1),
            "val_tokens": max(2**14, int(0.3 * held_out_for / self.validations)),  # a tenth of the time
            "hellaswag_every": None,
            "checkpoint_every": max(steps // 10, 1),
            "keep_last": 2,
        }
        return resolve(rest | self.given | run.options)

    def __call__(self, run: Run) -> list[dict[str, Any]]:
        """The validations of a run, from its file or by training it now."""
        config, file = self.config(run), self.out / f"{run.name}.jsonl"
        what = {k: v for k, v in asdict(config).items() if k != "run"} | {"arm": run.arm}
        if not file.exists():
            with self.free:
                self._train(config)
            folder = Path(config.run)
            described = json.loads((folder / "config.json").read_text())
            about = {key: described[key] for key in ("n_params", "versions", "git_commit", "device")}
            about["manifest_sha256"] = described["data"]["manifest_sha256"]
            lines = [{"run": what} | about, *validations(folder)]
            partial = file.with_suffix(".tmp")
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
            os.replace(partial, file)
            shutil.rmtree(folder)
            print(f"{run.name}: {lines[-1]['val_loss']:.4f}", file=sys.stderr, flush=True)
        head, *rows = [json.loads(line) for line in file.read_text().splitlines()]
        now = json.loads(json.dumps(what))
        if changed := [key for key, value in head["run"].items() if now.get(key) != value]:
            raise UsageError(f"{file} is of a run with another {', '.join(changed)}: choose another --out")
        return rows

    def _train(self, config: TrainConfig) -> None:
        """Train in a process of its own, from the run's newest checkpoint on; a diverged run ends, too."""
        options = self.work / f"{Path(config.run).name}.json"
        options.parent.mkdir(parents=True, exist_ok=True)
        options.write_text(json.dumps(asdict(config)))
        command = [sys.executable, str(ROOT / "pretrain.py"), "--config", str(options)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        if self.stopped:
            raise AymenError("stopped: the same command continues")
        child = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.children.append(child)
        _, said = child.communicate()
        self.children.remove(child)
        if child.returncode and not (Path(config.run) / "failure.json").exists():
            raise AymenError(f"{config.run}: {(said.strip() or 'no message').splitlines()[-1]}")


def validations(folder: Path) -> list[dict[str, Any]]:
    """Of a run folder: each validation, with the mean training loss and the seconds of steps until then.

    A run that ended early, because its loss was not finite, has a last line with an infinite loss.
    """
    lines, losses, seconds = [], [], 0.0
    for row in read_lines(folder / "metrics.jsonl", []):
        seconds += row.get("step_seconds", 0.0)
        losses += [row["loss"]] if row.get("loss") is not None else []
        if row.get("val_loss") is not None:
            lines.append({"step": row["step"], "tokens": row["tokens"], "val_loss": row["val_loss"]})
            lines[-1] |= {"loss": statistics.fmean(losses) if losses else None, "seconds": round(seconds, 3)}
            losses = []
    if not checkpoints(folder) or (folder / "failure.json").exists():
        lines.append(lines[-1] | {"val_loss": math.inf})
    return lines


def climb(start: Rates, loss: Callable[[Rates], float], trials: int) -> dict[Rates, float]:
    """The loss at ``trials`` points: the start, then a neighbour of the best point so far, one at a time.

    >>> list(climb((2.0,), lambda rates: abs(rates[0] - 7), 5))
    [(2.0,), (4.0,), (8.0,), (16.0,), (11.3,)]
    """
    found, factor = {start: loss(start)}, 2.0
    while len(found) < trials:
        best = min(found, key=lambda rates: found[rates])
        near = [
            (*best[:i], float(f"{best[i] * times:.3g}"), *best[i + 1 :])
            for i in range(len(best))
            for times in (factor, 1 / factor)
        ]
        new = [rates for rates in near if rates not in found]
        if new:
            found[new[0]] = loss(new[0])
        else:
            factor = math.sqrt(factor)
    return found


def needed(rows: list[dict[str, Any]], target: float) -> float | None:
    """Tokens at which a curve first is at ``target``, on the straight line between two validations; None: never.

    >>> needed([{"tokens": 0, "val_loss": 9.0}, {"tokens": 100, "val_loss": 5.0}], 6.0)
    75.0
    """
    for before, after in pairwise(rows):
        if after["val_loss"] <= target:
            share = (before["val_loss"] - target) / (before["val_loss"] - after["val_loss"])
            return before["tokens"] + share * (after["tokens"] - before["tokens"])
    return None


def spread(values: list[float | None], digits: int) -> str:
    """Mean, least and greatest; "never" where one is None."""
    numbers = [v for v in values if v is not None]
    if len(numbers) < len(values):
        return f"never for {len(values) - len(numbers)} of {len(values)} seeds"
    return f"{statistics.fmean(numbers):.{digits}f} ({min(numbers):.{digits}f} to {max(numbers):.{digits}f})"


def finals(folder: Path) -> Curves:
    """The final runs in a folder where each arm was tuned once."""
    runs = [list(map(json.loads, path.read_text().splitlines())) for path in sorted(folder.glob("*.jsonl"))]
    runs = [run for run in runs if run[0]["run"]["seed"] != TUNING_SEED]
    runs.sort(key=lambda run: run[0]["run"]["seed"])
    most = max(head["run"]["steps"] for head, *_ in runs)
    return {
        (head["run"]["arm"], round(head["run"]["steps"] / most, 2), head["run"]["seed"]): rows
        for head, *rows in runs
    }


def draw(curves: Curves, size: plots.Size = (640, 280)) -> Figure:
    """Held-out loss by tokens, a line a run; a mark where it is as low as the first arm ends with that seed."""
    figure, axes = plots.frame(size, "tokens")
    arms, drawn = list(dict.fromkeys(arm for arm, _, _ in curves)), []
    for (arm, share, seed), rows in curves.items():
        x, y = (np.array([row[key] for row in rows], dtype=float) for key in ("tokens", "val_loss"))
        drawn.append((x, np.where(np.isfinite(y), y, np.nan)))  # of a diverged run the last is infinite
        look: dict[str, Any] = {"color": plots.COLOURS[plots.RUNS[arms.index(arm)]], "linewidth": 1}
        name, dashes = (arm, "-") if share == 1 else (f"{arm}, {share:g} of the tokens", "--")
        plots.line(axes, *drawn[-1], **look, label=name, linestyle=dashes)
        end = curves[arms[0], 1.0, seed][-1]["val_loss"]
        if arm != arms[0] and (at := needed(rows, end)) is not None:
            axes.plot(at, end, "o", color=look["color"], label=f"as low as {arms[0]} of the same seed ends")
    axes.set_xlim(0, max(x[-1] for x, _ in drawn))
    axes.set_ylim(*plots.loss_limits(*((x[1:], y[1:]) for x, y in drawn)))  # the first, of no training, is far up
    plots.legend(axes)
    return figure


def table(args: argparse.Namespace, run: Runner, tuned: dict[str, dict[Rates, float]]) -> tuple[str, Curves]:
    """Train what is missing of the final runs, and say in Markdown what was found; with their curves."""
    best = {arm: min(found, key=lambda rates: found[rates]) for arm, found in tuned.items()}
    arms = [(arm, 1.0) for arm in args.arms] + [("muon", share) for share in args.shares if "muon" in args.arms]
    plan = {
        (arm, share, seed): Run(arm, best[arm], int(share * args.tokens), seed)
        for seed in range(1, args.seeds + 1)
        for arm, share in arms
    }
    with ThreadPoolExecutor(args.jobs) as pool:
        curves = dict(zip(plan, pool.map(run, plan.values()), strict=True))
    lines = ["| arm | tuning: rates, loss at the end |", "|---|---|"]
    for arm, found in tuned.items():
        tried = (f"{', '.join(f'{r:g}' for r in rates)}: {loss:.3f}" for rates, loss in found.items())
        lines.append(f"| {arm} ({', '.join(rates_of(arm))}) | {'; '.join(tried)} |")
    first, seeds = args.arms[0], range(1, args.seeds + 1)
    lines += ["", f"| arm | rates | tokens | loss at the end | reaches {first}'s end at x tokens | x time |"]
    lines += ["|---|---|---|---|---|---|"]
    for arm, share in arms:
        rows = [curves[arm, share, seed] for seed in seeds]
        ends = [curves[first, 1.0, seed][-1] for seed in seeds]
        at = [needed(r, end["val_loss"]) for r, end in zip(rows, ends, strict=True)]
        tokens = [t and t / end["tokens"] for t, end in zip(at, ends, strict=True)]
        speed = [
            r[-1]["seconds"] / r[-1]["tokens"] * e["tokens"] / e["seconds"]
            for r, e in zip(rows, ends, strict=True)
        ]
        times = [t and t * s for t, s in zip(tokens, speed, strict=True)]
        lines.append(
            f"| {arm} | {', '.join(f'{r:g}' for r in best[arm])} | {plan[arm, share, 1].tokens:,} "
            f"| {spread([r[-1]['val_loss'] for r in rows], 3)} | {spread(tokens, 2)} | {spread(times, 2)} |"
        )
    return "\n".join(lines), curves


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count, share = number(COUNT, whole=True), number(Range(0, 1, without=(0,)))
    p.add_argument("--tokens", **count, required=True, help="of each final run")
    p.add_argument("--tune", **share, default=0.2, help="tokens of a trial, as a share [0.2]")
    p.add_argument("--trials", **count, default=6, help="of each arm [6]")
    p.add_argument("--seeds", **count, default=3, help="of each arm's final runs [3]")
    p.add_argument(
        "--shares", **share, nargs="*", default=[0.6], help="of the tokens, for shorter muon runs [0.6]"
    )
    p.add_argument("--arms", choices=ARMS, nargs="+", default=["adamw", "muon"], help="[adamw muon]")
    p.add_argument("--validations", **count, default=40, help="of each run [40]")
    p.add_argument("--jobs", **count, default=1, help="processes side by side [1]")
    p.add_argument("--out", type=Path, default=ROOT / "docs/results/recipe", help="[docs/results/recipe]")
    p.add_argument("--work", type=Path, default=ROOT / "runs/recipe", help="unfinished runs [runs/recipe]")
    args, rest = p.parse_known_args()
    given = vars(options.pretrain().parse_args(rest))
    of_run = {f.name for f in fields(TrainConfig)}
    if left := [flag(name) for name, value in given.items() if name not in of_run and value not in USUAL]:
        raise UsageError(f"{', '.join(left)}: only options of a run can be passed on to pretrain.py")
    given = {name: given[name] for name in of_run & given.keys()}
    run = Runner(given, args.tokens, args.validations, args.out, args.work, args.jobs)
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, run.stop)

    def tune(arm: str) -> dict[Rates, float]:
        def loss(rates: Rates) -> float:
            return run(Run(arm, rates, int(args.tune * args.tokens), TUNING_SEED))[-1]["val_loss"]

        return climb(tuple(ARMS[arm][name] for name in rates_of(arm)), loss, args.trials)

    with ThreadPoolExecutor(args.jobs) as pool:
        tuned = dict(zip(args.arms, pool.map(tune, args.arms), strict=True))
    found, curves = table(args, run, tuned)
    again = shlex.join(["python", "benchmarks/recipe.py", *sys.argv[1:]])
    replace_text(args.out / "table.md", f"{found}\n\nThe same again: `{again}`\n")
    replace_text(args.out / "curves.svg", plots.picture(draw(curves), "recipe", "Held-out loss by tokens"))
    print(found)


if __name__ == "__main__":
    console.run(main)
