"""hellaswag.py: a model -> its HellaSwag score by both protocols, beside chance and what is published."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable

import torch

from aymen_gpt.commands import console
from aymen_gpt.commands.report import refresh
from aymen_gpt.errors import UsageError, printable
from aymen_gpt.evaluation import hellaswag
from aymen_gpt.evaluation.hellaswag_data import Example, evenly_spaced, load_examples
from aymen_gpt.evaluation.load_model import Loaded, load_model, weights_sha256
from aymen_gpt.files import check_writable, replace_text
from aymen_gpt.model.cpu import keep_freed_memory
from aymen_gpt.reporting.published_scores import ANCHORS, CHANCE, Anchor, neighbours
from aymen_gpt.training.device import choose_device
from aymen_gpt.training.distributed import Ranks, process_group, ranks_from_environment
from aymen_gpt.wording import percent


def main(options: argparse.Namespace) -> None:
    """Score the model, alone or with the other processes of torchrun; the first one reports."""
    if options.json and os.path.isdir(options.json):
        raise UsageError(f"--json {options.json}: this is a folder; name a file in it")
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
        scored = load_model(options.model, device.place, first=ranks.first if ranks.world_size > 1 else None)
        if ranks.is_first:
            where = f"{ranks.world_size} x {device.name}" if ranks.world_size > 1 else device.name
            dtype = str(device.dtype).removeprefix("torch.")
            print(printable(f"{scored.description}, {dtype} on {where}"), file=sys.stderr)
        mine = score(scored, examples[ranks.rank :: ranks.world_size], options, device.dtype, ranks)
        result = hellaswag.merge(ranks.gather(mine))
        ranks.first(lambda: report(result, scored, len(found), options))


def score(
    scored: Loaded,
    examples: list[Example],
    options: argparse.Namespace,
    dtype: torch.dtype,
    ranks: Ranks,
) -> hellaswag.Result:
    """This rank's answers; the first rank shows its progress on stderr, as that of all."""
    began = time.monotonic()

    def move(done: int, total: int) -> None:
        done, total = done * ranks.world_size, total * ranks.world_size
        line = f"{done:,} of {total:,} scored, {done / (time.monotonic() - began):.1f} a second"
        shown.move(done / total, line, last=done == total)

    with console.Progress() as shown:
        return hellaswag.evaluate(
            scored.model,
            examples,
            protocols=hellaswag.PROTOCOLS if options.protocol == "both" else (options.protocol,),
            dtype=dtype,
            batch_tokens=options.batch_tokens,
            progress=move if ranks.is_first else None,
        )


def report(result: hellaswag.Result, scored: Loaded, available: int, options: argparse.Namespace) -> None:
    """Print the scores and write them where --json says; a run's own hellaswag.json goes into its page."""
    n, source = len(result.examples), f"examples of {options.data}" if options.data else "validation examples"
    console.show(f"HellaSwag of {scored.description}")
    console.show(
        f"all {n:,} {source}" if n == available else f"a subset: {n:,} of {available:,} {source}, evenly spaced"
    )
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


def table(result: hellaswag.Result, *, published: bool) -> str:
    """One line per protocol, one for chance, and the published scores, each under its own protocol's name."""
    lines, n = [row("protocol", "acc", "acc_norm", f"{'n':>6}")], len(result.examples)
    for protocol in result.answers:
        s = result.scores(protocol)
        acc, norm = percent(s["acc"], s["acc_stderr"]), percent(s["acc_norm"], s["acc_norm_stderr"])
        lines.append(row(protocol, acc, norm, f"{n:>6,}"))
    lines.append(row("chance", percent(CHANCE), percent(CHANCE)).rstrip())
    if published:
        lines += ["", "published, on all 10,042:"]
        for protocol in result.answers:
            lines += anchor_rows(anchor for anchor in ANCHORS if anchor.protocol == protocol)
        best = max(result.scores(protocol)["acc_norm"] for protocol in result.answers)
        lines += anchor_rows(neighbours("gpt3-paper", "acc_norm", best))
        lines.append("Numbers of different protocols do not compare; gpt3-paper is for orientation only.")
    return "\n".join(lines)


def anchor_rows(anchors: Iterable[Anchor]) -> list[str]:
    """One line per model."""
    models: dict[tuple[str, ...], dict[str, float]] = {}
    for a in anchors:
        models.setdefault((a.protocol, a.model, a.source), {})[a.metric] = a.value
    return [
        row(protocol, percent(of.get("acc")), percent(of.get("acc_norm")), f"{model:<13} {source}")
        for (protocol, model, source), of in models.items()
    ]


def row(protocol: str, acc: str, acc_norm: str, more: str = "") -> str:
    return f"{protocol:<12}{acc:<16}{acc_norm:<16}{more}"
