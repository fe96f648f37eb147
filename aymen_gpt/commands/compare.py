"""hellaswag.py --compare: two files of --json -> is one model better, or lucky? Needs no torch."""

import argparse

from aymen_gpt.commands import console
from aymen_gpt.errors import UsageError
from aymen_gpt.evaluation.compare import Report, compare_files
from aymen_gpt.wording import percent


def main(options: argparse.Namespace) -> None:
    if options.json or options.data:
        raise UsageError("--compare reads what --json wrote and scores nothing: give it no other option")
    console.show(table(compare_files(*options.compare)))


def table(report: Report) -> str:
    """One line per protocol and measure, how to read it, and the verdict."""
    a, b = report.names
    lines = [
        f"A  {a}",
        f"B  {b}",
        f"both on the same {report.comparisons[0].n:,} examples",
        "",
        f"{'protocol':<12}{'measure':<10}{'A':>8}{'B':>9}{'B - A':>9}  {'95% interval':<19}"
        f"{'only A right':>13}{'only B right':>14}{'p':>10}",
    ]
    for c in report.comparisons:
        interval = f"{100 * c.low:+.2f} to {100 * c.high:+.2f}"
        lines.append(
            f"{c.protocol:<12}{c.measure:<10}{percent(c.right_a / c.n):>8}{percent(c.right_b / c.n):>9}"
            f"{100 * c.difference:>+9.2f}  {interval:<19}{c.only_a:>13,}{c.only_b:>14,}{c.p:>10.2g}"
        )
    lines += ["", "p: how often two models that are equally good differ at least so much (McNemar's test, exact);"]
    lines += ["interval: bootstrap over examples, in percentage points", "", *report.verdicts()]
    return "\n".join(lines)
