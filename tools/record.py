"""python -m tools.record RUN DIGEST: keep a run's small files in git, and renew the numbers of README and docs.

hellaswag.json loses its answers example by example, a long metrics.jsonl most of its rows; digest.json tells the
hashes of the files as they were.
"""

import json
import sys
from pathlib import Path

from aymen_gpt.commands import console
from aymen_gpt.errors import DataError, UsageError
from aymen_gpt.files import replace_text, sha256
from aymen_gpt.reporting.run_folder import Run, read_run
from paper.facts import run_facts

ROOT = Path(__file__).parent.parent
KEPT = ("config.json", "metrics.jsonl", "status.json", "samples.jsonl", "hellaswag.json")
ROWS = 1500  # of metrics.jsonl in a digest


def main() -> int:
    if len(sys.argv) != 3:
        raise UsageError(
            "expected a run folder and the folder of its digest: python -m tools.record runs/demo DIR"
        )
    run, folder = read_run(Path(sys.argv[1])), Path(sys.argv[2])
    old = shown(folder)
    print(digest(run, folder))
    for page in restate([ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], old, shown(folder)):
        print(f"restated   {page}")
    return 0


def digest(run: Run, folder: Path) -> str:
    """Copy what a run's numbers stand on into ``folder``; what was done, in a line."""
    missing = [name for name in KEPT if not (run.folder / name).is_file()]
    if missing:
        raise DataError(f"{run.folder} has no {missing[0]}: a digest is made of a finished run that was scored")
    if run.status.get("state") != "done":
        raise DataError(f"{run.folder} is {run.status.get('state')}: a digest is made of a finished run")
    texts = {name: (run.folder / name).read_text() for name in KEPT}
    lines = texts["metrics.jsonl"].splitlines()
    kept = thinned(lines)
    texts["metrics.jsonl"] = "\n".join(kept) + "\n"
    score = {key: value for key, value in run.hellaswag.items() if key != "examples"}
    texts["hellaswag.json"] = json.dumps(score, indent=2) + "\n"
    left_out = ["hellaswag.json: examples", f"metrics.jsonl: {len(lines) - len(kept)} of {len(lines)} rows"]
    hashes = {name: sha256(run.folder / name) for name in KEPT}
    note = {"made_from": run.get("run", "run"), "sha256": hashes, "left_out": left_out}
    for name, text in (texts | {"digest.json": json.dumps(note, indent=2) + "\n"}).items():
        replace_text(folder / name, text)
    return f"digest     {folder} ({len(KEPT)} files of {run.folder}, commit {run.get('git_commit')})"


def shown(folder: Path) -> dict[str, str]:
    """{name: shown} of the facts of a digest, {} where there is none yet."""
    try:
        return {fact.name: fact.shown for fact in run_facts(read_run(folder)) if fact.shown is not None}
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


def thinned(lines: list[str]) -> list[str]:
    """At most about ROWS lines of metrics.jsonl: all that measured or skipped something, some of the others."""
    stride = -(-len(lines) // ROWS)
    telling = ("val_loss", "hellaswag", "skipped", "spike")
    kept = [line for i, line in enumerate(lines) if i % stride == 0 or any(f'"{key}"' in line for key in telling)]
    return kept if kept[-1:] == lines[-1:] else [*kept, lines[-1]]


if __name__ == "__main__":
    console.run(main)
