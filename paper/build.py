"""python -m paper.build RUN: a run -> numbers, figures and research-report.pdf, in build/report.

What stands beside research-report.tex when it is compiled:

    results.tex       \\result{NAME}{VALUE} for every number that is known: what \\R and \\known of the paper ask
    facts.tex         appendix rows: each number that the paper states, and where it comes from
    artefacts.tex     appendix rows: those files, hashed, and the commands that made them
    samples.tex       what the model wrote
    *.pdf             the run's curves, and those of Muon beside AdamW
"""

import os
import re
import shlex
import shutil
import subprocess
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from aymen_gpt.commands import console
from aymen_gpt.commands.options import parser
from aymen_gpt.errors import AymenError
from aymen_gpt.files import replace_text, sha256
from aymen_gpt.reporting import plots
from aymen_gpt.reporting.run_folder import Run, read_run
from aymen_gpt.wording import PROTOCOLS
from benchmarks import recipe
from paper.facts import RECIPES, Artefact, Fact, all_facts, artefact, known

ROOT = Path(__file__).absolute().parent.parent
PAPER = "research-report.tex"
PACKAGES = "latexmk texlive-latex-base texlive-latex-recommended texlive-pictures lmodern"
SAMPLES, SAMPLE_CHARACTERS = 3, 450
EXAMPLES = """\
  python -m paper.build runs/demo     build/report/research-report.pdf
"""


def main(argv: list[str] | None = None) -> int:
    p = parser(
        "Write the paper of a run: every number and figure in research-report.tex from the run's own files, each "
        "with its file, hash and command in the appendix.",
        EXAMPLES,
    )
    p.add_argument("run", type=Path, metavar="RUN", help="a run folder or a digest of one")
    p.add_argument("--out", type=Path, default=Path("build/report"), metavar="DIR", help="[build/report]")
    options = p.parse_args(argv)
    run = read_run(options.run)
    facts = all_facts(run, ROOT)
    for name, content in parts(run, facts).items():
        replace_text(options.out / name, content)
    draw(run, options.out)
    print(f"numbers    {options.out}/results.tex ({len(known(facts))})")
    compile_paper(options.out)
    print(f"paper      {options.out}/{Path(PAPER).stem}.pdf")
    return 0


# ---- text as LaTeX -----------------------------------------------------------------------------------

NAMES = "backslash asciitilde asciicircum less greater bar quotedbl quotesingle asciigrave"
SPECIAL = {c: f"\\text{name}{{}}" for c, name in zip("\\~^<>|\"'`", NAMES.split(), strict=True)}
SPECIAL |= {c: f"\\{c}" for c in "&%$#_{}"} | {"-": "{-}"}  # two hyphens are no dash


def escape(text: str) -> str:
    """Text as LaTeX that prints it, in ASCII: accents are dropped, letters beyond that become their number.

    >>> escape("50 % of \\\\input{x}")
    '50 \\\\% of \\\\textbackslash{}input\\\\{x\\\\}'
    """
    return "".join(_letter(c) for c in text)


def _letter(c: str) -> str:
    if c in "\n\t":
        return " "
    plain = unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode()
    return "".join(SPECIAL.get(p, p) for p in plain if p >= " ") or f"[U+{ord(c):04X}]"


def breakable(text: str) -> str:
    """Escaped text that may break after a slash, a dot, an underscore, a hyphen or an equals sign."""
    return re.sub(r"(/|\\_|[.]|=|\{-\})", lambda found: found[1] + r"\allowbreak{}", escape(text))


def code(text: str) -> str:
    return f"\\code{{{breakable(text)}}}"


# ---- what the paper reads ----------------------------------------------------------------------------


def stated(text: str) -> set[str]:
    """Names of the facts that a text states."""
    return set(re.findall(r"\\R\{([^}]*)\}", text))


def parts(run: Run, facts: list[Fact]) -> dict[str, str]:
    """The .tex files, by name."""
    values = known(facts)
    names = stated((ROOT / PAPER).read_text()) & values.keys()
    used = sorted((fact for fact in facts if fact.name in names), key=lambda fact: fact.name)
    sources = sorted({fact.artefact for fact in used} | {artefact(run, "metrics.jsonl")}, key=str)
    return {
        "results.tex": "".join(f"\\result{{{name}}}{{{escape(value)}}}\n" for name, value in values.items()),
        "facts.tex": "".join(map(fact_row, used)),
        "artefacts.tex": "".join(artefact_row(a) for a in sources if a.path.is_file()),
        "samples.tex": samples(run),
    }


def fact_row(fact: Fact) -> str:
    """A row "name & value & file & where in it" of the appendix, the target of the number in the text."""
    name = f"\\hypertarget{{fact:{fact.name}}}{{{code(fact.name)}}}"
    cells = (name, escape(fact.shown or ""), code(fact.artefact.path.name), breakable(fact.where))
    return f"{' & '.join(cells)} \\\\\n"


def artefact_row(a: Artefact) -> str:
    """A row "file & its hash & what made it", the file from the root of the repository when it is in there."""
    digest, path = sha256(a.path), a.path.absolute()
    path = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return f"{code(path.as_posix())} & \\code{{{digest[:32]}\\newline {digest[32:]}}} & {code(a.command)} \\\\\n"


def samples(run: Run) -> str:
    """The last things the model wrote, prompt in bold; at most SAMPLES of them, [...] where one was cut."""
    last = [s for s in run.samples if s.step == run.samples[-1].step][:SAMPLES]
    texts = [s.text.removeprefix(s.prompt) for s in last]
    cut = [t if len(t) <= SAMPLE_CHARACTERS else t[:SAMPLE_CHARACTERS] + " [...]" for t in texts]
    return "".join(f"\\sample{{{escape(s.prompt)}}}{{{escape(t)}}}\n" for s, t in zip(last, cut, strict=True))


def draw(run: Run, out: Path) -> None:
    """The figures, as PDF; one that the run gives nothing for is removed, as another run may have left it."""
    figures: dict[str, tuple[bool, Callable[[], Figure]]] = {
        "loss": (run.last("loss") is not None, partial(plots.loss, run, (640, 300))),
        "recipe": (True, partial(recipe.draw, recipe.finals(ROOT / RECIPES / "edu"), (640, 260))),
        "scores": (any(run.score(p) for p in PROTOCOLS), partial(plots.scores, run, (480, 260))),
    }
    for key in ("lr", "grad_norm", "tokens_per_second"):
        figures[key] = (run.last(key) is not None, partial(plots.small, run, key, (230, 170)))
    for name, (there, figure) in figures.items():
        path = out / f"{name}.pdf"
        path.unlink(missing_ok=True)
        if there:
            with rc_context({"font.family": "STIXGeneral", "pdf.fonttype": 42}), path.open("wb") as f:
                figure().savefig(f, format="pdf", transparent=True, metadata={"CreationDate": None})


# ---- LaTeX -------------------------------------------------------------------------------------------


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
    inputs = os.environ | {"TEXINPUTS": f"{out.resolve()}:"}
    done = subprocess.run(command, cwd=ROOT, env=inputs, capture_output=True, text=True)
    if done.returncode:
        log = out / "research-report.log"
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else ["! latexmk wrote no log"]
        first = next((i for i, line in enumerate(lines) if line.startswith("!")), 0)
        raise AymenError(f"{PAPER} does not compile: {' '.join(lines[first : first + 3])} (all of it: {log})")


if __name__ == "__main__":
    console.run(main)
