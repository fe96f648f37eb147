"""The folder that tells the whole story of a run, written by one process.

runs/NAME/
    config.json     everything resolved: options, model, data, versions, machine
    metrics.jsonl   one object a step: step, tokens, loss, lr, grad_norm, ...; val_loss and hellaswag when measured
    log.txt         the same as `step stream value` lines (train, val, hella), as the first version wrote them
    samples.md      texts the model wrote at each validation
    status.json     running, stopped, done or failed, and at which step
    checkpoints/    see aymen_gpt/training/checkpoint.py
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from aymen_gpt.errors import Stopped
from aymen_gpt.files import lock, replace_text


class RunLog:
    """Writes the run folder and the console. ``with`` holds the folder's lock and ends with a last status."""

    def __init__(self, folder: Path, steps: int, refresh: Callable[[Path], object] = lambda folder: None) -> None:
        self.folder = folder
        self.refresh = refresh  # told of the folder after each validation and at the end
        self.steps = steps
        self.step = 0
        self.bar: tqdm[Any] | None = None
        self._last_line = 0.0

    def __enter__(self) -> "RunLog":
        self._lock = lock(self.folder, "--run")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
        state = "done" if kind is None else "stopped" if kind is Stopped else "failed"
        self.status(state, str(error or ""))
        self.refresh(self.folder)
        self._lock.close()

    def say(self, text: str) -> None:
        """A line for the person who watches; standard error, so that output can be piped."""
        tqdm.write(text, file=sys.stderr) if self.bar is not None else print(text, file=sys.stderr, flush=True)

    def status(self, state: str, message: str = "") -> None:
        value = {
            "state": state,
            "step": self.step,
            "steps": self.steps,
            "message": message,
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        replace_text(self.folder / "status.json", json.dumps(value, indent=2) + "\n")

    def start(self, config: dict[str, Any], step: int | None) -> None:
        """Begin (None), or go on after ``step``: what was logged past it will be done, and logged, again."""
        self.step = step or 0
        replace_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
        last = -1 if step is None else step
        keep_up_to(self.folder / "metrics.jsonl", last, lambda line: json.loads(line)["step"])
        keep_up_to(self.folder / "log.txt", last, lambda line: int(line.split()[0]))
        self.status("running")
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.steps, initial=self.step, unit="step", dynamic_ncols=True)

    def last_step(self) -> int:
        """The step of the last row in metrics.jsonl, -1 when there is none."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return -1
        return json.loads(lines[-1])["step"] if lines else -1

    def write(self, row: dict[str, Any]) -> None:
        """Log one finished step: to the files, and to the console when it is due."""
        self.step = row["step"]
        with (self.folder / "metrics.jsonl").open("a") as f:
            f.write(json.dumps(row, allow_nan=False) + "\n")
        with (self.folder / "log.txt").open("a") as f:
            f.writelines(f"{line}\n" for line in stream_lines(row))
        self._show(row)
        if "val_loss" in row:
            self.status("running")
            self.refresh(self.folder)

    def samples(self, step: int, section: str) -> None:
        """Add a section to samples.md in place of any of this step or a later one."""
        path = self.folder / "samples.md"
        sections = re.split(r"(?m)^(?=## step \d+$)", path.read_text() if path.exists() else "# Samples\n\n")
        kept = [s for s in sections if not s.startswith("## step ") or int(s.split()[2]) < step]
        replace_text(path, "".join(kept).rstrip("\n") + "\n\n" + section)

    def _show(self, row: dict[str, Any]) -> None:
        rare = "val_loss" in row or "hellaswag" in row or self.step == self.steps
        if self.bar is not None:
            self.bar.update(self.step - self.bar.n)
            if "loss" in row:
                self.bar.set_postfix_str(
                    f"loss {row['loss']:.4f} | {row['tokens_per_second']:,.0f} tok/s", refresh=False
                )
        if rare or (self.bar is None and time.monotonic() - self._last_line >= 5.0):
            self._last_line = time.monotonic()
            self.say(console_line(row, self.steps))


def keep_up_to(path: Path, step: int, step_of: Any) -> None:
    """Drop the lines of a log past ``step``, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if not line.endswith("\n") or step_of(line) > step:
                break
        except (ValueError, KeyError, IndexError):
            break
        kept.append(line)
    replace_text(path, "".join(kept))


def stream_lines(row: dict[str, Any]) -> Iterable[str]:
    """A row of metrics.jsonl as lines of log.txt.

    >>> list(stream_lines({"step": 250, "loss": 6.5, "val_loss": 6.4321}))
    ['250 train 6.500000', '250 val 6.4321']
    """
    if "loss" in row:
        yield f"{row['step']} train {row['loss']:.6f}"
    if "val_loss" in row:
        yield f"{row['step']} val {row['val_loss']:.4f}"
    if "hellaswag" in row:
        yield f"{row['step']} hella {row['hellaswag']['completion']['acc_norm']:.4f}"


def console_line(row: dict[str, Any], steps: int) -> str:
    """One aligned line: step, losses, learning rate, gradient norm, time, speed."""
    parts = [f"step {row['step']:>{len(str(steps))}}/{steps}"]
    if "loss" in row:
        parts += [
            f"loss {row['loss']:7.4f}",
            f"lr {row['lr']:.2e}",
            f"norm {row['grad_norm']:6.3f}",
            f"{1000 * row['step_seconds']:6.0f} ms",
            f"{row['tokens_per_second']:9,.0f} tok/s",
        ]
    if row.get("mfu") is not None:
        parts.append(f"mfu {100 * row['mfu']:4.1f}%")
    if "val_loss" in row:
        parts.append(f"val {row['val_loss']:.4f}")
    if "hellaswag" in row:
        score = row["hellaswag"]["completion"]
        parts.append(f"hellaswag {100 * score['acc_norm']:.2f}% ± {100 * (score['acc_norm_stderr'] or 0):.2f}")
    return " | ".join(parts)
