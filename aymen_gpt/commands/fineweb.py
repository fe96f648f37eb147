"""python fineweb.py: text to token shards."""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from aymen_gpt.commands import console
from aymen_gpt.errors import DataError, UsageError, printable
from aymen_gpt.training.config import Range, fitting
from aymen_gpt.wording import duration

if TYPE_CHECKING:
    from aymen_gpt.data.prepare import Progress, Summary

EXAMPLES = """\
  python fineweb.py                                        FineWeb-Edu sample-10BT: 28 GB to read, 20 GB of shards
  python fineweb.py --max-tokens 1e8 --out data/small      its first 100M tokens
  python fineweb.py --source builtin --out data/builtin    the documentation on this machine, no network
  python fineweb.py --source my/texts more.jsonl.gz --out data/mine

Killed or failed? The same command again continues at the last finished shard.
"""
MODES = ("verify", "repair", "part", "merge")
MOST_TOKENS = 2**31 - 1  # that the header of a shard can count
EVERY = 10.0  # seconds between two progress lines when stderr is not a terminal


def parser() -> argparse.ArgumentParser:
    p = console.parser(
        "Turn text into shards of GPT-2 tokens, in llm.c's format.",
        EXAMPLES,
        "python fineweb.py [--source WORD ...] [--out DIR] ...",
    )
    tokens = console.number(Range(1, 10**15), whole=True)
    shard_tokens = console.number(Range(1, MOST_TOKENS), whole=True)
    text = p.add_argument_group("text")
    text.add_argument(
        "--source",
        nargs="+",
        action="extend",
        type=console.name,
        metavar="WORD",
        help="`hub` (FineWeb-Edu from Hugging Face, the default), `builtin` (documentation installed with "
        "Python), files and folders of .parquet, .jsonl, .jsonl.gz, .jsonl.zst, .txt, .md",
    )
    text.add_argument(
        "--text-column",
        type=console.name,
        metavar="NAME",
        help="column or key of the text (default: text, else content)",
    )
    text.add_argument(
        "--revision",
        type=console.name,
        metavar="COMMIT",
        help="of the dataset on the Hub (default of FineWeb-Edu: a pinned one)",
    )
    text.add_argument("--keep-source", action="store_true", help="keep downloaded files, in DIR/.source")
    text.add_argument(
        "--skip-bad-rows", action="store_true", help="leave out rows without usable text, however many there are"
    )
    shards = p.add_argument_group("shards")
    shards.add_argument(
        "--out", type=console.path, default=Path("edu_fineweb10B"), metavar="DIR", help="default: %(default)s"
    )
    shards.add_argument(
        "--shard-tokens", type=shard_tokens, default=10**8, metavar="N", help="tokens a shard (default: 1e8)"
    )
    shards.add_argument("--max-tokens", type=tokens, metavar="N", help="stop after so many tokens (default: all)")
    shards.add_argument(
        "--restart", action="store_true", help="begin anew; what is in DIR is set aside in DIR/earlier-1, -2, ..."
    )
    work = p.add_argument_group("work")
    work.add_argument(
        "--workers",
        type=console.number(Range(0, 10_000), whole=True),
        metavar="N",
        help="processes (default: one per CPU; 0: only this one)",
    )
    work.add_argument(
        "--encoder",
        type=console.choice(("gigatoken", "tiktoken")),
        metavar="WORD",
        default="gigatoken",
        help="gigatoken or tiktoken: both give the same ids, which is checked [gigatoken where it is installed]",
    )
    what = work.add_mutually_exclusive_group()
    what.add_argument(
        "--part",
        type=share,
        metavar="I/N",
        help="prepare only the I-th of N shares of the source, on this machine of many",
    )
    what.add_argument("--merge", action="store_true", help="make the shards from all N shares in DIR/parts")
    what.add_argument("--verify", action="store_true", help="compare every file in DIR with its recorded sha256")
    what.add_argument("--repair", action="store_true", help="verify, then rebuild damaged files from their source")
    return p


