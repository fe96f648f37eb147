"""python -m aymen_gpt.commands.report RUN...: run folders -> a page with their curves."""

import argparse
from pathlib import Path

from aymen_gpt.commands import console

EXAMPLES = """\
  python -m aymen_gpt.commands.report runs/demo               draw runs/demo/report.html anew
  python -m aymen_gpt.commands.report runs/a runs/b           compare.html: both on the same axes
"""


def parser() -> argparse.ArgumentParser:
    p = console.parser(
        "Draw the page of a run, or one page that sets several runs beside one another: their losses by tokens "
        "and by time, their scores, and the options in which they differ. A page is one file that loads nothing.",
        EXAMPLES,
    )
    p.add_argument("runs", nargs="+", type=console.path, metavar="RUN", help="a run folder of pretrain.py")
    p.add_argument(
        "--out", type=console.path, metavar="FILE", help="[RUN/report.html, or compare.html for several runs]"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    from aymen_gpt.reporting.page import write_comparison, write_report

    if len(options.runs) == 1:
        print(write_report(options.runs[0], options.out))
    else:
        print(write_comparison(options.runs, options.out or Path("compare.html")))
    return 0


if __name__ == "__main__":
    console.run(main)
