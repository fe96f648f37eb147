"""hellaswag.py: a model -> its HellaSwag score by both protocols, beside chance and what is published."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from aymen_gpt.commands import console
from aymen_gpt.errors import UsageError, printable
from aymen_gpt.files import check_writable, replace_text
from aymen_gpt.reporting.published_scores import ANCHORS, CHANCE, Anchor, neighbours
from aymen_gpt.training.config import COUNT
from aymen_gpt.wording import percent

if TYPE_CHECKING:
    from aymen_gpt.evaluation.compare import Report
    from aymen_gpt.evaluation.hellaswag import Result
    from aymen_gpt.evaluation.load_model import Loaded
    from aymen_gpt.training.device import Device
    from aymen_gpt.training.distributed import Ranks

EXAMPLES = """\
  python hellaswag.py -m runs/gpt2                       a run of pretrain.py: its newest checkpoint
  python hellaswag.py -m gpt2 -d cuda                    OpenAI's GPT-2 124M, from the Hub
  python hellaswag.py -m runs/demo --limit 1000 --json score.json
  torchrun --nproc_per_node=8 hellaswag.py -m runs/gpt2  the same number, on 8 GPUs
  python hellaswag.py --compare a.json b.json            is b better than a, or lucky?
"""


def parser() -> argparse.ArgumentParser:
    p = console.parser(
        "Score a model on HellaSwag: four endings, which is likeliest? Chance is 25%.",
        EXAMPLES,
        "python hellaswag.py [-m NAME] [--limit N] [--json FILE] ...",
    )
    p.add_argument(
        "-m",
        "--model",
        type=console.name,
        default="gpt2",
        metavar="NAME",
        help="a run or checkpoint folder, gpt2, gpt2-medium, gpt2-large, gpt2-xl or another Hub id [gpt2]",
    )
    p.add_argument("-d", "--device", default="auto", help="auto, cpu, mps, cuda or cuda:N [auto]")
    p.add_argument(
        "--dtype", default="auto", help="auto (bfloat16 where it is fast), float32, bfloat16, float16 [auto]"
    )
    p.add_argument(
        "--protocol",
        type=console.choice(("completion", "harness", "both")),
        metavar="WORD",
        default="both",
        help="completion: the text as it is, as llm.c scores; harness: as lm-evaluation-harness [both]",
    )
    p.add_argument(
        "--limit",
        type=console.number(COUNT, whole=True, unset="all"),
        metavar="N",
        help="score N examples, evenly spaced over the set; 0: all 10,042 [all]",
    )
    p.add_argument(
        "--data",
        type=console.path,
        metavar="FILE",
        help="examples of your own, .jsonl or .parquet [validation set]",
    )
    p.add_argument("--json", type=console.path, metavar="FILE", help="write scores and every answer there")
    p.add_argument(
        "--compare",
        nargs=2,
        type=console.path,
        metavar=("A", "B"),
        help="score nothing; say whether two files of --json differ by more than luck",
    )
    p.add_argument(
        "--batch-tokens",
        type=console.number(COUNT, whole=True),
        metavar="N",
        help="tokens of a batch, fewer take less memory",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    check(options)
    if options.compare:
        from aymen_gpt.evaluation.compare import compare_files

        console.show(comparison_table(compare_files(*options.compare)))
    else:
        score(options)
    return 0


def score(options: argparse.Namespace) -> None:
    """Score the model, alone or with the other processes of torchrun; the first one reports."""
    import torch

    from aymen_gpt.evaluation import hellaswag
    from aymen_gpt.evaluation.hellaswag_data import evenly_spaced, load_examples
    from aymen_gpt.evaluation.load_model import load_model
    from aymen_gpt.model.cpu import keep_freed_memory
    from aymen_gpt.training.device import choose_device
    from aymen_gpt.training.distributed import process_group, ranks_from_environment

    ranks = ranks_from_environment()
    device = choose_device(options.device, options.dtype, ranks.local_rank)
    if device.place.type == "cpu":
        keep_freed_memory()
    if device.dtype == torch.float32:
        torch.set_float32_matmul_precision("highest")  # no TF32 for who asks for float32
    with process_group(ranks, device.place):
        if options.json:
            ranks.first(lambda: check_writable(options.json))
        found = ranks.first(lambda: load_examples(options.data))  # one download, not one a rank
        examples = evenly_spaced(found, options.limit)
        first = ranks.first if ranks.world_size > 1 else None
        scored = load_model(options.model, device.place, first=first)
        if ranks.is_first:
            print(printable(introduction(scored.description, device, ranks)), file=sys.stderr)
        with progress_line(ranks) as progress:
            mine = hellaswag.evaluate(
                scored.model,
                examples[ranks.rank :: ranks.world_size],
                protocols=hellaswag.PROTOCOLS if options.protocol == "both" else (options.protocol,),
                dtype=device.dtype,
                batch_tokens=options.batch_tokens,
                progress=progress,
            )
        result = hellaswag.merge(ranks.gather(mine))
        ranks.first(lambda: report(result, scored, len(found), options))


def introduction(description: str, device: "Device", ranks: "Ranks") -> str:
    processes = f"{ranks.world_size} x " if ranks.world_size > 1 else ""
    return f"{description}, {str(device.dtype).removeprefix('torch.')} on {processes}{device.name}"


def report(result: "Result", scored: "Loaded", available: int, options: argparse.Namespace) -> None:
    from aymen_gpt.commands.report import refresh
    from aymen_gpt.evaluation.load_model import weights_sha256

    console.show(f"HellaSwag of {scored.description}")
    console.show(coverage(len(result.examples), available, options.data))
    print(table(result, published=options.data is None))
    if options.json:
        record = {
            "model": options.model,
            "step": scored.step,
            "checkpoint": str(scored.path),
            "weights_sha256": weights_sha256(scored.model),
            "data": options.data and str(options.data),
        } | result.as_dict()
        replace_text(options.json, f"{json.dumps(record, allow_nan=False)}\n", follow=True)
        console.show(f"every answer: {options.json}")
        run = scored.path.absolute().parent.parent
        if options.json.absolute() == run / "hellaswag.json" and scored.step is not None and not options.data:
            refresh(run)


def check(options: argparse.Namespace) -> None:
    """What can be refused before anything is loaded."""
    if options.compare and (options.json or options.data):
        raise UsageError("--compare reads what --json wrote and scores nothing: give it no other option")
    if options.json and os.path.isdir(options.json):
        raise UsageError(f"--json {options.json}: this is a folder; name a file in it")


@contextmanager
def progress_line(ranks: "Ranks") -> Iterator[Callable[[int, int], None]]:
    """A function to call with this rank's (examples done, examples in all) before the first batch and after each.

    The first rank's shows them for all ranks on stderr: a bar on a terminal, else a line every ten seconds.
    """
    from tqdm import tqdm

    if not ranks.is_first:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        with tqdm(unit="example", dynamic_ncols=True, leave=False) as bar:

            def move(done: int, total: int) -> None:
                if bar.total is None:
                    bar.reset(total * ranks.world_size)
                bar.update(done * ranks.world_size - bar.n)

            yield move
    else:
        yield spoken_progress(ranks.world_size)


def spoken_progress(world_size: int) -> Callable[[int, int], None]:
    began = said = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= 10 or done == total:
            said = now
            line = f"{done * world_size:,} of {total * world_size:,} scored"
            print(f"{line}, {done * world_size / (now - began):.1f} a second", file=sys.stderr, flush=True)

    return say


def coverage(n: int, available: int, data: Path | None) -> str:
    source = f"examples of {data}" if data else "validation examples"
    if n == available:
        return f"all {n:,} {source}"
    return f"a subset: {n:,} of {available:,} {source}, evenly spaced"


def table(result: "Result", *, published: bool) -> str:
    """One line per protocol, one for chance, and the published scores, each under its own protocol's name."""
    lines = [f"{'protocol':<12}{'acc':<16}{'acc_norm':<16}{'n':>6}"]
    for protocol in result.answers:
        s = result.scores(protocol)
        acc, norm = percent(s["acc"], s["acc_stderr"]), percent(s["acc_norm"], s["acc_norm_stderr"])
        lines.append(f"{protocol:<12}{acc:<16}{norm:<16}{len(result.examples):>6,}")
    lines.append(f"{'chance':<12}{percent(CHANCE):<16}{percent(CHANCE)}")
    if published:
        lines += ["", "published, on all 10,042:"]
        for protocol in result.answers:
            lines += anchor_lines([anchor for anchor in ANCHORS if anchor.protocol == protocol])
        best = max(result.scores(protocol)["acc_norm"] for protocol in result.answers)
        lines += anchor_lines(neighbours("gpt3-paper", "acc_norm", best))
        lines.append("Numbers of different protocols do not compare; gpt3-paper is for orientation only.")
    return "\n".join(lines)


def anchor_lines(anchors: list[Anchor]) -> list[str]:
    """One line per model, acc and acc_norm in the columns of the table."""
    models: dict[str, dict[str, Anchor]] = {}
    for anchor in anchors:
        models.setdefault(anchor.model, {})[anchor.metric] = anchor
    lines = []
    for model, by_metric in models.items():
        one = next(iter(by_metric.values()))
        acc, norm = (percent(by_metric[m].value if m in by_metric else None) for m in ("acc", "acc_norm"))
        lines.append(f"{one.protocol:<12}{acc:<16}{norm:<16}{model:<13} {one.source}")
    return lines


def comparison_table(report: "Report") -> str:
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


if __name__ == "__main__":
    console.run(main)
