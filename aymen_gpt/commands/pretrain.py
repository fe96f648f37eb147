"""pretrain.py: options -> a run folder with checkpoints, curves and samples."""

import argparse
import os
import platform
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import MISSING, Field, asdict, fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import aymen_gpt
from aymen_gpt.commands import console
from aymen_gpt.errors import AymenError, DataError, UsageError, redact
from aymen_gpt.training.config import (
    COUNT,
    RECIPES,
    Range,
    TrainConfig,
    doubts,
    flag,
    kind,
    read_options,
    resolve,
)

if TYPE_CHECKING:
    from aymen_gpt.data.loader import TokenRows
    from aymen_gpt.model.gpt import GPT
    from aymen_gpt.training.device import Device
    from aymen_gpt.training.distributed import Ranks
    from aymen_gpt.training.trainer import Trainer

EXAMPLES = """\
  python pretrain.py                                     the published run: GPT-2 124M, 40B tokens
  torchrun --standalone --nproc_per_node=8 pretrain.py   the same run on 8 GPUs, the same result
  python pretrain.py --preset demo                       a small GPT, minutes on a laptop
  python pretrain.py --preset gpt3-medium --run-dir runs/m                      another size, another folder
  python pretrain.py --plan --gpus 8                     what the published run takes, on 8 of these devices
  python pretrain.py --init-from gpt2 --data data/mine --run-dir runs/tuned --steps 200 --learning-rate 3e-5
  python pretrain.py --n-layer 6 --n-embd 384 --n-head 6 --run-dir runs/small   a shape of your own
  python pretrain.py --config runs/demo/config.json --run-dir runs/again        a run once more, from its record
"""
PLANNING = ("plan", "probe", "on", "gpus", "mfu", "dollars_per_gpu_hour")


def parser() -> argparse.ArgumentParser:
    p = console.parser(
        "Pretrain a GPT-2/GPT-3 on token shards. Running the same command again continues the run. "
        "Defaults are those of the gpt2 preset; each preset brings its own.",
        EXAMPLES,
        "python pretrain.py [--preset NAME] [--data DIR] [--run-dir DIR] ...",
    )
    p.add_argument(
        "--config",
        type=console.path,
        metavar="FILE",
        help="options by their names from a TOML file, or a run's config.json; flags given here win",
    )
    groups: dict[str, Any] = {}
    for f in fields(TrainConfig):
        name = f.metadata["group"]
        groups[name] = groups.get(name) or p.add_argument_group(name)
        groups[name].add_argument(flag(f.name), dest=f.name, default=argparse.SUPPRESS, **argument(f))
    p.add_argument(
        "--resume",
        default="auto",
        metavar="MODE",
        help="auto: continue the run if it has a checkpoint; must: only continue; none: start anew, what is "
        "there is set aside [auto]",
    )
    p.add_argument(
        "--override-resume",
        default=[],
        nargs="+",
        metavar="KEY",
        help="continue although these differ from the run's: seed, data, tokens_per_step",
    )
    add_planning(p)
    p.add_argument(
        "--show-batch",
        type=console.number(COUNT, whole=True),
        metavar="N",
        help="do not train: list the documents that step N reads, with their ids and urls",
    )
    return p


def add_planning(p: argparse.ArgumentParser) -> None:
    plan = p.add_argument_group("planning", "do not train: print what the run would take")
    plan.add_argument("--plan", action="store_true", help="parameters, FLOPs, memory by part, steps, disk")
    plan.add_argument("--probe", action="store_true", help="with --plan: measure 20 updates, for hours and cost")
    plan.add_argument(
        "--on",
        type=str.lower,
        metavar="GPU",
        help="plan for another device than this machine's: h100, h200, a100, ...",
    )
    plan.add_argument(
        "--gpus", type=console.number(Range(1, 10**6), whole=True), metavar="N", help="plan for N devices"
    )
    plan.add_argument(
        "--mfu",
        type=console.number(Range(0, 1, without=(0,))),
        metavar="X",
        help="assume this share of the device's peak instead of measuring",
    )
    plan.add_argument(
        "--dollars-per-gpu-hour",
        type=console.number(Range(0, 10**6)),
        metavar="X",
        help="price of one device, for the cost",
    )


def argument(f: Field[Any]) -> dict[str, Any]:
    """What argparse needs for one field of TrainConfig; its range is checked with all others, by TrainConfig."""
    help, unset, wanted = f.metadata["help"], f.metadata["unset"], kind(f)
    if f.name == "preset":
        return {"metavar": "NAME", "help": f"{help} [gpt2]: {', '.join(RECIPES)}"}
    if f.name == "compile":
        return {"action": argparse.BooleanOptionalAction, "help": help}
    if wanted is bool:
        return {"action": "store_true", "help": help}
    if f.default not in (MISSING, "runs/gpt2"):
        help += f" [{f.default}]" if f.default is not None else f" [{unset}]" if unset else ""
    if wanted is str:
        return {"metavar": "NAME", "help": help}
    read = console.number(f.metadata["range"], whole=wanted is int, unset=unset)
    return {"type": read, "metavar": "N" if wanted is int else "X", "help": help}


