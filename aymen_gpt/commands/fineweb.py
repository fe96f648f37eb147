"""fineweb.py: text to token shards."""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from aymen_gpt.commands import console
from aymen_gpt.data import shards
from aymen_gpt.data.prepare import Preparation, PrepareOptions, Progress, Report, Summary
from aymen_gpt.data.shares import Merge, SharePreparation
from aymen_gpt.errors import DataError, UsageError
from aymen_gpt.training.config import fitting
from aymen_gpt.wording import duration


def main(args: argparse.Namespace) -> None:
    if args.restart and (args.verify or args.repair):
        mode = "--verify" if args.verify else "--repair"
        raise UsageError(f"--restart begins anew, {mode} does not: give one of them")
    if args.verify:
        return verify(args.out)
    given = {f.name: getattr(args, f.name) for f in fields(PrepareOptions)}
    options = PrepareOptions(**given | {"source": tuple(args.source or ["hub"])})
    with reporter() as report:
        if args.repair:
            rebuilt = Preparation(options, report).repair()
            done = f"{args.out}: {plural(len(rebuilt), 'file')} rebuilt, all are as the manifest says"
        elif args.part:
            number, count = args.part
            done = closing(SharePreparation(options, number, count, report).run(), args.part)
        else:
            done = closing((Merge if args.merge else Preparation)(options, report).run())
    console.show(console.as_typed(done))


def verify(out: Path) -> None:
    damaged = shards.verify(out)
    if damaged:
        listed = "; ".join(f"{name}: {why}" for name, why in damaged.items())
        raise DataError(f"{plural(len(damaged), 'damaged file')} in {out} ({listed}): {shards.way_out(out)}")
    finished = (shards.read_manifest(out) or {}).get("complete")
    more = "" if finished else "; more are to come: run the same fineweb.py command again"
    print(f"{out}: all files are as the manifest says{more}")


def plural(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


@contextmanager
def reporter() -> Iterator[Report]:
    """A function to call with progress and events, which shows them on stderr."""
    first: tuple[float, int, float] | None = None  # time, bytes and fraction when this process began

    def report(event: Progress | str) -> None:
        nonlocal first
        if isinstance(event, str):
            return shown.say(event)
        totals, now = event.totals, time.monotonic()
        first = first or (now, totals.bytes, event.fraction)
        began, bytes, fraction = first
        seconds, gained = now - began, event.fraction - fraction
        line = f"{totals.documents:,} documents, {totals.tokens / 1e6:,.1f}M tokens, {event.shards} shards"
        if totals.bytes:
            line += f", {(totals.bytes - bytes) / 1e6 / max(seconds, 0.001):.1f} MB/s"
        if gained > 0:
            line += f", {duration(seconds * (1 - event.fraction) / gained)} left"
        shown.move(event.fraction, line)

    with console.Progress() as shown:
        yield report


def closing(summary: Summary, part: tuple[int, int] | None = None) -> str:
    totals = summary.totals
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(totals.skipped.items())) or "none"
    density = f" ({totals.bytes / max(totals.tokens, 1):.2f} bytes of text per token)" if totals.bytes else ""
    if part:
        what, then = (
            f"part {part[0]}/{part[1]}",
            "once all parts are prepared: the same command with --merge for --part",
        )
    else:
        what = f"{summary.shards} shards (the first is for validation)"
        then = fitting(totals.tokens, str(summary.folder))
    return f"""\
{"already " * summary.already}prepared: {summary.folder}, {what}
documents  {totals.documents:,}
tokens     {totals.tokens:,}{density}
skipped    {skipped}
next       {then}"""
