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
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

from tqdm import tqdm

from aymen_gpt.errors import CannotWrite, DataError, Stopped, printable, redact
from aymen_gpt.files import free_name, json_object, lock, read_json, replace_text, set_aside, write_whole
from aymen_gpt.wording import duration, percent

FILES = ["config.json", "samples.jsonl", "failure.json", "report.html", "metrics.jsonl", "status.json"]

Tracker = Callable[[dict[str, Any]], object]  # is given every row of metrics.jsonl


class RunLog:
    """Writes the run folder and the console. ``with`` holds the folder's lock and ends with a last status.

    A disk that is full does not stop a run for the sake of its log: lines wait in memory until they can be
    written.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        refresh: Callable[[Path], object] = lambda folder: None,
        track: Tracker | None = None,
    ) -> None:
        self.folder = folder
        self.refresh = refresh  # told of the folder after each validation and at the end
        self.track = track
        self.steps = steps
        self.step = 0
        self.bar: tqdm[Any] | None = None
        self._started = False
        self._waiting: dict[str, str] = {}  # text by file that could not be appended yet
        self._warned = False
        self._last_line = 0.0
        self._began = (0.0, 0)  # when, and after which step
        self._drawing: Thread | None = None

    def __enter__(self) -> "RunLog":
        self._made, self._locked = not self.folder.exists(), (self.folder / ".lock").exists()
        self._lock = lock(self.folder, "--run-dir")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
        if self._started:
            state = "done" if kind is None else "stopped" if kind is Stopped else "failed"
            self.status(state, str(error or ""))
            self._append_waiting()
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
        text = printable(text)
        tqdm.write(text, file=sys.stderr) if self.bar is not None else print(text, file=sys.stderr, flush=True)

    def status(self, state: str, message: str = "") -> None:
        value = {
            "state": state,
            "step": self.step,
            "steps": self.steps,
            "message": message,
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._replace("status.json", json.dumps(redact(value), indent=2) + "\n")

    def failure(self, found: dict[str, Any]) -> None:
        """Keep what is known of the step that ended the run."""
        self._replace("failure.json", json.dumps(found, indent=2) + "\n")

    def start(self, config: dict[str, Any], step: int | None, changed: dict[str, list[Any]] | None = None) -> None:
        """Begin (None), or go on after ``step``: what was logged past it will be done, and logged, again.

        ``changed`` is what is not as it was when the checkpoint was taken; config.json keeps it, start by start.
        """
        self.step = step or 0
        self._began = time.monotonic(), self.step
        self._started = True
        self._tell_start(step, changed or {})
        for name in FILES:
            path = self.folder / name
            if path.exists() and not path.is_file():
                self._set_aside(name, f"{path} is a folder or a pipe, not a file")
        history = self._history()
        if step is None:
            history = []
        if history:
            history[-1].setdefault("ended", self._last_updated())
        now = {key: config.get(key) for key in ("started", "command")}
        history.append({"step": self.step, **now, "changed": changed or {}})
        first = history[0].get("started") or config.get("started")
        config = config | {"started": first, "history": history}
        self._replace("config.json", json.dumps(redact(config), indent=2) + "\n")
        last = -1 if step is None else step
        self._keep_up_to("metrics.jsonl", last, lambda line: json_object(line)["step"])
        self._keep_up_to("samples.jsonl", self.last_step(), lambda line: json_object(line)["step"])
        self.status("running")
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.steps, initial=self.step, unit="step", dynamic_ncols=True)

    def _tell_start(self, step: int | None, changed: dict[str, list[Any]]) -> None:
        if step is None:
            return self.say(f"starting at step 0 of {self.steps}")
        self.say(f"resuming from step {step}")
        for key, (before, now) in changed.items():
            note = ", same data order" if key == "world_size" else ""
            self.say(f"changed since then: {key} {before} -> {now}{note}")

    def _history(self) -> list[dict[str, Any]]:
        """The starts that config.json tells of."""
        path = self.folder / "config.json"
        if not path.exists():
            return []
        try:
            history = read_json(path).get("history")
            if not isinstance(history, list) or not all(
                isinstance(start, dict) and isinstance(start.get("started"), str | None) for start in history
            ):
                raise DataError(f"{path} does not have the starts of a run")
        except DataError as error:
            self._set_aside(path.name, error)
            return []
        return history

    def _last_updated(self) -> Any:
        """When the part of the run before this one gave its last sign of life."""
        with suppress(DataError):
            return read_json(self.folder / "status.json").get("updated")

    def _set_aside(self, name: str, why: object, content: bytes | None = None) -> None:
        """Keep what cannot be used under another name: the file itself, or its ``content`` beside it."""
        path = self.folder / name
        if content is None:
            kept = set_aside(path)
        else:
            kept = free_name(path.with_name(f"{name}.damaged"))
            write_whole(kept, content)
        self.say(f"warning: {why}; set aside as {kept.name}")

    def _keep_up_to(self, name: str, step: int, step_of: Callable[[bytes], int]) -> None:
        """Drop the lines of a log past ``step``, a last one that a kill cut short, and those that are damaged."""
        path = self.folder / name
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            return self._set_aside(name, f"cannot read {path}: {error.strerror}")
        kept, n_bad = [], 0
        for line in content.split(b"\n")[:-1]:
            try:
                if step_of(line) <= step:
                    kept.append(line + b"\n")
            except (ValueError, KeyError, IndexError, TypeError):
                n_bad += 1
        if n_bad:
            self._set_aside(name, f"{path} has damaged lines ({n_bad:,}), the others stay", content)
        write_whole(path, b"".join(kept))

    def last_step(self) -> int:
        """The step of the last row in metrics.jsonl, -1 when there is none."""
        try:
            lines = (self.folder / "metrics.jsonl").read_bytes().split(b"\n")
        except FileNotFoundError:
            return -1
        return json_object(lines[-2])["step"] if len(lines) > 1 else -1

    def write(self, row: dict[str, Any]) -> None:
        """Log one finished step: to the files, and to the console when it is due."""
        self.step = row["step"]
        self._append("metrics.jsonl", json.dumps(row, allow_nan=False) + "\n")
        if self.track:
            self.track(row)
        self._show(row)
        if "val_loss" in row:
            self.status("running")
            self._draw()

    def samples(self, written: list[dict[str, Any]]) -> None:
        """Log what the model wrote after a step; the row of that step is written next."""
        self._append("samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in written))

    def _draw(self) -> None:
        """Have the report drawn beside the training, unless the last drawing is still under way."""
        if self._drawing is None or not self._drawing.is_alive():
            self._drawing = Thread(target=self.refresh, args=(self.folder,), name="report")
            self._drawing.start()

    def _append(self, name: str, text: str) -> None:
        self._waiting[name] = self._waiting.get(name, "") + text
        self._append_waiting()

    def _append_waiting(self) -> None:
        for name, text in self._waiting.items():
            try:
                append(self.folder / name, text)
            except OSError as error:
                self._warn(name, error)
            else:
                self._waiting[name] = ""

    def _replace(self, name: str, text: str) -> None:
        try:
            replace_text(self.folder / name, text)
        except CannotWrite as error:
            self._warn(name, error)

    def _warn(self, name: str, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            why = error.strerror or error
            self.say(f"warning: cannot write {name}: {why}; training goes on, the log waits in memory")

    def _show(self, row: dict[str, Any]) -> None:
        rare = "val_loss" in row or "hellaswag" in row or "skipped" in row or self.step == self.steps
        if self.bar is not None:
            self.bar.update(self.step - self.bar.n)
            if "loss" in row:
                self.bar.set_postfix_str(console_line(row, self.steps).partition(" | ")[2], refresh=False)
        if rare or (self.bar is None and time.monotonic() - self._last_line >= 5.0):
            self._last_line = time.monotonic()
            self.say(console_line(row, self.steps) + self._time_left())
        if "skipped" in row:
            self.say(skipped_line(row))

    def _time_left(self) -> str:
        """How long the rest of the run takes at this start's pace, validation and scores included, or nothing."""
        began, first = self._began
        if self.bar is not None or not first < self.step < self.steps:  # a bar says it itself
            return ""
        return f" | {duration((time.monotonic() - began) / (self.step - first) * (self.steps - self.step))} left"


def append(path: Path, text: str) -> None:
    """Add text to a file, or leave the file as it was and raise OSError."""
    with path.open("ab", buffering=0) as f:
        end, data = f.seek(0, os.SEEK_END), text.encode()
        try:
            if f.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            f.truncate(end)
            raise


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
    return " | ".join(parts)
