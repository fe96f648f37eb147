"""pretrain.py: options -> a run folder with checkpoints, curves and samples."""

import argparse
import gc
import os
import platform
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

import aymen_gpt
from aymen_gpt.commands import console
from aymen_gpt.commands.plan import model_line, show_plan
from aymen_gpt.data.loader import TokenRows
from aymen_gpt.data.shards import check_shards, read_manifest
from aymen_gpt.errors import AymenError, DataError, UsageError, redact
from aymen_gpt.evaluation import hellaswag
from aymen_gpt.evaluation.hellaswag_data import evenly_spaced, load_examples
from aymen_gpt.evaluation.load_model import load_model
from aymen_gpt.model import cpu
from aymen_gpt.model.folders import latest_valid, problem
from aymen_gpt.model.gpt import GPT
from aymen_gpt.training.config import TrainConfig, doubts, flag, read_options, resolve
from aymen_gpt.training.device import Device, be_deterministic, choose_device, memory_gb, memory_there
from aymen_gpt.training.distributed import Ranks, process_group, ranks_from_environment
from aymen_gpt.training.forecast import forecaster
from aymen_gpt.training.plan import state_memory
from aymen_gpt.training.runlog import RunLog
from aymen_gpt.training.sharding import is_dealt, shard_size
from aymen_gpt.training.signals import StopSignal
from aymen_gpt.training.trackers import tracker
from aymen_gpt.training.trainer import Trainer

Data: TypeAlias = tuple[TokenRows, TokenRows, str]  # training rows, validation rows, the identity of their tokens


def main(args: argparse.Namespace) -> None:
    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig) if hasattr(args, f.name)}
    config = resolve((read_options(args.config) if args.config else {}) | given)
    if args.show_batch is not None:
        return show_batch(config, args.show_batch)
    if args.plan or args.probe:
        return show_plan(config, args)
    for key in ("on", "gpus", "gpu_memory", "mfu", "dollars_per_gpu_hour"):
        if getattr(args, key):
            raise UsageError(f"{flag(key)} {getattr(args, key)} is for planning, and this would train: add --plan")
    stop, ranks = StopSignal(), ranks_from_environment()
    device = choose_device(config.device, config.dtype, ranks.local_rank)
    shard = shard_size(config.shard, ranks, auto=ranks.world_size)
    there, needed = memory_there(device), 1e-9 * state_memory(config.model, config.optimizer, shard)
    if there and needed > there:
        raise AymenError(
            f"{config.preset} does not fit: weights, gradients and moments take {needed:,.0f} GB and there are "
            f"{there:,.0f}: choose a smaller --preset, or more processes that --shard it"
        )
    if device.place.type == "cpu":
        cpu.keep_freed_memory()
    if config.deterministic:
        be_deterministic()
    data = open_data(config, ranks) if ranks.world_size > 1 else None  # takes minutes, so not while ranks wait
    folder = Path(config.run)
    track = tracker(config.track, folder, redact(asdict(config)))
    forecast = forecaster(config) if config.forecast else None
    with (
        process_group(ranks, device.place, config.timeout),
        RunLog(folder, config.steps, draw_report, track, forecast) if ranks.is_first else nullcontext() as log,
        ranks.meeting(),  # for what is exchanged outside of all others
    ):
        trainer = build(config, device, ranks, data)
        if log:
            told = [introduction(trainer), *doubts(config, trainer.train_rows.n_tokens)]
            log.say(console.as_typed("\n".join(told)))
        gc.collect()
        gc.freeze()  # what is there now: Python's collector of cycles stops a rank, and all others wait for it
        trainer.fit(folder, log, stop, lambda: describe(trainer), args.resume, args.override_resume)
    if ranks.is_first:
        console.show(console.as_typed(closing(folder)))


def show_batch(config: TrainConfig, step: int) -> None:
    """Print what step ``step`` of metrics.jsonl reads, a line for each piece of a document."""
    rows = TokenRows(Path(config.data), "train", block_size=config.block_size, seed=config.seed)
    print("row\tshard\tdocument\tfirst_token\ttokens\tid\turl")
    for read in rows.documents((step - 1) * config.rows_per_step, config.rows_per_step):
        print(*map(cell, vars(read).values()), sep="\t")


