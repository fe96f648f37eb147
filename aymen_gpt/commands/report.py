"""python -m aymen_gpt.commands.report RUN: a run -> results.tex, its curves and research-report.pdf."""

import argparse
import json
import os
import shlex
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import aymen_gpt
from aymen_gpt.commands import console
from aymen_gpt.errors import AymenError, DataError, UsageError
from aymen_gpt.files import replace_text, sha256, write_whole
from aymen_gpt.reporting import facts as facts_of
from aymen_gpt.reporting import paper
from aymen_gpt.reporting.benchmarks import read_benchmarks
from aymen_gpt.reporting.charts import human
from aymen_gpt.reporting.facts import Artefact, Fact
from aymen_gpt.reporting.runs import Run, read_object, read_run
from aymen_gpt.training.config import RECIPES, TrainConfig, resolve

ROOT = Path(aymen_gpt.__file__).parent.parent
PAPER = "research-report.tex"
PACKAGES = "latexmk texlive-latex-base texlive-latex-recommended texlive-pictures lmodern"
KEPT = ("config.json", "metrics.jsonl", "status.json", "samples.jsonl")  # of a run, in its digest
CLAIMED_HOURS = 7  # the first version's README, for 40B tokens on eight A100
A100_PEAK = 312e12  # bf16 FLOP/s, NVIDIA's data sheet
ROWS = 1500  # of metrics.jsonl in a digest

EXAMPLES = """\
  python -m aymen_gpt.commands.report runs/demo                                   the PDF, in build/report
  python -m aymen_gpt.commands.report runs/demo --digest docs/results/demo        keep what its numbers stand on
"""


def parser() -> argparse.ArgumentParser:
    p = console.parser(
        "Write the paper of a run: every number and figure in research-report.tex from the run's own files, each "
        "with its file, hash and command in the appendix.",
        EXAMPLES,
    )
    p.add_argument("run", type=Path, metavar="RUN", help="a run folder or a digest of one")
    p.add_argument("--out", type=Path, default=Path("build/report"), metavar="DIR", help="[build/report]")
    p.add_argument("--digest", type=Path, metavar="DIR", help="write no paper, but the small files it stands on")
    return p


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    run = read_run(options.run)
    if options.digest:
        old = restatable(options.digest)
        print(digest(run, options.digest))
        for page in restate(
            [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], old, restatable(options.digest)
        ):
            print(f"restated   {page}")
        return 0
    if not (ROOT / PAPER).is_file():
        raise UsageError(f"no {PAPER} in {ROOT}: the paper is written in a checkout of the repository")
    text = (ROOT / PAPER).read_text()
    facts = all_facts(run, ROOT)
    parts = paper.parts(run, facts, text, ROOT)
    for name in paper.OPTIONAL - parts.keys():  # a curve that another run left here and this one does not have
        (options.out / name).unlink(missing_ok=True)
    for name, content in parts.items():
        replace_text(options.out / name, content)
    print(f"numbers    {options.out}/results.tex ({len(facts)}, {len(paper.stated(text))} of them in the paper)")
    compile_paper(options.out)
    print(f"paper      {options.out}/{Path(PAPER).stem}.pdf")
    return 0


def all_facts(run: Run, root: Path) -> list[Fact]:
    """Everything that README, docs and paper may state: of the run, the published recipe, others, benchmarks."""
    anchors = root / "aymen_gpt/reporting/anchors.py"
    found = facts_of.run_facts(run) + plan_facts(root, run) + facts_of.published_facts(anchors)
    return found + [fact for benchmark in read_benchmarks(root) for fact in benchmark.facts]


def plan_facts(root: Path, run: Run) -> list[Fact]:
    """The recipe of the published run, as `python pretrain.py` without options would do it: plan.*"""
    from aymen_gpt.model.gpt import GPTConfig

    plan, shape = resolve({}), GPTConfig()
    recipe = Artefact(root / "aymen_gpt/training/config.py", "python pretrain.py --help")
    code = Artefact(root / "aymen_gpt/model/gpt.py", "python pretrain.py --help")
    tokens = plan.steps * plan.tokens_per_step
    done = run.last("tokens")
    found = [
        Fact("plan.tokens", f"{tokens:,}", recipe, "steps x tokens_per_step"),
        Fact("plan.tokens-short", human(tokens), recipe, "steps x tokens_per_step"),
        Fact("plan.warmup-tokens", human(plan.warmup_steps * plan.tokens_per_step), recipe, "warmup x tokens"),
        Fact(
            "plan.run-share",
            facts_of.shown(done and 100 * done / tokens, "{:.2g} %"),
            recipe,
            "run.tokens / plan.tokens",
        ),
        Fact("plan.params", f"{shape.n_params:,}", code, "GPTConfig().n_params"),
        Fact("plan.flops-per-token", human(shape.flops_per_token), code, "flops_per_token"),
        Fact("plan.padded-vocabulary", f"{shape.padded_vocab_size:,}", code, "GPTConfig().padded_vocab_size"),
    ]
    claimed = tokens / CLAIMED_HOURS / 3600
    mfu = claimed * shape.flops_per_token / (8 * A100_PEAK)
    found += [
        Fact("plan.claimed-speed", f"{claimed / 1e6:.2f} million", recipe, "plan.tokens / 7 hours"),
        Fact(
            "plan.claimed-mfu", facts_of.share(mfu), recipe, "claimed-speed x flops-per-token / (8 x 312 TFLOP/s)"
        ),
    ]
    for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
        found.append(Fact(f"plan.{facts_of.slug(name)}", f"{getattr(shape, name):,}", code, name))
    for f in fields(TrainConfig):
        value = getattr(plan, f.name)
        if f.metadata["group"] in ("run", "recipe", "watching") and not isinstance(value, str | bool | None):
            counted = isinstance(value, int) and f.name != "seed"
            number = f"{value:,}" if counted else facts_of.rate(value)
            found.append(Fact(f"plan.{facts_of.slug(f.name)}", number, recipe, f.name))
    assert set(RECIPES["gpt2"]) == set(), "the defaults are no longer the published run"
    return list({fact.name: fact for fact in found}.values())