def main(argv: list[str] | None = None) -> int:
    given = vars(parser().parse_args(argv))
    step = given.pop("show_batch")
    planned = {key: given.pop(key) for key in PLANNING}
    mode, override, file = given.pop("resume"), given.pop("override_resume"), given.pop("config")
    config = resolve((read_options(file) if file else {}) | given)
    if step is not None:
        return show_batch(config, step)
    if planned.pop("plan") or planned["probe"]:
        from aymen_gpt.commands.plan import show_plan

        return show_plan(config, **planned)
    for key, value in planned.items():
        if value:
            raise UsageError(f"{flag(key)} {value} is for planning, and this would train: add --plan")

    from aymen_gpt.model import cpu
    from aymen_gpt.training import device as devices
    from aymen_gpt.training.distributed import process_group, ranks_from_environment
    from aymen_gpt.training.resume import Resume
    from aymen_gpt.training.runlog import RunLog
    from aymen_gpt.training.signals import StopSignal
    from aymen_gpt.training.trackers import tracker

    how = Resume(mode, tuple(override))
    stop = StopSignal()
    ranks = ranks_from_environment()
    device = devices.choose_device(config.device, config.dtype, ranks.local_rank)
    require_memory(config, devices.memory_there(device))
    if device.place.type == "cpu":
        cpu.keep_freed_memory()
    if config.deterministic:
        devices.be_deterministic()
    data = open_data(config, ranks) if ranks.world_size > 1 else None  # takes minutes, so not while ranks wait
    folder = Path(config.run)
    track = tracker(config.track, folder, redact(asdict(config)))
    with (
        process_group(ranks, device.place, config.timeout),
        RunLog(folder, config.steps, draw_report, track) if ranks.is_first else nullcontext() as log,
    ):
        trainer = build(config, device, ranks, data)
        if log:
            told = [introduction(trainer), *doubts(config, trainer.train_rows.n_tokens)]
            log.say(console.as_typed("\n".join(told)))
        trainer.fit(folder, log, stop, lambda: describe(trainer), how)
    if ranks.is_first:
        console.show(console.as_typed(closing(folder)))
    return 0


def require_memory(config: TrainConfig, there: float | None) -> None:
    """AymenError when not even the weights, gradients and moments fit into so many GB."""
    needed = 16 * config.model.n_params / 1e9
    if there and needed > there:
        raise AymenError(
            f"{config.preset} does not fit: weights, gradients and moments take {needed:,.0f} GB and there are "
            f"{there:,.0f}: choose a smaller --preset"
        )


def show_batch(config: TrainConfig, step: int) -> int:
    """Print what step ``step`` of metrics.jsonl reads, a line for each piece of a document."""
    from aymen_gpt.data.loader import TokenRows

    rows = TokenRows(Path(config.data), "train", block_size=config.block_size, seed=config.seed)
    print("row\tshard\tdocument\tfirst_token\ttokens\tid\turl")
    for read in rows.documents((step - 1) * config.rows_per_step, config.rows_per_step):
        print(*map(cell, vars(read).values()), sep="\t")
    return 0


def cell(value: str | int | None) -> str:
    """A value for a table with tabs between its columns, with control characters escaped."""
    return "" if value is None else "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


Data: TypeAlias = (
    "tuple[TokenRows, TokenRows, str]"  # training rows, validation rows, the identity of their tokens
)


def open_data(config: TrainConfig, ranks: "Ranks") -> "Data":
    """The rows of tokens, each shard checked by this rank; only the first one warns about them."""
    from aymen_gpt.data.loader import TokenRows
    from aymen_gpt.data.shards import check_shards

    folder = Path(config.data)
    train = TokenRows(folder, "train", block_size=config.block_size, seed=config.seed)
    val = TokenRows(folder, "val", block_size=config.block_size, seed=None)
    with nullcontext() if ranks.is_first else warnings.catch_warnings(action="ignore"):
        return train, val, check_shards(folder)


def build(config: TrainConfig, device: "Device", ranks: "Ranks", data: "Data | None" = None) -> "Trainer":
    """The trainer of a run, and everything it reads; DataError where ranks see different shards."""
    from aymen_gpt.training.trainer import Trainer

    train, val, identity = data or open_data(config, ranks)
    if len(set(ranks.gather(identity))) > 1:
        raise DataError(f"{config.data} differs between machines: copy the folder of one of them to the others")
    return Trainer(
        config,
        device,
        ranks,
        train,
        val,
        identity,
        score=scorer(config, device, ranks),
        initial=initial_model(config, ranks) if config.init_from else None,
        settings=machine(device),
    )


def machine(device: "Device") -> dict[str, Any]:
    """What decides the last bits of a result, besides the options."""
    import torch

    dtype = str(device.dtype).removeprefix("torch.")
    return {"device": device.name, "dtype": dtype, "threads": torch.get_num_threads(), "torch": torch.__version__}


