"""pretrain.py --plan: what a run will take, before anything is allocated; with --probe, 20 updates measured."""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from aymen_gpt.commands import console
from aymen_gpt.data.loader import TokenRows
from aymen_gpt.errors import AymenError, DataError, UsageError
from aymen_gpt.model import cpu
from aymen_gpt.model.loss import default_chunk
from aymen_gpt.training import muon, optim, plan
from aymen_gpt.training.config import TrainConfig, doubts
from aymen_gpt.training.device import Device, choose_device, device_elsewhere, memory_there, peak_memory
from aymen_gpt.training.distributed import Ranks, ranks_from_environment
from aymen_gpt.training.sharding import shard_size
from aymen_gpt.training.trainer import Trainer
from aymen_gpt.wording import duration

PROBE_UPDATES = 20


def show_plan(config: TrainConfig, args: argparse.Namespace) -> None:
    """Print the plan of a run on ``args.gpus`` devices (those of torchrun, or 1), of this kind or ``args.on``.

    UsageError for what cannot be planned together.
    """
    if args.probe and (other := args.on or args.mfu or args.gpu_memory):
        name = "--on" if args.on else "--mfu" if args.mfu else "--gpu-memory"
        raise UsageError(f"--probe measures this machine: leave out {name} {other}")
    ranks = ranks_from_environment()
    gpus = args.gpus or ranks.world_size
    config.require_rows(gpus)
    many = config.device != "cpu" and not args.probe and bool(args.gpu_memory or gpus > 1)
    there: float | None
    if args.on:
        device, there = device_elsewhere(args.on, config.dtype)
    elif many and not torch.cuda.is_available():
        device, there = replace(device_elsewhere("h100", config.dtype)[0], name="GPU", peak_flops=None), 80
    else:
        device = choose_device(config.device, config.dtype, ranks.local_rank)
        there = memory_there(device)
    there = args.gpu_memory or there
    if args.mfu and not device.peak_flops:
        raise UsageError(
            f"--mfu {args.mfu:g}: a share of what? The peak of {device.name} is not known; try --on h100"
        )
    if not ranks.is_first:
        return
    console.show(console.as_typed("\n".join([*model_lines(config), *data_lines(config)])))
    rows, passes = 0, 0
    if many and there:
        free = {"shard"} if config.shard == "auto" else set()
        free |= set() if config.micro_batch else {"micro_batch"}
        free |= set() if hasattr(args, "recompute") or config.recompute != "none" else {"recompute"}
        memory_of = counted_lines(config, device, gpus, there, free)
    else:
        rows, passes = micro_batch(config, device, gpus, there)
        memory_of = memory_lines(config, device, gpus, there, rows, passes)
    console.show(console.as_typed("\n".join([*memory_of, *disk_lines(config)])))
    speed = None
    if args.probe:
        speed = probe(config, device, rows, passes)
    elif args.mfu:
        speed = args.mfu * device.peak_flops / config.model.flops_per_token
        print(f"assumed   MFU {args.mfu:g}: {speed:,.0f} tokens/s a device")
    print(*time_lines(config, gpus, speed, args.dollars_per_gpu_hour), sep="\n")


def model_lines(c: TrainConfig) -> Iterator[str]:
    m, tokens = c.model, c.steps * c.tokens_per_step
    yield model_line(c)
    for part, count in plan.parameters(m).items():
        yield f"            {part:<32} {count:>15,}"
    yield f"run       {c.steps:,} steps x {c.tokens_per_step:,} tokens = {tokens:,} tokens"
    flops = f"{m.flops_per_token:,} FLOPs a token (forward and backward), {tokens * m.flops_per_token:.3g} in all"
    yield f"compute   {flops}"
    yield "            6 N + 12 L C T: parameters but positions, layers, width, context (PaLM, arXiv:2204.02311)"
    if c.optimizer == "muon":
        beside = muon.flops(m.n_layer, m.n_embd)
        more = 100 * beside / (c.tokens_per_step * m.flops_per_token)
        share = f"which up to {m.n_layer} devices share"
        yield f"muon      {beside:.3g} float32 FLOPs more an update ({more:.2g} %), {share}"