def compile_paper(out: Path) -> None:
    """Run latexmk, which may start no other program; AymenError with the first error of its log."""
    if shutil.which("latexmk") is None or shutil.which("pdflatex") is None:
        raise AymenError(
            f"latexmk is missing, so {out} has the numbers and curves but no PDF: "
            f"apt-get install --no-install-recommends {PACKAGES}"
        )
    command = ["latexmk", "-pdf", "-pdflatex=pdflatex -no-shell-escape %O %S", "-interaction=nonstopmode"]
    command += ["-halt-on-error", f"-outdir={out.resolve()}", PAPER]
    print(f"$ {shlex.join(command)}", flush=True)
    found = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TEXINPUTS": f"{out.resolve()}:"}, capture_output=True, text=True
    )
    if found.returncode:
        raise AymenError(f"{PAPER} does not compile: {first_error(out)} (all of it: {out}/research-report.log)")


def first_error(out: Path) -> str:
    """The first line of TeX's log that begins with ! and the two after it."""
    try:
        lines = (out / "research-report.log").read_text(errors="replace").splitlines()
    except OSError:
        return "latexmk wrote no log"
    start = next((i for i, line in enumerate(lines) if line.startswith("!")), 0)
    return " ".join(lines[start : start + 3])


def digest(run: Run, folder: Path) -> str:
    """Copy the small files that a run's numbers stand on, for keeping in git; what was done, in a line.

    hellaswag.json loses its answers example by example. digest.json tells the hashes of the files as they were.
    """
    made_from = {}
    for name in (*KEPT, "hellaswag.json"):
        source = run.folder / name
        if not source.is_file():
            raise DataError(f"{run.folder} has no {name}: a digest is made of a finished run that was scored")
        made_from[name] = sha256(source)
    if run.status.get("state") != "done":
        raise DataError(f"{run.folder} is {run.status.get('state')}: a digest is made of a finished run")
    for name in KEPT:
        write_whole(folder / name, (run.folder / name).read_bytes())
    lines, kept = thinned((run.folder / "metrics.jsonl").read_text().splitlines())
    replace_text(folder / "metrics.jsonl", "\n".join(kept) + "\n")
    score = {k: v for k, v in read_object(run.folder / "hellaswag.json").items() if k != "examples"}
    replace_text(folder / "hellaswag.json", json.dumps(score, indent=2) + "\n")
    left_out = ["hellaswag.json: examples", f"metrics.jsonl: {lines - len(kept)} of {lines} rows"]
    note = {"made_from": run.get("run", "run"), "sha256": made_from, "left_out": left_out}
    replace_text(folder / "digest.json", json.dumps(note, indent=2) + "\n")
    return f"digest     {folder} ({len(made_from)} files of {run.folder}, commit {run.get('git_commit')})"


def restatable(folder: Path) -> dict[str, str]:
    """{name: shown} of the facts of a digest, {} where there is none yet."""
    try:
        return {fact.name: fact.shown for fact in facts_of.run_facts(read_run(folder))}
    except DataError:
        return {}


def restate(pages: list[Path], old: dict[str, str], new: dict[str, str]) -> list[Path]:
    """Put new values where pages state old ones, "5.335<!--run.val-loss-->"; the pages that changed."""
    changed = []
    for page in pages:
        before = text = page.read_text()
        for name, value in old.items():
            mark = f"<!--{name}-->"
            text = text.replace(value + mark, new.get(name, value) + mark)
        if text != before:
            replace_text(page, text)
            changed.append(page)
    return changed


def thinned(lines: list[str]) -> tuple[int, list[str]]:
    """How many rows of metrics.jsonl there are, and at most about ROWS of them: all that measured or skipped
    something, and evenly many of the others."""
    stride = -(-len(lines) // ROWS)
    telling = ("val_loss", "hellaswag", "skipped", "spike")
    kept = [line for i, line in enumerate(lines) if i % stride == 0 or any(f'"{key}"' in line for key in telling)]
    return len(lines), [*kept, *lines[-1:]] if kept[-1:] != lines[-1:] else kept


if __name__ == "__main__":
    console.run(main)
