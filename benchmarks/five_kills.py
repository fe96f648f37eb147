"""Trains the demo twice, once whole and once through five kill -9, and compares every loss. Draws what it found.

    python benchmarks/five_kills.py              # about ten minutes on two cores; needs data/builtin (make demo)
    python benchmarks/five_kills.py --draw       # the picture again, from what was found

Writes docs/results/five-kills.json and docs/images/five-kills.png.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from aymen_gpt.reporting import plots
from aymen_gpt.reporting.run_folder import read_lines
from aymen_gpt.training.config import resolve
from aymen_gpt.training.device import cpu_name

ROOT = Path(__file__).parent.parent
FOUND = ROOT / "docs/results/five-kills.json"


def rows(run: Path) -> list[dict[str, Any]]:
    """The finished steps of a run; a last line that is still being written does not count."""
    return read_lines(run / "metrics.jsonl", [])


def train(run: Path, options: list[str], kill_after: int | None = None) -> int | None:
    """Train to the end, or kill -9 once step ``kill_after`` is logged; the last step logged before the kill."""
    command = [sys.executable, str(ROOT / "pretrain.py"), "--preset", "demo", "--run-dir", str(run), *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while kill_after is not None and process.poll() is None:
        if (found := rows(run)) and found[-1]["step"] >= kill_after:
            time.sleep(random.random() / 4)  # somewhere inside a step, or inside a save
            process.kill()
            process.wait()
            return rows(run)[-1]["step"]
        time.sleep(0.02)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return None


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the two runs go")
    p.add_argument("--steps", type=int, default=resolve({"preset": "demo"}).steps)
    p.add_argument("--draw", action="store_true", help="train nothing, draw docs/results/five-kills.json")
    args = p.parse_args()
    if not args.draw:
        compare(args.runs, args.steps)
    draw(json.loads(FOUND.read_text())).savefig(
        ROOT / "docs/images/five-kills.png", dpi=144, metadata={"Software": ""}
    )


def compare(runs: Path, steps: int) -> None:
    """Train both runs and write what was found; SystemExit when a step differs."""
    random.seed(0)
    options = ["--hellaswag-every", "0", "--resume", "auto", "--steps", str(steps)]
    whole, killed = runs / "whole", runs / "killed"
    if any(run.exists() for run in (whole, killed)):
        raise SystemExit(f"{whole} or {killed} is there already: remove both first")
    moments = sorted(random.sample(range(steps // 20, steps * 19 // 20), 5))
    kills = [train(killed, options, moment) for moment in moments]
    train(killed, options)
    train(whole, options)
    found = record(rows(whole), rows(killed), kills)
    FOUND.write_text(json.dumps(found) + "\n")
    different = len(found["steps_that_differ"])
    print(f"killed after steps {kills}: {different} of {len(found['loss'])} steps differ from the run left alone")
    if different:
        raise SystemExit(1)


def record(whole: list[dict[str, Any]], killed: list[dict[str, Any]], kills: list[int | None]) -> dict[str, Any]:
    """What the two runs logged, and where they differ. Step 0 has no loss."""
    pairs = list(zip(whole, killed, strict=True))
    measured = ("loss", "grad_norm", "val_loss")
    return {
        "steps": whole[-1]["step"],
        "killed_after_step": kills,
        "steps_that_differ": [a["step"] for a, b in pairs if any(a.get(key) != b.get(key) for key in measured)],
        "machine": cpu_name(),
        "loss": [row.get("loss") for row in whole],
        "loss_of_the_killed": [row.get("loss") for row in killed],
    }


def draw(found: dict[str, Any]) -> Figure:
    """The loss of the killed run, and of both around the second and third kill."""
    assert not found["steps_that_differ"]
    alone, loss = (
        np.array([np.nan if v is None else v for v in found[key]]) for key in ("loss", "loss_of_the_killed")
    )
    steps = np.arange(len(loss))
    kills = found["killed_after_step"]
    figure, axes = plots.frame((1056, 400), "steps", right=420)
    plots.noisy(axes, steps[1:], loss[1:])
    axes.set(xlim=(0, found["steps"]), ylim=plots.loss_limits((steps, loss)))
    zoom = figure.add_axes((690 / 1056, 44 / 400, 352 / 1056, 344 / 400), facecolor="none")
    plots.quiet(zoom, "steps")
    first, last = kills[1] - 12, kills[2] + 12
    near = (steps >= first) & (steps <= last)
    plots.line(zoom, steps[near], alone[near], linewidth=7, alpha=0.25, label="left alone")
    plots.line(zoom, steps[near], loss[near], linewidth=1.2, marker="o", markersize=2.5, label="killed five times")
    low, high = loss[near].min(), loss[near].max()
    zoom.set(xlim=(first, last), ylim=(low - 0.05 * (high - low), high + 0.45 * (high - low)))
    for panel, marks, text in ((axes, kills, "kill -9, five times"), (zoom, kills[1:3], "kill -9")):
        for step in marks:
            panel.axvline(step, 0, 0.8, color=plots.BAD, linewidth=1.2, dashes=(3, 2))
        place = {"of": ("data", "axes fraction"), "color": plots.BAD, "va": "bottom"}
        plots.say(panel, text, marks[0], 0.81, -4, **place)
        panel.legend(loc="upper right", frameon=False, fontsize=plots.TEXT, labelcolor=plots.SOFT)
    return figure


if __name__ == "__main__":
    main()
