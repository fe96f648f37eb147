"""hellaswag.py: a model -> its HellaSwag score by both protocols, beside chance and what is published."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from aymen_gpt.commands import console
from aymen_gpt.errors import UsageError
from aymen_gpt.reporting.anchors import ANCHORS, CHANCE, Anchor, neighbours

if TYPE_CHECKING:
    from aymen_gpt.evaluation.hellaswag import Result

EXAMPLES = """\
  python hellaswag.py -m runs/gpt2                       a run of pretrain.py: its newest checkpoint
  python hellaswag.py -m gpt2 -d cuda                    OpenAI's GPT-2 124M, from the Hub
  python hellaswag.py -m runs/demo --limit 1000 --json score.json
"""


def parser() -> argparse.ArgumentParser:
    p = console.parser("Score a model on HellaSwag: four endings, which is likeliest? Chance is 25%.", EXAMPLES)
    p.add_argument(
        "-m",
        "--model",
        default="gpt2",
        metavar="NAME",
        help="a run or checkpoint folder, gpt2, gpt2-medium, gpt2-large, gpt2-xl or another Hub id [gpt2]",
    )
    p.add_argument("-d", "--device", default="auto", help="auto, cpu, mps, cuda or cuda:N [auto]")
    p.add_argument("--dtype", default="auto", help="auto (bfloat16 where it is fast), float32 or bfloat16 [auto]")
    p.add_argument(
        "--protocol",
        choices=("completion", "harness", "both"),
        default="both",
        help="completion: the text as it is, as llm.c scores; harness: as lm-evaluation-harness [both]",
    )
    p.add_argument(
        "--limit",
        type=console.whole_number,
        metavar="N",
        help="score N examples, evenly spaced over the set [all 10,042]",
    )
    p.add_argument(
        "--data", type=Path, metavar="FILE", help="examples of your own, .jsonl or .parquet [validation set]"
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write scores and every answer there")
    p.add_argument(
        "--batch-tokens", type=console.whole_number, metavar="N", help="tokens of a batch, fewer take less memory"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    check(options)

    import torch

    from aymen_gpt.evaluation import hellaswag
    from aymen_gpt.evaluation.loading import load_model
    from aymen_gpt.files import write_whole
    from aymen_gpt.training.device import choose_device

    device = choose_device(options.device, options.dtype)
    if device.dtype == torch.float32:
        torch.set_float32_matmul_precision("highest")  # no TF32 for who asks for float32
    found = hellaswag.load_examples(options.data)
    examples = hellaswag.evenly_spaced(found, options.limit)
    model, description = load_model(options.model, device.place)
    print(f"{description}, {str(device.dtype).removeprefix('torch.')} on {device.name}", file=sys.stderr)
    with progress_line() as progress:
        result = hellaswag.evaluate(
            model,
            examples,
            protocols=hellaswag.PROTOCOLS if options.protocol == "both" else (options.protocol,),
            dtype=device.dtype,
            batch_tokens=options.batch_tokens,
            progress=progress,
        )
    print(f"HellaSwag of {description}")
    print(coverage(len(examples), len(found), options.data))
    print(table(result, published=options.data is None))
    if options.json:
        write_whole(options.json, (json.dumps(result.as_dict(options.model), allow_nan=False) + "\n").encode())
        print(f"every answer: {options.json}")
    return 0


def check(options: argparse.Namespace) -> None:
    """What can be refused before anything is loaded."""
    for flag in ("limit", "batch_tokens"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            raise UsageError(f"--{flag.replace('_', '-')} {value}: expected at least 1")
    if options.json and options.json.is_dir():
        raise UsageError(f"--json {options.json}: this is a folder; name a file in it")


@contextmanager
def progress_line() -> Iterator[Callable[[int, int], None]]:
    """A function of (examples done, examples in all) that shows them on stderr: a bar on a terminal, else a line
    every ten seconds."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        with tqdm(unit="example", dynamic_ncols=True, leave=False) as bar:

            def move(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield move
        return
    began = said = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= 10 or done == total:
            said = now
            rate = done / (now - began)
            print(f"{done:,} of {total:,} scored, {rate:.1f} a second", file=sys.stderr, flush=True)

    yield say


def coverage(n: int, available: int, data: Path | None) -> str:
    source = f"examples of {data}" if data else "validation examples"
    if n == available:
        return f"all {n:,} {source}"
    return f"a subset: {n:,} of {available:,} {source}, evenly spaced"


def table(result: "Result", *, published: bool) -> str:
    """One line per protocol, one for chance, and the published scores, each under its own protocol's name."""
    lines = [f"{'protocol':<12}{'acc':<16}{'acc_norm':<16}{'n':>6}"]
    for protocol in result.answers:
        s = result.tally(protocol).as_dict()
        acc, norm = share(s["acc"], s["acc_stderr"]), share(s["acc_norm"], s["acc_norm_stderr"])
        lines.append(f"{protocol:<12}{acc:<16}{norm:<16}{len(result.examples):>6,}")
    lines.append(f"{'chance':<12}{share(CHANCE):<16}{share(CHANCE)}")
    if published:
        lines += ["", "published, on all 10,042:"]
        for protocol in result.answers:
            lines += anchor_lines([anchor for anchor in ANCHORS if anchor.protocol == protocol])
        best = max(result.tally(protocol).correct_norm for protocol in result.answers) / len(result.examples)
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
        acc, norm = (share(by_metric[m].value) if m in by_metric else "-" for m in ("acc", "acc_norm"))
        lines.append(f"{one.protocol:<12}{acc:<16}{norm:<16}{model:<13} {one.source}")
    return lines


def share(p: float | None, error: float | None = None) -> str:
    """0.2955, 0.0046 -> '29.55% ± 0.46'."""
    text = f"{100 * (p or 0.0):5.2f}%"
    return text if error is None else f"{text} ± {100 * error:.2f}"