def initial_model(config: TrainConfig, ranks: "Ranks") -> "Callable[[], GPT]":
    """What the trainer calls for the weights of step 0, with --init-from."""
    import torch

    from aymen_gpt.evaluation.load_model import load_model

    first = ranks.first if ranks.world_size > 1 else None
    name, shape = config.init_from or "", config.model
    return lambda: load_model(name, torch.device("cpu"), shape=shape, first=first).model


def draw_report(folder: Path) -> None:
    """Draw report.html and the model cards anew; a picture that fails must not end the training it shows."""
    from aymen_gpt.commands.report import refresh

    try:
        refresh(folder)
    except Exception as error:
        print(f"warning: no report.html: {type(error).__name__}: {error}", file=sys.stderr)


def scorer(config: TrainConfig, device: "Device", ranks: "Ranks") -> "Callable[[GPT], dict[str, Any]] | None":
    """What the trainer calls to score its model on HellaSwag, None when the run never does."""
    if not config.hellaswag_every:
        return None
    from aymen_gpt.evaluation import hellaswag
    from aymen_gpt.evaluation.hellaswag_data import evenly_spaced, load_examples

    found = ranks.first(load_examples)  # one download, not one a rank
    examples = evenly_spaced(found, config.hellaswag_limit)
    mine = examples[ranks.rank :: ranks.world_size]

    def score(model: "GPT") -> dict[str, Any]:
        found = hellaswag.evaluate(model, mine, protocols=("completion",), dtype=device.dtype)
        result = hellaswag.merge(ranks.gather(found))
        return {"n": len(result.examples), "completion": result.scores("completion")}

    return score


def introduction(trainer: "Trainer") -> str:
    """What is about to be trained, on what, in a few lines."""
    c, m, device, ranks = trainer.config, trainer.config.model, trainer.device, trainer.ranks
    tokens = c.steps * c.tokens_per_step
    epochs = c.steps * c.rows_per_step / trainer.train_rows.rows_per_epoch
    lines = [
        f"model    {c.preset}: {m.n_params:,} parameters, {m.n_layer} layers, {m.n_head} heads, {m.n_embd} wide, "
        f"context {m.block_size}",
        f"data     {c.data}: {trainer.train_rows.n_tokens:,} train and {trainer.val_rows.n_tokens:,} val tokens",
        f"recipe   {c.steps:,} steps x {c.tokens_per_step:,} tokens = {tokens:,} tokens = {epochs:.2f} epochs, "
        f"peak rate {c.learning_rate:g}, {c.warmup_steps} warmup steps",
        f"machine  {ranks.world_size} x {device.name}, {str(device.dtype).removeprefix('torch.')}, "
        f"micro-batch "
        f"{c.micro_batch or f'up to {trainer.micro_batch}'}{', compiled' if trainer.compiled else ''}",
        f"run      {c.run}",
    ]
    return "\n".join(lines)


def describe(trainer: "Trainer") -> dict[str, Any]:
    """config.json of the run folder: everything resolved, and where it ran."""
    import torch

    from aymen_gpt.data.shards import read_manifest
    from aymen_gpt.training.device import memory_gb

    c, device = trainer.config, trainer.device
    return {
        "format": 1,
        "run": asdict(c)
        | {
            "device": device.place.type if c.device == "auto" else c.device,
            "dtype": str(device.dtype).removeprefix("torch."),
            "micro_batch": trainer.micro_batch,
            "compile": trainer.compiled,
        },
        "command": console.command_line(),
        "model": asdict(c.model),
        "n_params": c.model.n_params,
        "flops_per_token": c.model.flops_per_token,
        "data": {
            "folder": c.data,
            "manifest_sha256": trainer.data_sha256,
            "source": (read_manifest(Path(c.data)) or {}).get("source"),
            "train_tokens": trainer.train_rows.n_tokens,
            "val_tokens": trainer.val_rows.n_tokens,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "aymen_gpt": aymen_gpt.__version__,
        },
        "git_commit": git_commit(),
        "host": {
            "name": platform.node(),
            "cores": os.cpu_count(),
            "memory_gb": memory_gb(),
            "threads": torch.get_num_threads(),
        },
        "device": {"name": device.name, "peak_tflops": device.peak_flops and device.peak_flops / 1e12},
        "world_size": trainer.ranks.world_size,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def git_commit() -> str | None:
    """Commit of the code that runs, None outside a git checkout."""
    here = Path(aymen_gpt.__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def closing(folder: Path) -> str:
    from aymen_gpt.model.folders import latest_valid, problem

    run = shlex.quote(str(folder))
    newest, _ = latest_valid(folder, partial(problem, remember=True))
    return (
        f"checkpoint  {newest}\n"
        f"curve       {folder}/report.html (numbers: metrics.jsonl)\n"
        f"samples     {folder}/samples.jsonl\n"
        f'next        python hellaswag.py -m {run}   or   python generate.py -m {run} "Once upon a time"'
    )


if __name__ == "__main__":
    console.run(main)