def model_line(c: TrainConfig) -> str:
    m = c.model
    shape = f"{m.n_layer} layers, {m.n_head} heads, {m.n_embd} wide, context {m.block_size}"
    return f"model     {c.preset}: {m.n_params:,} parameters, {shape}"


def data_lines(c: TrainConfig) -> list[str]:
    try:
        rows = TokenRows(Path(c.data), "train", block_size=c.block_size, seed=c.seed)
    except DataError:
        line = f"data      {c.data} is not there yet: fineweb.py makes it, 2 bytes a token on the disk"
        return [line, *doubts(c, None)]
    epochs = c.steps * c.rows_per_step / rows.rows_per_epoch
    line = f"data      {c.data}: {rows.n_tokens:,} train tokens ({gb(2 * rows.n_tokens)}), read {epochs:.2f} times"
    return [line, *doubts(c, rows.n_tokens)]


def disk_lines(c: TrainConfig) -> list[str]:
    one = plan.checkpoint_bytes(c.model, c.optimizer)
    n = c.keep_last + 1 + (c.steps // c.keep_every if c.keep_every else 0) + len(c.kept_steps)
    return [f"disk      {gb(one)} a checkpoint, {gb(n * one)} for the {n} that are kept or being written"]


def memory(c: TrainConfig, device: Device, rows: int) -> dict[str, int]:
    """Memory of a micro-batch of so many rows."""
    chunk = default_chunk(device.place.type)
    return plan.step_memory(c.model, rows, size=device.dtype.itemsize, chunk=chunk, optimizer=c.optimizer)


def micro_batch(c: TrainConfig, device: Device, gpus: int, there: float | None) -> tuple[int, int]:
    """Rows of one forward pass (as asked for, or what fits into ``there`` GB), passes of the first device."""
    rows, _ = plan.dealt(c.rows_per_step, gpus, c.largest_micro_batch(on_cuda=device.place.type == "cuda"))
    while not c.micro_batch and rows > 1 and there and sum(memory(c, device, rows).values()) > there * 1e9:
        rows = (rows + 1) // 2
    return plan.dealt(c.rows_per_step, gpus, rows)


def memory_lines(
    c: TrainConfig, device: Device, gpus: int, there: float | None, rows: int, passes: int
) -> Iterator[str]:
    parts = memory(c, device, rows)
    yield f"memory    {gpus} x {device.name}, {pass_of(rows, device)}, of each:"
    yield from part_lines(parts)
    into = f" into {there:,.0f} GB" if there else ""
    if there and sum(parts.values()) > there * 1e9:
        advice = "a smaller --preset, --block-size or --micro-batch, or another device (--on h200)"
        yield f"            does not fit{into}: {advice}"
    else:
        yield f"            fits{into}"
    yield update_line(c, passes)


def counted_lines(c: TrainConfig, device: Device, gpus: int, there: float, free: set[str]) -> Iterator[str]:
    """The fastest setting that fits, and what a step of it takes; AymenError where none does."""
    from aymen_gpt.training import memory  # takes a second

    began = time.monotonic()
    print(f"counting  a step of 1 of {gpus} GPUs, on tensors without numbers ...", file=sys.stderr)
    found, parts, tried = memory.fit(c, gpus, device.dtype, there * 1e9, free)
    for setting in tried:
        yield f"too much  {setting}"
    if not found:
        raise AymenError(
            f"{c.preset} does not fit on {gpus} x {there:,.0f} GB, {tried[-1]}: try more --gpus, a smaller "
            "--preset or --block-size, or another device (--on h200)"
        )
    rows, passes = plan.dealt(c.rows_per_step, gpus, found.largest_micro_batch(on_cuda=True))
    yield f"fits      {memory.in_words(found)}"
    yield f"memory    {gpus} x {device.name}, {pass_of(rows, device)}, of each:"
    yield from part_lines(parts)
    yield f"            fits into {there:,.0f} GB"
    shard = shard_size(found.shard, memory.first_of(gpus))
    whole = plan.whole_memory(c.model, c.optimizer, shard)
    if shard > 1 and whole > plan.USABLE * there * 1e9:
        yield f"            HellaSwag and samples: layer by layer, as with all weights a GPU has {gb(whole)}"
    shallow = f", other settings extrapolated from {memory.FEW} and {memory.MORE}" * (c.n_layer > memory.MORE)
    yield f"            counted with all {c.n_layer} layers{shallow}, in {time.monotonic() - began:.0f} s"
    yield update_line(c, passes)


def pass_of(rows: int, device: Device) -> str:
    dtype = str(device.dtype).removeprefix("torch.")
    return f"micro-batch of {rows} row{'s' * (rows > 1)}, {dtype}"


def part_lines(parts: dict[str, int]) -> Iterator[str]:
    for part, size in (*parts.items(), ("all", sum(parts.values()))):
        if size:
            yield f"            {part:<32} {gb(size):>15}"


def update_line(c: TrainConfig, passes: int) -> str:
    made = "1 micro-batch on each device makes" if passes == 1 else f"{passes} micro-batches on each device make"
    return f"update    {made} {c.rows_per_step:,} rows"


def probe(c: TrainConfig, device: Device, rows: int, passes: int) -> float:
    """Tokens a second of one device, by updates of one micro-batch of random tokens, or two where there are more.

    An update is its micro-batches one after the other, then the optimizer. No file is read or written.
    """
    if device.place.type == "cpu":
        cpu.keep_freed_memory()
    print(f"probing   {PROBE_UPDATES} updates ...", file=sys.stderr)
    trainer = Trainer(c, device, Ranks(), None, None, "")  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(c.seed)
    seconds = []
    for _ in range(PROBE_UPDATES):
        tokens = torch.randint(c.model.vocab_size, (rows, c.block_size + 1), generator=draw)
        seconds.append(probe_update(trainer, tokens, min(passes, 2)))
    micro, update = (median(column) for column in zip(*seconds, strict=True))
    speed, peak = passes * rows * c.block_size / (passes * micro + update), device.peak_flops
    optimizer = "AdamW" if c.optimizer == "adamw" else "Muon"
    share = f", MFU {100 * speed * c.model.flops_per_token / peak:.1f} %" if peak else ""
    print(
        f"probe     {PROBE_UPDATES} updates, medians: {micro:.3g} s a micro-batch, {update:.3g} s {optimizer}: "
        f"{speed:,.0f} tokens/s a device{share}\n"
        f"            memory {gb(peak_memory(device.place))} at the most"
    )
    return speed


def probe_update(trainer: Trainer, tokens: torch.Tensor, passes: int) -> tuple[float, float]:
    """Seconds of a forward and backward pass, and of the update that follows."""
    began = now(trainer.device)
    for _ in range(passes):
        (trainer.batch_loss(tokens) / tokens[:, 1:].numel()).backward()
    middle = now(trainer.device)
    optim.clip_gradients(trainer.named.values(), trainer.config.grad_clip)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return (middle - began) / passes, now(trainer.device) - middle


def now(device: Device) -> float:
    """Seconds on a clock, when the device has done all that was asked of it."""
    if device.place.type == "cuda":
        torch.cuda.synchronize(device.place)
    return time.perf_counter()


def time_lines(c: TrainConfig, gpus: int, speed: float | None, dollars: float | None) -> Iterator[str]:
    """How long, and for how much, at a speed of each device in tokens a second."""
    if speed is None:
        both = "" if dollars is None else "; the cost follows from it"
        yield f"time      --probe measures it, --on h100 --mfu 0.4 assumes that share of a GPU's peak{both}"
        return
    seconds = c.steps * c.tokens_per_step / (speed * gpus)
    ideal = ", if they never wait for each other" if gpus > 1 else ""
    yield f"time      {duration(seconds)} on {gpus} device{'s' * (gpus > 1)}{ideal}"
    if dollars is not None:
        cost = seconds / 3600 * gpus * dollars
        shown = f"{cost:,.0f}" if cost >= 100 else f"{cost:.2f}" if cost >= 0.01 else "less than 0.01"
        yield f"cost      {shown} dollars at {dollars:g} a device and hour"


def gb(size: float) -> str:
    """
    >>> gb(34_000_000), gb(1_493_000_000), gb(5_036_700_000_000)
    ('34.0 MB', '1.49 GB', '5,037 GB')
    """
    if size < 1e8:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e9:,.0f} GB" if size >= 1e11 else f"{size / 1e9:.2f} GB"
