"""A run folder, read: ``read_run(Path("runs/demo"))`` -> Run, whatever state the run is in.

    config.json      everything resolved           one object, any key may be absent
    metrics.jsonl    one object a line, a step     the last line may be half-written: it is counted, not used
    samples.jsonl    one object a line, a sample   likewise
    status.json      running, stopped, done, ...   absent in runs older than it
    hellaswag.json   what `hellaswag.py --json` wrote, if it was told to write here

The trainer may be writing while we read. So nothing here insists: what cannot be read is left out and said
in ``Run.problems``; only a folder with no run in it is an error.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aymen_gpt.errors import DataError
from aymen_gpt.files import read_json

Row = dict[str, Any]
Series = list[tuple[float, float | None]]  # (step, value), None where the value was NaN or infinite


@dataclass(frozen=True)
class Sample:
    """What the model wrote after ``step`` updates when it was given ``prompt``."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Score:
    """One HellaSwag measurement by one protocol; accuracies and standard errors in 0..1."""

    step: int
    protocol: str
    n: int | None
    file: str  # that says so
    acc: float | None
    acc_stderr: float | None
    acc_norm: float | None
    acc_norm_stderr: float | None

    @property
    def metric(self) -> str:
        """The accuracy to show: acc_norm where there is one."""
        return "acc" if self.acc_norm is None else "acc_norm"

    @property
    def value(self) -> float:
        return getattr(self, self.metric)

    @property
    def error(self) -> float | None:
        return getattr(self, f"{self.metric}_stderr")


@dataclass(frozen=True)
class Run:
    """Everything a run folder says, rows and samples in order of their step."""

    folder: Path
    config: dict[str, Any]
    rows: list[Row]
    status: dict[str, Any]
    samples: list[Sample]
    hellaswag: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    _series: dict[str, Series] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        return str(self.get("run", "name") or self.folder.resolve().name)

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def tokens_per_step(self) -> float | None:
        """As the last row has it, or config.json."""
        tokens = self.last("tokens")
        return tokens / self.step if tokens and self.step else number(self.get("run", "tokens_per_step"))

    def get(self, *keys: str) -> Any:
        """A value of config.json by its path, None where any part is absent: get("model", "n_layer")."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def table(self, key: str) -> dict[str, Any]:
        """An object of config.json, {} where it is absent."""
        return self.config.get(key) or {}

    @property
    def history(self) -> list[dict[str, Any]]:
        """When the run was started and continued, as config.json tells it."""
        return self.config.get("history") or []

    def series(self, key: str) -> Series:
        """(step, value) of every row that has ``key``; None where the value is not a finite number."""
        if key not in self._series:  # a page asks a dozen times, a long run has 100,000 rows
            self._series[key] = [(row["step"], number(row[key])) for row in self.rows if key in row]
        return self._series[key]

    def last(self, key: str) -> float | None:
        """The latest finite value of ``key``."""
        return next(reversed(self.finite(key)), None)

    @property
    def forecasts(self) -> list[dict[str, float]]:
        """What was forecast of the end: the numbers of each validation's forecast, and its step."""
        told = [(row["step"], row["forecast"]) for row in self.rows if isinstance(row.get("forecast"), dict)]
        found = [{"step": step} | {k: v for k, v in f.items() if number(v) is not None} for step, f in told]
        return [f for f in found if {"loss", "low", "high"} <= f.keys()]

    def finite(self, key: str) -> list[float]:
        """The finite values of ``key``, in order of their step."""
        return [value for _, value in self.series(key) if value is not None]

    def scores(self, protocol: str) -> list[Score]:
        """The HellaSwag measurements by ``protocol`` made while training, in order of their step."""
        found = (_score(row["step"], row["hellaswag"], protocol) for row in self.rows if "hellaswag" in row)
        return [score for score in found if score is not None]

    def score(self, protocol: str, step: int | None = None) -> Score | None:
        """The newest measurement, and of one step that of most examples: of training or of hellaswag.json.

        With ``step`` only its own count. A hellaswag.json that does not name its step counts as the last step's,
        and one about questions of one's own does not count.
        """
        known, found = self.scores(protocol), self.hellaswag
        scored = whole(found.get("step"))
        file = _score(self.step if scored is None else scored, found, protocol, "hellaswag.json")
        if file is not None and not found.get("data"):
            known.append(file)
        return max((s for s in known if step in (None, s.step)), key=lambda s: (s.step, s.n or 0), default=None)


def number(value: Any) -> float | None:
    """``value`` as a finite float, else None: JSON's null, NaN, text and booleans are no measurements."""
    if type(value) is int and abs(value) < 10**300:
        return float(value)
    return value if type(value) is float and math.isfinite(value) else None


def whole(value: Any) -> int | None:
    """``value`` as a count or a step, None if it is none."""
    return value if type(value) is int and 0 <= value < 2**63 else None


def _score(step: int, found: Any, protocol: str, file: str = "metrics.jsonl") -> Score | None:
    """A part of {"n": 250, "completion": {"acc": ...}, "harness": {...}}."""
    part = found.get(protocol) if isinstance(found, dict) else None
    if not isinstance(part, dict):
        return None
    values = (number(part.get(key)) for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"))
    score = Score(step, protocol, whole(found.get("n")), file, *values)
    return None if score.acc_norm is None and score.acc is None else score


def read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    """The JSON object in ``path``, {} where there is none; ``problems`` gets a line if a file is there."""
    try:
        return read_json(path) if path.is_file() else {}
    except DataError as error:
        problems.append(f"{error}; left out here.")
        return {}


def read_lines(path: Path, problems: list[str]) -> list[Row]:
    """The objects with a step in a .jsonl file, in order of their step; ``problems`` is told of other lines."""
    found, n_bad = [], 0
    content = path.read_bytes() if path.is_file() else b""
    for line in filter(bytes.strip, content.split(b"\n")):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and whole(row.get("step")) is not None:
            found.append(row)
        else:
            n_bad += 1
    if n_bad:
        lines = "1 line" if n_bad == 1 else f"{n_bad:,} lines"
        problems.append(f"{lines} of {path.name} could not be read (half-written or damaged), left out here.")
    return sorted(found, key=lambda row: row["step"])


def read_run(folder: Path) -> Run:
    """Read the run in ``folder``. DataError when there is none; anything less is a line in ``problems``."""
    if not any((folder / name).is_file() for name in ("config.json", "metrics.jsonl", "status.json")):
        raise DataError(f"no run in {folder}: expected config.json or metrics.jsonl there (python pretrain.py)")
    problems: list[str] = []
    config, status, hellaswag = (
        read_object(folder / f"{n}.json", problems) for n in ("config", "status", "hellaswag")
    )
    rows: dict[int, Row] = {}
    for row in read_lines(folder / "metrics.jsonl", problems):
        rows.setdefault(row["step"], {}).update(row)  # of one step a later line's keys win
    written = read_lines(folder / "samples.jsonl", problems)
    samples = [Sample(row["step"], str(row.get("prompt", "")), str(row.get("text", ""))) for row in written]
    return Run(folder, config, list(rows.values()), status, samples, hellaswag, problems)
