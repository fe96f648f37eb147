"""Trains the demo twice, once whole and once through five kill -9, and compares every loss. Draws what it found.

    python benchmarks/five_kills.py              # about ten minutes on two cores; needs data/builtin (make demo)

Writes docs/results/five-kills.json and docs/images/five-kills.svg.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from aymen_gpt.training.config import resolve
from aymen_gpt.training.device import cpu_name

ROOT = Path(__file__).parent.parent


def rows(run: Path) -> list[dict[str, Any]]:
    """The finished steps of a run; a last line that is still being written does not count."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def train(run: Path, options: list[str], kill_after: int | None = None) -> int | None:
    """Train to the end, or kill -9 once step ``kill_after`` is logged; the last step logged before the kill."""
    command = [sys.executable, str(ROOT / "pretrain.py"), "--preset", "demo", "--run", str(run), *options]
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
    args = p.parse_args()
    random.seed(0)
    options = ["--hellaswag-every", "0", "--resume", "auto", "--steps", str(args.steps)]
    whole, killed = args.runs / "whole", args.runs / "killed"
    if any(run.exists() for run in (whole, killed)):
        raise SystemExit(f"{whole} or {killed} is there already: remove both first")
    moments = sorted(random.sample(range(args.steps // 20, args.steps * 19 // 20), 5))
    kills = [train(killed, options, moment) for moment in moments]
    train(killed, options)
    train(whole, options)
    pairs = list(zip(rows(whole), rows(killed), strict=True))
    measured = ("loss", "grad_norm", "val_loss")
    different = [a["step"] for a, b in pairs if any(a.get(key) != b.get(key) for key in measured)]
    found = {
        "steps": args.steps,
        "killed_after_step": kills,
        "steps_that_differ": different,
        "machine": cpu_name(),
        "loss": [a.get("loss") for a, _ in pairs],
        "val_loss": {a["step"]: a["val_loss"] for a, _ in pairs if "val_loss" in a},
    }
    (ROOT / "docs/results/five-kills.json").write_text(json.dumps(found) + "\n")
    print(f"killed after steps {kills}: {len(different)} of {len(pairs)} steps differ from the run that was not")
    raise SystemExit(bool(different))


if __name__ == "__main__":
    main()
