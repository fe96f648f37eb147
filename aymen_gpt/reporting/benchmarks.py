"""docs/results/benchmarks/*.json, as the scripts in benchmarks/ write it: tables and facts.

A fact is named benchmark.FILE.WHAT.MEASURE, for one benchmark.train.gpt2-256.transformers.ours-is-times. Files of
other shapes may lie there too and are left alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aymen_gpt.reporting.facts import UNKNOWN, Artefact, Fact, share, shown, slug
from aymen_gpt.reporting.latex import Table
from aymen_gpt.reporting.runs import number, read_object

FOLDER = "docs/results/benchmarks"
STEP, SCORER = "benchmarks/train.py", "benchmarks/hellaswag.py"


@dataclass(frozen=True)
class Measure:
    """A number in each row of a record: where it stands there, the head of its column, how it is shown."""

    path: tuple[str, ...]
    head: str
    form: Callable[[float], str] | str

    def of(self, row: dict[str, Any]) -> str:
        found: Any = row
        for key in self.path:
            found = found.get(key) if isinstance(found, dict) else None
        return shown(number(found), self.form)


@dataclass(frozen=True)
class Grid:
    """Rows of a record under one title; ``labels`` are the keys that tell them apart."""

    title: str
    labels: tuple[str, ...]
    rows: Sequence[dict[str, Any]]
    measures: Sequence[Measure]


@dataclass(frozen=True)
class Benchmark:
    """One file: the script that made it, its tables, and the same numbers as facts."""

    script: str
    artefact: Artefact
    tables: list[Table]
    facts: list[Fact]


TRAIN = (
    Measure(("tokens_per_second",), "tokens/s", "{:,.0f}"),
    Measure(("best",), "best", "{:,.0f}"),
    Measure(("ours_is_times",), "ours is", "{:.2f}x"),
    Measure(("gflops",), "GFLOP/s", "{:,.0f}"),
    Measure(("mfu",), "MFU", share),
    Measure(("peak_gb",), "peak GB", "{:.2f}"),
)
SPEED = (
    Measure(("examples_per_second",), "examples/s", "{:.2f}"),
    Measure(("best",), "best", "{:.2f}"),
    Measure(("ours_is_times", "float32"), "ours, float32, is", "{:.2f}x"),
    Measure(("ours_is_times", "bfloat16"), "ours, bfloat16, is", "{:.2f}x"),
    Measure(("peak_gb",), "peak GB", "{:.2f}"),
)
AGREEMENT = (
    Measure(("n",), "examples", "{:,.0f}"),
    Measure(("choice",), "same by acc", "{:,.0f}"),
    Measure(("choice_norm",), "same by acc_norm", "{:,.0f}"),
)


def read_benchmarks(root: Path) -> list[Benchmark]:
    """All of a checkout, by file name."""
    found = [_benchmark(path) for path in sorted((root / FOLDER).glob("*.json"))]
    return [benchmark for benchmark in found if benchmark.tables]


def _benchmark(path: Path) -> Benchmark:
    record = read_object(path)
    script, grids = _grids(record)
    command = record.get("command")
    typed = command if isinstance(command, str) else f"python {script} --json {FOLDER}/{path.name}"
    source = Artefact(path, typed)
    where = f" ({record.get('machine', 'a machine that is not named')})"
    filled = [(grid, [_facts(path.stem, row, grid, source) for row in grid.rows]) for grid in grids]
    tables = [_table(grid, facts, where, typed) for grid, facts in filled]
    return Benchmark(script, source, tables, [fact for _, rows in filled for facts in rows for fact in facts])


def _grids(record: dict[str, Any]) -> tuple[str, list[Grid]]:
    """What a record holds, told by its shape; no grid when it is none of ours."""
    if trained := _objects(record.get("results"), "variant"):
        return STEP, [Grid("The training step" + _rounds(trained), ("shape", "variant"), trained, TRAIN)]
    grids, agreed = [], record.get("agreement")
    if scored := _objects(record.get("speed"), "scorer"):
        grids.append(Grid("Scoring HellaSwag" + _rounds(scored), ("scorer",), scored, SPEED))
    if isinstance(agreed, dict):
        rows = [
            {"protocol": name, "n": agreed.get("n"), **part}
            for name, part in agreed.items()
            if isinstance(part, dict)
        ]
        grids.append(Grid("Choices in bfloat16 that are those in float32", ("protocol",), rows, AGREEMENT))
    return SCORER, [grid for grid in grids if grid.rows]


def _objects(found: Any, key: str) -> list[dict[str, Any]]:
    rows = found if isinstance(found, list) else []
    return [row for row in rows if isinstance(row, dict) and key in row]


def _rounds(rows: Sequence[dict[str, Any]]) -> str:
    seconds = rows[0].get("seconds")
    return f", medians of {len(seconds)} alternating rounds" if isinstance(seconds, list) else ""


def _facts(stem: str, row: dict[str, Any], grid: Grid, source: Artefact) -> list[Fact]:
    what = ".".join(slug(str(row.get(label))) for label in grid.labels)
    place = ", ".join(str(row.get(label)) for label in grid.labels)
    return [
        Fact(
            f"benchmark.{stem}.{what}.{slug(' '.join(m.path))}", m.of(row), source, f"{place}: {'.'.join(m.path)}"
        )
        for m in grid.measures
    ]


def _table(grid: Grid, facts: list[list[Fact]], where: str, command: str) -> Table:
    """Without the columns in which nothing was measured (MFU, where a device's peak is not known)."""
    kept = [i for i in range(len(grid.measures)) if any(row[i].shown != UNKNOWN for row in facts)]
    header = [*grid.labels, *(grid.measures[i].head for i in kept)]
    rows = [
        [*(str(row.get(label)) for label in grid.labels), *(cells[i].shown for i in kept)]
        for row, cells in zip(grid.rows, facts, strict=True)
    ]
    for row, above in reversed(list(zip(rows[1:], rows, strict=False))):
        if len(grid.labels) > 1 and row[0] == above[0]:
            row[0] = ""  # said once for all rows of a shape
    return Table(grid.title + where, command, header, rows, n_labels=len(grid.labels))
