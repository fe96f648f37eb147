"""python -m aymen_gpt report RUN...: run folders -> a page with their curves."""

import argparse
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from aymen_gpt.commands import console
from aymen_gpt.errors import DataError
from aymen_gpt.wording import PROTOCOLS

if TYPE_CHECKING:
    from aymen_gpt.reporting.run_folder import Run

EXAMPLES = """\
  python -m aymen_gpt report runs/demo           draw runs/demo/report.html anew
  python -m aymen_gpt report runs/a runs/b       compare.html: both on the same axes
"""


def parser() -> argparse.ArgumentParser:
    p = console.parser(
        "Draw the page of a run, or one page that sets several runs beside one another: their losses by tokens, "
        "their scores, and the options in which they differ. A page is one file that loads nothing.",
        EXAMPLES,
        "python -m aymen_gpt report RUN ... [--out FILE]",
    )
    p.add_argument("runs", nargs="+", type=console.path, metavar="RUN", help="a run folder of pretrain.py")
    p.add_argument(
        "--out", type=console.path, metavar="FILE", help="[RUN/report.html, or compare.html for several runs]"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    from aymen_gpt.reporting.page import write_comparison, write_report
    from aymen_gpt.reporting.run_folder import read_run

    runs = [read_run(folder) for folder in options.runs]
    if len(runs) == 1:
        print(write_report(runs[0], options.out))
    else:
        print(write_comparison(runs, options.out or Path("compare.html")))
    return 0


def refresh(run: Path) -> None:
    """Draw the page of a run anew, and put its scores into the model cards of its checkpoints."""
    from aymen_gpt.reporting.page import write_report
    from aymen_gpt.reporting.run_folder import read_run

    found = read_run(run)
    write_report(found)
    write_cards(found)


def write_cards(run: "Run") -> None:
    """The model card of each checkpoint whose step was scored, with these scores; others stay as they are."""
    from aymen_gpt.model.folders import checkpoints, step_of
    from aymen_gpt.training.checkpoint import write_card

    for folder in checkpoints(run.folder):
        scores = {protocol: run.score(protocol, step_of(folder)) for protocol in PROTOCOLS}
        known = {protocol: vars(score) for protocol, score in scores.items() if score is not None}
        if known:
            with suppress(OSError, DataError):  # damaged, or deleted just now
                write_card(folder, known)


if __name__ == "__main__":
    console.run(main)
