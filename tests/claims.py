"""What README, docs/ and research-report.tex state, held against the artefacts: problems(root) is a list of lines.

research-report.tex   every digit of its body stands in \\R{...}, \\cited{...}{...}, \\fixed{...}, an equation, a
                      reference or a name; and what \\R names is a fact that was measured
README.md, docs/*.md  a fact is stated as 5.335<!--run.val-loss-->; in README every number with a decimal, a per
                      cent sign or a unit is one of those, or its line or table says <!--cited--> or <!--setting-->
"""

import re
from pathlib import Path

from aymen_gpt.errors import DataError
from aymen_gpt.reporting.run_folder import read_run
from paper.build import stated
from paper.facts import all_facts
from paper.facts import known as known_of

DEMO = "docs/results/demo"
NAMES = re.compile(r"GPT-[23]\b|\b124M\b|A100\b|\bAdamW?\b|bfloat")
LABELLED = re.compile(
    r"(?<!\\)%[^\n]*|\\(?:cited|href)\{[^{}]*\}\{[^{}]*\}|\\(?:R|known|fixed|cite|ref|label|url|input)\{[^{}]*\}"
)
FORMULA = re.compile(r"\\\[.*?\\\]|\$([^$]*)\$", re.S)
LAYOUT = re.compile(
    r"\\multicolumn\{\d\}|\\parbox\{[^{}]*\}|\\includegraphics\[[^]]*\]|\\setlength\\\w+\{[^}]*\}|\\IfFileExists\{[^{}]*\}|\\begin\{tabular\}\{\w*\}"
    r"|nproc\\_per\\_node=\d|runs/gpt2"
)
MARKED = re.compile(r"([^\s|(*>]+(?: %| [a-z]+)?)<!--((?:run|plan|published|benchmark|recipe)\.[\w.-]+)-->")
LOOKS_MEASURED = re.compile(
    r"\d+\.\d+|\d[\d,.]*\s?(?:%|seconds|minutes|hours|tokens/s|MB/s|GB\b|nats|times as|x as)"
)


INSIDE = r"[^{}]*"
for _ in range(8):  # braces in braces, so deep
    INSIDE = rf"(?:[^{{}}]|\{{{INSIDE}\}})*"
KNOWN = re.compile(rf"\\known\{{([^{{}}]*)\}}\{{({INSIDE})\}}\{{({INSIDE})\}}")


def chosen(paper: str, values: dict[str, str]) -> str:
    r"""The body of a .tex file as LaTeX will read it: of \known{NAME}{IF}{ELSE} what holds for these values."""
    text = paper[paper.find(r"\begin{document}") :]
    while found := KNOWN.search(text):
        text = text[: found.start()] + found[2 if found[1] in values else 3] + text[found.end() :]
    return text


def problems(root: Path) -> list[str]:
    try:
        facts = all_facts(read_run(root / DEMO), root)
    except DataError as error:
        return [str(error)]
    known = known_of(facts)
    paper = (root / "research-report.tex").read_text()
    body = paper[paper.index(r"\begin{document}") :]
    asked = stated(body) | set(re.findall(r"\\known\{([^}]*)\}", body))
    nowhere = (stated(chosen(paper, known)) - known.keys()) | (asked - {fact.name for fact in facts})
    found = [f"research-report.tex states {name}: no artefact shows it" for name in sorted(nowhere)]
    found += [f"research-report.tex has a number without a source: {line}" for line in unlabelled(paper)]
    found += [
        f"README.md has a number without a source: {line}" for line in unmarked((root / "README.md").read_text())
    ]
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        found += [f"{page.name} {line}" for line in wrong_marks(page.read_text(), known)]
    return found


def unlabelled(paper: str) -> list[str]:
    """The lines of a paper's body in which a digit is left when all that says what it is has been taken out."""
    start = paper.index(r"\begin{document}") + len(r"\begin{document}")
    body = paper[start : paper.index(r"\begin{thebibliography}")]
    body = re.sub(r"\\begin\{(tikzpicture|longtable)\}.*?\\end\{\1\}", "", body, flags=re.S)
    body = LAYOUT.sub("", NAMES.sub("", LABELLED.sub("", body)))
    body = FORMULA.sub(lambda found: found[1] if found[1] and is_number(found[1]) else "", body)
    return [line.strip() for line in body.splitlines() if re.search(r"\d", line)]


def is_number(formula: str) -> bool:
    """A formula has a letter in it; what has none, or has a decimal or a per cent sign, may state a result."""
    letters = re.search(r"[A-Za-z]", re.sub(r"\\(?:pm|approx|sim|times|cdot)\b", "", formula))
    return not letters or bool(re.search(r"\d\.\d|\\%", formula))


def unmarked(page: str) -> list[str]:
    """Lines of a Markdown page that look like they state a measurement and do not say whose."""
    page = re.sub(r"```.*?```", "", page, flags=re.S)
    lines = [line for line in page.splitlines() if "<!--cited-->" not in line and "<!--setting-->" not in line]
    bare = [re.sub(r"`[^`]*`|\]\([^)]*\)|https?://\S+|arXiv:\S+", "", MARKED.sub("", line)) for line in lines]
    return [line for line, rest in zip(lines, bare, strict=True) if LOOKS_MEASURED.search(rest)]


def wrong_marks(page: str, known: dict[str, str]) -> list[str]:
    """What stands before each mark must end with the fact it names."""
    found = []
    for before, name in re.findall(r"([^\n]*?)<!--((?:run|plan|published|benchmark|recipe)\.[\w.-]+)-->", page):
        if name not in known:
            found.append(f"states {name}: no artefact shows it")
        elif not before.endswith(known[name]):
            found.append(f"says ...{before[-20:]!r} where {name} is {known[name]!r}")
    return found
