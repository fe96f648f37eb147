"""The folder that tells the whole story of a run, written by one process.

runs/NAME/
    config.json     everything resolved: options, model, data, versions, machine
    metrics.jsonl   one object a step: step, tokens, loss, lr, grad_norm, ...; val_loss and hellaswag when measured
    samples.jsonl   one object a text the model wrote at a validation: step, prompt, text
    status.json     running, stopped, done or failed, and at which step
    failure.json    only after too many skipped steps: the gradients and documents of the last one
    checkpoints/    see aymen_gpt/training/checkpoint.py
"""

import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

from aymen_gpt.errors import DataError, Stopped, printable, redact
from aymen_gpt.files import free_name, json_object, lock, read_json, replace_text, write_whole
from aymen_gpt.wording import duration, forecast, percent

FILES = ["config.json", "samples.jsonl", "failure.json", "report.html", "metrics.jsonl", "status.json"]
PAUSE = 5.0  # seconds between two lines on the console, where nothing rare happens


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunLog:
    """Writes the run folder and the console. ``with`` holds the folder's lock and ends with a last status.

    A disk that is full does not stop a run for the sake of its log: lines wait in memory until they can be
    written. ``refresh`` is told of the folder after each validation and at the end, ``track`` of every row of
    metrics.jsonl. ``forecast`` says from all validations (step, loss) what the last one will be.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        refresh: Callable[[Path], object] = lambda folder: None,
        track: Callable[[dict[str, Any]], object] | None = None,
        forecast: Callable[[list[tuple[int, float]]], dict[str, float]] | None = None,
    ) -> None:
        self.folder, self.steps, self.refresh, self.track, self.forecast = folder, steps, refresh, track, forecast
        self._validations: list[tuple[int, float]] = []  # what forecasts are made from
        self.step = 0
        self._started: tuple[float, int] | None = None  # when, and after which step
        self._waiting: dict[str, str] = {}  # text by file that could not be appended yet
        self._warned = False
        self._last_line = 0.0
        self._drawing: Thread | None = None

    def __enter__(self) -> "RunLog":
        self._made, self._locked = not self.folder.exists(), (self.folder / ".lock").exists()
        self._lock = lock(self.folder, "--run-dir")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._started:
            self.status("done" if kind is None else "stopped" if kind is Stopped else "failed", str(error or ""))
            for name in self._waiting:
                self._append(name, "")
            if self._drawing:
                self._drawing.join()
            self.refresh(self.folder)
        self._lock.close()
        if not self._started and not self._locked:  # nothing began: leave no trace
            (self.folder / ".lock").unlink(missing_ok=True)
            if self._made:
                self.folder.rmdir()

    def say(self, text: str) -> None:
        """A line for the person who watches; standard error, so that output can be piped."""
        print(printable(text), file=sys.stderr, flush=True)

    def status(self, state: str, message: str = "") -> None:
        found = {"state": state, "step": self.step, "steps": self.steps, "message": message, "updated": now()}
        self.replace("status.json", found)

    def start(self, config: dict[str, Any], step: int | None, changed: dict[str, list[Any]] | None = None) -> None:
        """Begin (None), or go on after ``step``: what was logged past it will be done, and logged, again.

        ``changed`` is what is not as it was when the checkpoint was taken; config.json keeps it, start by start.
        """
        self.step = step or 0
        self._started = time.monotonic(), self.step
        self.say(f"starting at step 0 of {self.steps}" if step is None else f"resuming from step {step}")
        for key, (before, after) in (changed or {}).items():
            note = ", same data order" if key == "world_size" else ""
            self.say(f"changed since then: {key} {before} -> {after}{note}")
        history = [] if step is None else self._history()
        history.append({"step": self.step, "changed": changed or {}})
        history[-1] |= {key: config.get(key) for key in ("started", "command")}
        started = history[0].get("started") or config.get("started")
        self.replace("config.json", config | {"started": started, "history": history})
        self._keep_up_to("metrics.jsonl", -1 if step is None else step)
        if self.forecast and (self.folder / "metrics.jsonl").exists():
            for line in (self.folder / "metrics.jsonl").read_bytes().splitlines():
                self._remember(json_object(line))
        self._keep_up_to("samples.jsonl", self.last_step())  # a kill can come between a step's samples and its row
        self.status("running")

    def _history(self) -> list[dict[str, Any]]:
        """The starts that config.json tells of, the last one with the last sign of life since."""
        path = self.folder / "config.json"
        try:
            history = read_json(path).get("history") or []
        except DataError as error:
            if path.exists():
                self._set_aside(path, str(error))
            return []
        if history:
            with suppress(DataError):
                history[-1].setdefault("ended", read_json(self.folder / "status.json").get("updated"))
        return history

    def _set_aside(self, path: Path, why: str) -> None:
        """Keep a copy of a file that is damaged, and so about to be replaced."""
        kept = free_name(path.with_name(f"{path.name}.damaged"))
        write_whole(kept, path.read_bytes())
        self.say(f"warning: {why}; set aside as {kept.name}")

    def _keep_up_to(self, name: str, step: int) -> None:
        """Drop the lines of a log past ``step``, a last one that a kill cut short, and those that are damaged."""
        path, kept, n_bad = self.folder / name, [], 0
        if not path.exists():
            return
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                if json_object(line)["step"] <= step:
                    kept.append(line + b"\n")
            except (ValueError, KeyError, TypeError):
                n_bad += 1
        if n_bad:
            self._set_aside(path, f"{path} has damaged lines ({n_bad:,}), the others stay")
        write_whole(path, b"".join(kept))

    def _remember(self, row: dict[str, Any]) -> bool:
        """Whether the row has a validation that forecasts can use."""
        found = row.get("val_loss") is not None
        self._validations += [(row["step"], row["val_loss"])] if found else []
        return found

    def last_step(self) -> int:
        """The step of the last row in metrics.jsonl, -1 when there is none."""
        try:
            lines = (self.folder / "metrics.jsonl").read_bytes().split(b"\n")
        except FileNotFoundError:
            return -1
        return json_object(lines[-2])["step"] if len(lines) > 1 else -1

    def write(self, row: dict[str, Any], samples: Sequence[dict[str, Any]] = ()) -> None:
        """Log a finished step, and what the model wrote after it; on the console too when it is due."""
        self.step = row["step"]
        if self.forecast and self._remember(row) and (expected := self.forecast(self._validations)):
            row = row | {"forecast": expected}
        self._append("samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
        self._append("metrics.jsonl", json.dumps(row, allow_nan=False) + "\n")
        if self.track:
            self.track(row)
        rare = row.keys() & {"val_loss", "hellaswag", "skipped"} or self.step == self.steps
        if rare or time.monotonic() - self._last_line >= PAUSE:
            self._last_line = time.monotonic()
            self.say(console_line(row, self.steps) + self._time_left())
        if "skipped" in row:
            self.say(skipped_line(row))
        if "val_loss" in row:
            self.status("running")
            if self._drawing is None or not self._drawing.is_alive():  # beside the training
                self._drawing = Thread(target=self.refresh, args=(self.folder,), name="report")
                self._drawing.start()

    def _append(self, name: str, text: str) -> None:
        """Add text to a file, with all that could not be added before."""
        self._waiting[name] = self._waiting.get(name, "") + text
        data = self._waiting[name].encode()
        if not data:
            return
        try:
            with (self.folder / name).open("ab", buffering=0) as f:
                end = f.seek(0, os.SEEK_END)
                if f.write(data) != len(data):
                    f.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._waiting[name] = ""
        except OSError as error:
            self._warn(name, error)

    def replace(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file whole."""
        try:
            replace_text(self.folder / name, json.dumps(redact(value), indent=2) + "\n")
        except OSError as error:
            self._warn(name, error)

    def _warn(self, name: str, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            why = error.strerror or error
            self.say(f"warning: cannot write {name}: {why}; training goes on, the log waits in memory")

    def _time_left(self) -> str:
        """How long the rest of the run takes at this start's pace, validation and scores included, or nothing."""
        began, first = self._started or (0.0, self.step)
        if not first < self.step < self.steps:
            return ""
        return f" | {duration((time.monotonic() - began) / (self.step - first) * (self.steps - self.step))} left"


def number(value: float | None) -> float:
    """A number of metrics.jsonl, where null stands for one that is not finite."""
    return math.nan if value is None else value


def skipped_line(row: dict[str, Any]) -> str:
    """What was skipped in a step and what it had read."""
    some = ", ".join(row["documents"][:3])
    more = f" and {len(row['documents']) - 3} more, see metrics.jsonl" if len(row["documents"]) > 3 else ""
    return f"warning: {row['skipped']} at step {row['step']} (documents {some}{more}): weights unchanged"


def console_line(row: dict[str, Any], steps: int) -> str:
    """One aligned line: step, losses, learning rate, gradient norm, time, speed."""
    parts = [f"step {row['step']:>{len(str(steps))}}/{steps}"]
    if "loss" in row:
        parts += [
            f"loss {number(row['loss']):7.4f}",
            f"lr {row['lr']:.2e}",
            f"norm {number(row['grad_norm']):6.3f}",
            f"{1000 * row['step_seconds']:6.0f} ms",
            f"{row['tokens_per_second']:9,.0f} tok/s",
        ]
    if row.get("spike"):
        parts.append("spike")
    if row.get("mfu") is not None:
        parts.append(f"mfu {100 * row['mfu']:4.1f}%")
    if "val_loss" in row:
        parts.append(f"val {number(row['val_loss']):.4f}")
    if "hellaswag" in row:
        score = row["hellaswag"]["completion"]
        parts.append(f"hellaswag {percent(score['acc_norm'], score['acc_norm_stderr'] or 0)}")
    if "forecast" in row:
        parts.append(f"forecast {forecast(row['forecast'])}")
    return " | ".join(parts)
