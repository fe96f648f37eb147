"""A run folder, read: ``read_run(Path("runs/demo"))`` -> Run, whatever state the run is in.

    config.json     everything resolved           one object, any key may be absent
    metrics.jsonl   one object a line, a step     the last line may be half-written: it is counted, not used
    status.json     running, stopped, done, ...   absent in runs older than it
    samples.md      `## step 150`, `> prompt`, text between four backticks

The trainer may be writing while we read. So nothing here insists: what cannot be read is left out and said
in ``Run.problems``; only a folder with no run in it is an error.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aymen_gpt.errors import DataError

Row = dict[str, Any]
Series = list[tuple[float, float | None]]  # (step, value), None where the value was NaN or infinite

_STEP = re.compile(r"## step (\d[\d,]{0,17})\s*")
_FENCE = re.compile(r"(`{3,})\w*\s*")


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
    acc: float | None
    acc_stderr: float | None
    acc_norm: float | None
    acc_norm_stderr: float | None


@dataclass(frozen=True)
class Run:
    """Everything a run folder says, rows in order of their step."""

    folder: Path
    config: dict[str, Any]
    rows: list[Row]
    status: dict[str, Any]
    samples: list[Sample]
    n_bad_lines: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.get("run", "name") or self.folder.resolve().name)

    def get(self, *keys: str) -> Any:
        """A value of config.json by its path, None where any part is absent: get("model", "n_layer")."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def series(self, key: str) -> Series:
        """(step, value) of every row that has ``key``; None where the value is not a finite number."""
        return [(row["step"], number(row[key])) for row in self.rows if key in row]

    def last(self, key: str) -> float | None:
        """The latest finite value of ``key``."""
        values = (number(row.get(key)) for row in reversed(self.rows))
        return next((v for v in values if v is not None), None)

    def scores(self, protocol: str) -> list[Score]:
        """The HellaSwag measurements made by ``protocol`` ("completion" or "harness")."""
        found = (_score(r["step"], r["hellaswag"], protocol) for r in self.rows if "hellaswag" in r)
        return [s for s in found if s is not None]


def number(value: Any) -> float | None:
    """``value`` as a finite float, else None: JSON's null, NaN, text and booleans are no measurements."""
    if type(value) is float:  # nearly always: a long run asks this half a million times
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return float(value) if abs(value) < 10**300 else None


def _score(step: int, found: Any, protocol: str) -> Score | None:
    """Both forms of a row's "hellaswag": {n, completion: {acc...}, harness: {...}} and {protocol, n, acc...}."""
    if not isinstance(found, dict):
        return None
    part = found if found.get("protocol") == protocol else found.get(protocol)
    if not isinstance(part, dict):
        return None
    n = number(part.get("n", found.get("n")))
    values = (number(part.get(key)) for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"))
    score = Score(step, protocol, None if n is None else int(n), *values)
    return None if score.acc_norm is None and score.acc is None else score


def _read_text(path: Path) -> str | None:
    """The file's text, bytes that are no UTF-8 replaced (a half-written letter); None where there is none."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def read_object(path: Path, problems: list[str] | None = None) -> dict[str, Any]:
    """The JSON object in ``path``; {} when there is none, which ``problems`` is told unless no file is there."""
    text = _read_text(path)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        if problems is not None:
            problems.append(f"{path.name} is not a JSON object and is left out.")
        return {}
    return value


def parse_metrics(text: str) -> tuple[list[Row], int]:
    """Rows in order of their step, and how many lines were none (half-written, or without a step).

    Lines of one step are one row, the later line's keys winning:
    '{"step": 1, "loss": 9}\\n{"step": 1, "val_loss": 8}\\n{"ste' -> [{step: 1, loss: 9, val_loss: 8}], 1
    """
    rows: dict[int, Row] = {}
    n_bad = 0
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            step = row["step"]
            if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**63:
                raise ValueError(f"step is {step!r}")
        except (ValueError, TypeError, KeyError, RecursionError):
            n_bad += 1
            continue
        rows.setdefault(step, {}).update(row)
    return [rows[step] for step in sorted(rows)], n_bad


def parse_samples(text: str) -> list[Sample]:
    """The samples in order of their step. Where a step was written twice (a resume), its later section counts.

    An unclosed fence ends at the next `## step N` line, and text outside fences is taken as it is.
    """
    sections: dict[int, list[Sample]] = {}
    step, prompt, fence = 0, [], ""  # type: int, list[str], str
    body: list[str] = []

    def close() -> None:
        if step in sections and "".join(body).strip():
            sections[step].append(Sample(step, "\n".join(prompt), "\n".join(body).strip("\n")))
        body.clear()

    for line in text.split("\n"):
        line = line.rstrip("\r")
        if header := _STEP.fullmatch(line):
            close()
            step, prompt, fence = int(header[1].replace(",", "")), [], ""
            sections[step] = []
        elif fence:
            if line.strip() == fence:
                close()
                prompt, fence = [], ""
            else:
                body.append(line)
        elif opened := _FENCE.fullmatch(line):
            close()
            fence = opened[1]
        elif line.startswith(">"):
            close()
            prompt = prompt + [line[1:].removeprefix(" ")]
        else:
            body.append(line)
    close()
    return [sample for step in sorted(sections) for sample in sections[step]]


def read_run(folder: Path) -> Run:
    """Read the run in ``folder``. DataError when there is none; anything less is a line in ``problems``."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("config.json", "metrics.jsonl", "status.json")):
        raise DataError(f"no run in {folder}: expected config.json or metrics.jsonl there (python pretrain.py)")
    problems: list[str] = []
    config = read_object(folder / "config.json", problems)
    status = read_object(folder / "status.json", problems)
    rows, n_bad = parse_metrics(_read_text(folder / "metrics.jsonl") or "")
    if n_bad:
        lines = "1 line" if n_bad == 1 else f"{n_bad:,} lines"
        problems.append(f"{lines} of metrics.jsonl could not be read (half-written or damaged), left out here.")
    samples = parse_samples(_read_text(folder / "samples.md") or "")
    return Run(folder, config, rows, status, samples, n_bad, problems)