def cell(value: str | int | None) -> str:
    """A value for a table with tabs between its columns, with control characters escaped."""
    return "" if value is None else "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def open_data(config: TrainConfig, ranks: Ranks) -> Data:
    """The rows of tokens, each shard checked by this rank; only the first one warns about them."""
    folder = Path(config.data)
    train = TokenRows(folder, "train", block_size=config.block_size, seed=config.seed)
    val = TokenRows(folder, "val", block_size=config.block_size, seed=None)
    with nullcontext() if ranks.is_first else warnings.catch_warnings(action="ignore"):
        return train, val, check_shards(folder)


def build(config: TrainConfig, device: Device, ranks: Ranks, data: Data | None = None) -> Trainer:
    """The trainer of a run, and everything it reads; DataError where ranks see different shards."""
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
        score=scorer(config, device, ranks) if config.hellaswag_every else None,
        initial=initial_model(config, ranks) if config.init_from else None,
        settings={  # what decides the last bits of a result, besides the options
            "device": device.name,
            "dtype": name_of(device.dtype),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def initial_model(config: TrainConfig, ranks: Ranks) -> Callable[[], GPT]:
    """What the trainer calls for the weights of step 0, with --init-from."""
    first = ranks.first if ranks.world_size > 1 else None
    name, shape = config.init_from or "", config.model
    return lambda: load_model(name, torch.device("cpu"), shape=shape, first=first).model


def draw_report(folder: Path) -> None:
    """Draw report.html and the model cards anew; a picture that fails must not end the training it shows."""
    try:
        from aymen_gpt.commands.report import refresh  # here, as training needs no matplotlib

        refresh(folder)
    except Exception as error:
        print(f"warning: no report.html: {type(error).__name__}: {error}", file=sys.stderr)


def scorer(config: TrainConfig, device: Device, ranks: Ranks) -> Callable[[GPT], dict[str, Any]]:
    """What the trainer calls to score its model on HellaSwag."""
    found = ranks.first(load_examples)  # one download, not one a rank
    examples = evenly_spaced(found, config.hellaswag_limit)
    mine = examples[ranks.rank :: ranks.world_size]

    def most(number: int) -> int:
        return max(ranks.gather(number))

    def score(model: GPT) -> dict[str, Any]:
        together = most if is_dealt(model.wte.weight) else None
        answers = hellaswag.evaluate(model, mine, protocols=("completion",), dtype=device.dtype, most=together)
        result = hellaswag.merge(ranks.gather(answers))
        return {"n": len(result.examples), "completion": result.scores("completion")}

    return score


def introduction(trainer: Trainer) -> str:
    """What is about to be trained, on what, in a few lines."""
    c, device = trainer.config, trainer.device
    tokens, epochs = c.steps * c.tokens_per_step, c.steps * c.rows_per_step / trainer.train_rows.rows_per_epoch
    muon = f"Muon's {c.matrix_rate:g}, " if c.optimizer == "muon" else ""
    rows = c.micro_batch or f"up to {trainer.micro_batch}"
    return f"""\
{model_line(c)}
data      {c.data}: {trainer.train_rows.n_tokens:,} train and {trainer.val_rows.n_tokens:,} val tokens
recipe    {c.steps:,} steps x {c.tokens_per_step:,} tokens = {tokens:,} tokens = {epochs:.2f} epochs, \
peak rate {c.learning_rate:g}, {muon}{c.warmup_steps} warmup steps
machine   {trainer.ranks.world_size} x {device.name}, {name_of(device.dtype)}, micro-batch {rows}\
{", compiled" if trainer.compiled else ""}
run       {c.run}"""


def describe(trainer: Trainer) -> dict[str, Any]:
    """config.json of the run folder: everything resolved, and where it ran."""
    c, device = trainer.config, trainer.device
    return {
        "format": 1,
        "run": asdict(c)
        | {
            "device": device.place.type if c.device == "auto" else c.device,
            "dtype": name_of(device.dtype),
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
    command = ["git", "-C", str(Path(aymen_gpt.__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def closing(folder: Path) -> str:
    run = shlex.quote(str(folder))
    newest, _ = latest_valid(folder, partial(problem, remember=True))
    return f"""\
checkpoint  {newest}
curve       {folder}/report.html (numbers: metrics.jsonl)
samples     {folder}/samples.jsonl
next        python hellaswag.py -m {run}   or   python generate.py -m {run} "Once upon a time\""""
