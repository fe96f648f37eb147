"""Facts, curves and our own Markdown as the parts that research-report.tex reads. Values in, strings out.

Everything that comes from a file is escaped: whatever stands in a run's JSON or samples, LaTeX prints it and never
runs it.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from aymen_gpt.reporting.facts import Artefact, Fact

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "'": r"\textquotesingle{}",
    "`": r"\textasciigrave{}",
    "-": "{-}",  # two of them are no dash
    "\u00a0": "~",
    "\u00b1": r"\textpm{}",
    "\u00b5": r"\textmu{}",
    "\u00b7": r"\textperiodcentered{}",
    "\u00d7": r"\texttimes{}",
    "\u03c3": r"$\sigma$",
    "\u2013": "--",
    "\u2014": "---",
    "\u2018": "`",
    "\u2019": "'",
    "\u201c": "``",
    "\u201d": "''",
    "\u2192": r"\textrightarrow{}",
    "\u2212": "$-$",
    "\u2248": r"$\approx$",
    "\u2264": r"$\leq$",
    "\u2265": r"$\geq$",
} | {c: f"\\{c}" for c in "&%$#_{}"}


def escape(text: str) -> str:
    """Text as LaTeX that prints it, in ASCII: accents are dropped, letters beyond that become their number.

    >>> escape("50 % of \\\\input{x}")
    '50 \\\\% of \\\\textbackslash{}input\\\\{x\\\\}'
    """
    return "".join(_letter(c) for c in text)


def _letter(c: str) -> str:
    if c in _SPECIAL:
        return _SPECIAL[c]
    if c in "\n\t":
        return " "
    if " " <= c <= "~":
        return c
    plain = unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode()
    return "".join(_SPECIAL.get(p, p) for p in plain if p >= " ") or f"[U+{ord(c):04X}]"


def results(facts: Iterable[Fact]) -> str:
    """results.tex: what the macro R of the paper looks names up in."""
    return "".join(f"\\result{{{fact.name}}}{{{escape(fact.shown)}}}\n" for fact in facts)


def data_file(columns: str, rows: Iterable[Sequence[float]]) -> str:
    """A table of numbers for pgfplots: data_file("x y", [(1, 2.5)]) -> "x y\\n1 2.5\\n"."""
    return "\n".join([columns, *(" ".join(f"{v:.9g}" for v in row) for row in rows)]) + "\n"


# ---- the appendix ------------------------------------------------------------------------------------


def fact_rows(facts: Iterable[Fact]) -> str:
    """Rows "name & value & file & where in it" of the appendix, each the target of its numbers in the text."""
    return "".join(
        f"\\hypertarget{{fact:{fact.name}}}{{\\code{{{breakable(fact.name)}}}}} & {escape(fact.shown)} & "
        f"\\code{{{breakable(fact.artefact.path.name)}}} & {breakable(fact.where)} \\\\\n"
        for fact in facts
    )


def artefact_rows(artefacts: Iterable[tuple[Artefact, str, str]]) -> str:
    """Rows "file & sha256 & command" for (artefact, its path as shown, its hash)."""
    return "".join(
        f"\\code{{{breakable(path)}}} & \\code{{{digest[:32]}\\newline {digest[32:]}}} & "
        f"\\code{{{breakable(artefact.command)}}} \\\\\n"
        for artefact, path, digest in artefacts
    )


def breakable(text: str) -> str:
    """Escaped text that may break after a slash, a dot, an underscore or an equals sign."""
    return re.sub(r"(/|\\_|\.|=)", r"\1\\allowbreak{}", escape(text))


# ---- our own Markdown --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table of a Markdown page: the section it stands in, the code of that section's first line, its cells."""

    section: str
    command: str
    header: list[str]
    rows: list[list[str]]
    n_labels: int = 1  # columns of words at its left


def tables(markdown: str) -> list[Table]:
    """The tables of a page, in order."""
    found: list[Table] = []
    for section in re.split(r"^## ", markdown, flags=re.M)[1:]:
        title, _, body = section.partition("\n")
        code = re.search(r"`([^`]+)`", body)
        for block in re.findall(r"(?:^\|.*\|[ ]*\n)+", body + "\n", re.M):
            cells = [[c.strip() for c in line.strip().strip("|").split("|")] for line in block.splitlines()]
            command = " ".join(code[1].split()) if code else ""
            found.append(Table(title.strip(), command, cells[0], [row for row in cells[2:]]))
    return found


def inline(markdown: str) -> str:
    """A paragraph with `code`, **bold**, *slanted* words and [links](...), as LaTeX."""
    out = []
    for part in re.split(
        r"(`[^`]+`|\*\*[^*]+\*\*|(?<!\w)\*[^*\s][^*]*\*|\[[^\]]+\]\([^)]+\))", " ".join(markdown.split())
    ):
        if part.startswith("`"):
            out.append(f"\\code{{{breakable(part[1:-1])}}}")
        elif part.startswith("**"):
            out.append(f"\\textbf{{{escape(part[2:-2])}}}")
        elif part.startswith("*") and part.endswith("*") and len(part) > 2:
            out.append(f"\\emph{{{escape(part[1:-1])}}}")
        elif part.startswith("["):
            out.append(escape(part[1 : part.index("]")]))
        else:
            out.append(escape(part))
    return "".join(out)


def paragraphs(markdown: str) -> str:
    """Every paragraph that begins in bold (docs/experiments.md: date and finding)."""
    blocks = [block for block in re.split(r"\n\s*\n", markdown) if block.startswith("**")]
    return "\n\n".join(inline(block) for block in blocks) + "\n"


def table(found: Table) -> str:
    """A Markdown table with its caption, never wider than the text; no float, as there may be many."""
    columns = "l" * found.n_labels + "r" * (len(found.header) - found.n_labels)
    lines = [" & ".join(inline(cell) for cell in row) + r" \\" for row in [found.header, *found.rows]]
    command = f": \\code{{{breakable(found.command)}}}" if found.command else ""
    return (  # in a box, or a page might end between caption and rows
        "\\begin{center}\\begin{minipage}{\\linewidth}\\centering\\small\\captionsetup{position=top}\n"
        f"\\captionof{{table}}{{{escape(found.section)}{command}}}\n"
        f"\\fitted{{\\begin{{tabular}}{{{columns}}}\\toprule\n{lines[0]}\\midrule\n"
        + "\n".join(lines[1:])
        + "\n\\bottomrule\\end{tabular}}\n\\end{minipage}\\end{center}\n"
    )