def share(text: str) -> tuple[int, int]:
    """For argparse: "2/8", the second of eight shares."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text or repr('')}: expected I/N, the I-th of N, from 1/N to N/N")
    return int(match[1]), int(match[2])


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    for mode in ("verify", "repair"):
        if args.restart and getattr(args, mode):
            raise UsageError(f"--restart begins anew, --{mode} does not: give one of them")
    if args.verify:
        return verify(args.out)
    if args.repair:
        return repair(args)
    from aymen_gpt.data.prepare import Preparation, PrepareOptions
    from aymen_gpt.data.shares import Merge, SharePreparation

    chosen = {name: value for name, value in vars(args).items() if name not in (*MODES, "source")}
    options = PrepareOptions(source=tuple(args.source or ["hub"]), **chosen)
    with Reporter() as reporter:
        if args.part:
            number, count = args.part
            summary = SharePreparation(options, number, count, reporter).run()
        else:
            summary = (Merge if args.merge else Preparation)(options, reporter).run()
    console.show(console.as_typed(closing(summary, args.part)))
    return 0


def verify(out: Path) -> int:
    from aymen_gpt.data import shards

    damaged = shards.verify(out)
    if damaged:
        listed = "; ".join(f"{name}: {why}" for name, why in damaged.items())
        raise DataError(
            f"{len(damaged)} damaged file{'s' * (len(damaged) != 1)} in {out} ({listed}): {shards.way_out(out)}"
        )
    finished = (shards.read_manifest(out) or {}).get("complete")
    more = "" if finished else "; more are to come: run the same fineweb.py command again"
    print(f"{out}: all files are as the manifest says{more}")
    return 0


def repair(args: argparse.Namespace) -> int:
    from aymen_gpt.data import prepare

    with Reporter() as reporter:
        rebuilt = prepare.repair(
            args.out, reporter, workers=args.workers, keep_source=args.keep_source, encoder=args.encoder
        )
    print(f"{args.out}: {len(rebuilt)} file{'s' * (len(rebuilt) != 1)} rebuilt, all are as the manifest says")
    return 0


class Reporter:
    """Shows progress on stderr: a bar on a terminal, else a line every ten seconds."""

    def __init__(self) -> None:
        self.began = self.shown = time.monotonic()
        self.first: tuple[int, float] | None = None  # text bytes and fraction when this process began
        self.bar = None

    def __enter__(self) -> "Reporter":
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=100, bar_format="{percentage:3.0f}%|{bar:20}| {desc}", leave=False)
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, event: "Progress | str") -> None:
        now = time.monotonic()
        if isinstance(event, str):
            self._print(event)
            return
        if self.first is None:
            self.first = event.totals.bytes, event.fraction
            self.began = self.shown = now
        if now - self.shown >= (0.2 if self.bar is not None else EVERY):
            self.shown = now
            self._show(event, now - self.began)

    def _print(self, line: str) -> None:
        line = printable(line)
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def _show(self, progress: "Progress", seconds: float) -> None:
        assert self.first is not None
        totals, gained = progress.totals, progress.fraction - self.first[1]
        left = f", {duration(seconds * (1 - progress.fraction) / gained)} left" if gained > 0 else ""
        speed = f", {(totals.bytes - self.first[0]) / 1e6 / max(seconds, 0.001):.1f} MB/s" if totals.bytes else ""
        line = (
            f"{totals.documents:,} documents, {totals.tokens / 1e6:,.1f}M tokens, {progress.shards} shards"
            f"{speed}{left}"
        )
        if self.bar is not None:
            self.bar.n = min(100 * progress.fraction, 100)
            self.bar.set_description_str(line)
        else:
            self._print(f"{progress.fraction:4.0%}  {line}")


def closing(summary: "Summary", part: tuple[int, int] | None = None) -> str:
    totals = summary.totals
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(totals.skipped.items())) or "none"
    done = "already prepared" if summary.already else "prepared"
    density = f" ({totals.bytes / max(totals.tokens, 1):.2f} bytes of text per token)" if totals.bytes else ""
    what, then = (
        f"{summary.shards} shards (the first is for validation)",
        fitting(totals.tokens, str(summary.folder)),
    )
    if part:
        what, then = (
            f"part {part[0]}/{part[1]}",
            "once all parts are prepared: the same command with --merge for --part",
        )
    return f"""\
{done}: {summary.folder}, {what}
documents  {totals.documents:,}
tokens     {totals.tokens:,}{density}
skipped    {skipped}
next       {then}"""


if __name__ == "__main__":
    console.run(main)
