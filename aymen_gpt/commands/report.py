"""aymen-gpt report RUN...: run folders -> a page with their curves."""

import argparse
from contextlib import suppress
from pathlib import Path

from aymen_gpt.errors import DataError
from aymen_gpt.model.folders import checkpoints, step_of
from aymen_gpt.reporting.page import write_comparison, write_report
from aymen_gpt.reporting.run_folder import Run, read_run
from aymen_gpt.wording import PROTOCOLS


def main(options: argparse.Namespace) -> None:
    runs = [read_run(folder) for folder in options.runs]
    if len(runs) == 1:
        print(write_report(runs[0], options.out))
    else:
        print(write_comparison(runs, options.out or Path("compare.html")))


def refresh(folder: Path) -> None:
    """Draw the page of a run anew, and put its scores into the model cards of its checkpoints."""
    run = read_run(folder)
    write_report(run)
    write_cards(run)


def write_cards(run: Run) -> None:
    """The model card of each checkpoint whose step was scored, with these scores; others stay as they are."""
    from aymen_gpt.training.checkpoint import write_card  # imports torch, which a page does not need

    for folder in checkpoints(run.folder):
        scores = {protocol: run.score(protocol, step_of(folder)) for protocol in PROTOCOLS}
        known = {protocol: vars(score) for protocol, score in scores.items() if score is not None}
        if known:
            with suppress(OSError, DataError):  # damaged, or deleted just now
                write_card(folder, known)
