"""What `make report` puts beside research-report.tex: {file name: text} made of a run and our own docs.

results.tex        \\result{NAME}{VALUE} for every fact
facts.tex          appendix rows: each fact the paper states, and where it comes from
artefacts.tex      appendix rows: those files, hashed, and the commands that made them
*.dat              the curves, drawn by LaTeX itself (pgfplots), so that they are sharp in print
samples.tex        what the model wrote
experiments.tex    docs/experiments.md
systems.tex        the tables of docs/benchmarks.md        benchmarks.tex    of docs/results/benchmarks/*.json
"""

import re
from collections.abc import Sequence
from pathlib import Path

from aymen_gpt.files import sha256
from aymen_gpt.reporting import latex
from aymen_gpt.reporting.anchors import ANCHORS, CHANCE, GPT2_FINEWEB_EDU
from aymen_gpt.reporting.benchmarks import SCORER, STEP, Benchmark, read_benchmarks
from aymen_gpt.reporting.charts import Point, decimate, smooth
from aymen_gpt.reporting.facts import Artefact, Fact, artefact, by_name, scored
from aymen_gpt.reporting.runs import Run, number, read_object

POINTS = 500  # of one curve: finer than a printer
SAMPLES = 3
SAMPLE_CHARACTERS = 450

CURVES = ("loss", "val_loss", "lr", "tokens_per_second", "grad_norm")
SMOOTHED = ("loss", "tokens_per_second", "grad_norm")
OPTIONAL = {
    *(f"{name}.dat" for name in (*CURVES, "gpt2", "hellaswag")),
    *(f"{name}-median.dat" for name in SMOOTHED),
    "hellaswag-labels.tex",
}

STATED = re.compile(r"\\R\{([^}]*)\}")


def stated(paper: str) -> set[str]:
    """Names of the facts that the body of a .tex file states."""
    return set(STATED.findall(paper[paper.find(r"\begin{document}") :]))


def parts(run: Run, facts: Sequence[Fact], paper: str, root: Path) -> dict[str, str]:
    """All files, by name. ``paper`` is the text of research-report.tex, ``root`` the folder it stands in."""
    named = by_name(facts)
    used = [named[name] for name in sorted(stated(paper)) if name in named]
    benchmarks, experiments = root / "docs/benchmarks.md", root / "docs/experiments.md"
    measured = read_benchmarks(root)
    sources = {fact.artefact for fact in used} | {artefact(run, "metrics.jsonl")}
    sources |= {benchmark.artefact for benchmark in measured}
    sources |= {Artefact(page, "kept by hand; each entry names its command") for page in (benchmarks, experiments)}
    rows = [(a, display(a.path, root), sha256(a.path)) for a in sorted(sources, key=str) if a.path.is_file()]
    return {
        "results.tex": latex.results(facts),
        "facts.tex": latex.fact_rows(used),
        "artefacts.tex": latex.artefact_rows(rows),
        "samples.tex": samples(run),
        "experiments.tex": latex.paragraphs(experiments.read_text()),
        "systems.tex": systems(benchmarks.read_text(), measured),
        "benchmarks.tex": against_others(measured),
        **curves(run),
        **hellaswag(run),
    }


def display(path: Path, root: Path) -> str:
    """A path as the paper shows it: from the root of the repository when it is in there, by a link or itself."""
    for p, r in ((path.absolute(), root.absolute()), (path.resolve(), root.resolve())):
        if p.is_relative_to(r):
            return p.relative_to(r).as_posix()
    return path.as_posix()


def systems(page: str, measured: Sequence[Benchmark]) -> str:
    """The tables of docs/benchmarks.md, but those that name a file which against_others typesets."""
    files = [f"benchmarks/{benchmark.artefact.path.name}" for benchmark in measured]
    tables = [t for t in latex.tables(page) if not any(name in t.command for name in files)]
    return "".join(latex.table(table) for table in tables)


def against_others(measured: Sequence[Benchmark]) -> str:
    """The training step and the scorer beside other programs', or that they were not measured."""
    out = []
    for script, what in ((STEP, "The training step"), (SCORER, "The speed of scoring HellaSwag")):
        tables = [table for benchmark in measured if benchmark.script == script for table in benchmark.tables]
        out += [latex.table(table) for table in tables]
        if not tables:
            out.append(f"{what} was not measured against that of other programs.\n\n")
    return "".join(out)


def curves(run: Run) -> dict[str, str]:
    """A .dat file for each curve that has a point; x is in tokens, or steps where no tokens were logged."""
    per_step = number(run.get("run", "tokens_per_step")) or 1.0
    files = {}
    for name in CURVES:
        points: list[Point] = [(step * per_step, value) for step, value in run.series(name)]
        if any(y is not None for _, y in points):
            files[f"{name}.dat"] = xy(decimate(points, POINTS))
            if name in SMOOTHED:
                window = max(9, len(points) // 100) | 1
                files[f"{name}-median.dat"] = xy(smooth(points, window, POINTS))
    if run.rows and "fineweb-edu" in str(run.get("data", "source", "repo")).lower():
        end = run.rows[-1]["step"] * per_step
        files["gpt2.dat"] = xy([(0.0, GPT2_FINEWEB_EDU), (end, GPT2_FINEWEB_EDU)])
    return files


def xy(points: Sequence[Point]) -> str:
    return latex.data_file("x y", [(x, y) for x, y in points if y is not None])


def hellaswag(run: Run) -> dict[str, str]:
    """Our scores and the published ones of 124M-sized models, a row each, worst first: figure and labels."""
    found = read_object(run.folder / "hellaswag.json")
    rows: list[tuple[str, float, float]] = [("chance", CHANCE, 0.0)]
    for protocol in ("completion", "harness"):
        part = scored(found, protocol)
        value, error = number(part.get("acc_norm")), number(part.get("acc_norm_stderr"))
        if value is not None:
            rows.append((f"this run, {protocol}", value, error or 0.0))
    if len(rows) == 1:
        return {}
    small = [a for a in ANCHORS if a.model in ("GPT-2 124M", "GPT-3 Small") and a.metric == "acc_norm"]
    protocols = {"gpt3-paper": "the paper's own"}
    rows += [(f"{a.model}, {protocols.get(a.protocol, a.protocol)}", a.value, 0.0) for a in small]
    numbers = [(i, 100 * value, 100 * error) for i, (_, value, error) in enumerate(rows)]
    labels = ",".join(f"{{{latex.escape(label)}}}" for label, _, _ in rows)
    places = ",".join(str(i) for i in range(len(rows)))
    return {
        "hellaswag.dat": latex.data_file("place value error", numbers),
        "hellaswag-labels.tex": (
            f"\\pgfplotsset{{hellaswag/.style={{ymin=-0.6, ymax={len(rows) - 0.4}, ytick={{{places}}}, "
            f"yticklabels={{{labels}}}}}}}\n"
        ),
    }


def samples(run: Run) -> str:
    """The last things the model wrote, prompt in bold; at most SAMPLES of them, [...] where one was cut."""
    last = [s for s in run.samples if s.step == run.samples[-1].step][:SAMPLES]
    texts = [s.text.removeprefix(s.prompt) for s in last]
    cut = [t if len(t) <= SAMPLE_CHARACTERS else t[:SAMPLE_CHARACTERS] + " [...]" for t in texts]
    return "".join(
        f"\\sample{{{latex.escape(s.prompt)}}}{{{latex.escape(text)}}}\n"
        for s, text in zip(last, cut, strict=True)
    )
