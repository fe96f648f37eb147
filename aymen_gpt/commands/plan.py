"""pretrain.py --plan: what a run will take, before anything is allocated; with --probe, 20 updates measured."""

import statistics
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from aymen_gpt.commands import console
from aymen_gpt.errors import UsageError
from aymen_gpt.training import plan
from aymen_gpt.training.config import TrainConfig, doubts

if TYPE_CHECKING:
    import torch

    from aymen_gpt.training.device import Device
    from aymen_gpt.training.trainer import Trainer

PROBE_UPDATES = 20


@dataclass(frozen=True)
class Request:
    """A run to be planned, on ``gpus`` devices that have ``memory_gb`` each (None: not known)."""

    config: TrainConfig
    device: "Device"
    gpus: int
    memory_gb: float | None

    @cached_property
    def micro_batch(self) -> int:
        """Rows of one forward pass: what was asked for, else as many as fit."""
        largest = self.config.largest_micro_batch(on_cuda=self.device.place.type == "cuda")
        rows, _ = plan.dealt(self.config.rows_per_step, self.gpus, largest)
        while not self.config.micro_batch and rows > 1 and not self.fits(rows):
            rows = (rows + 1) // 2
        return rows

    @property
    def passes(self) -> int:
        """Forward and backward passes of the first device in one update; others may do one less."""
        return plan.dealt(self.config.rows_per_step, self.gpus, self.micro_batch)[1]

    @property
    def tokens(self) -> int:
        return self.config.steps * self.config.tokens_per_step

    def memory(self, rows: int) -> plan.Memory:
        from aymen_gpt.model.loss import default_chunk

        chunk = default_chunk(self.device.place.type)
        return plan.step_memory(self.config.model, rows, size=self.device.dtype.itemsize, chunk=chunk)

    def fits(self, rows: int) -> bool:
        return self.memory_gb is None or self.memory(rows).total <= self.memory_gb * 1e9


@dataclass(frozen=True)
class Probe:
    """What a few updates took on one device."""

    micro_seconds: float  # forward and backward of one micro-batch
    update_seconds: float  # clipping and AdamW
    memory: int  # bytes at the most, of tensors on CUDA, of the process elsewhere

    def tokens_per_second(self, request: Request) -> float:
        """Of one device: an update is its micro-batches one after the other, then AdamW."""
        rows = request.micro_batch * request.passes
        seconds = request.passes * self.micro_seconds + self.update_seconds
        return rows * request.config.block_size / seconds


def show_plan(
    config: TrainConfig,
    *,
    probe: bool,
    on: str | None,
    gpus: int | None,
    mfu: float | None,
    dollars_per_gpu_hour: float | None,
) -> int:
    """Print the plan of a run on ``gpus`` devices (default: those of torchrun, or 1), this kind or ``on`` another.

    UsageError for what cannot be planned together.
    """
    from aymen_gpt.training import device as devices
    from aymen_gpt.training.distributed import ranks_from_environment

    if probe and (on or mfu):
        raise UsageError(f"--probe measures this machine: leave out {'--on' if on else '--mfu'}")
    ranks = ranks_from_environment()
    memory: float | None
    if on:
        device, memory = devices.device_elsewhere(on, config.dtype)
    else:
        device = devices.choose_device(config.device, config.dtype, ranks.local_rank)
        memory = devices.memory_there(device)
    if mfu and not device.peak_flops:
        raise UsageError(f"--mfu {mfu:g}: a share of what? The peak of {device.name} is not known; try --on h100")
    request = Request(config, device, gpus or ranks.world_size, memory)
    config.require_rows(request.gpus)
    if not ranks.is_first:
        return 0
    lines = [*model_lines(request), *data_lines(config), *memory_lines(request), *disk_lines(config)]
    console.show(console.as_typed("\n".join(lines)))
    speed = assumed(request, mfu) if mfu else measured(request) if probe else None
    print("\n".join(time_lines(request, speed, dollars_per_gpu_hour)))
    return 0


def model_lines(request: Request) -> list[str]:
    c, m = request.config, request.config.model
    flops = request.tokens * m.flops_per_token
    return [
        f"model     {c.preset}: {m.n_params:,} parameters, {m.n_layer} layers, {m.n_head} heads, {m.n_embd} wide, "
        f"context {m.block_size}",
        *(f"            {part:<32} {count:>15,}" for part, count in plan.parameters(m).items()),
        f"run       {c.steps:,} steps x {c.tokens_per_step:,} tokens = {request.tokens:,} tokens",
        f"compute   {m.flops_per_token:,} FLOPs a token (forward and backward), {flops:.3g} in all",
        "            6 N + 12 L C T: parameters but positions, layers, width, context (PaLM, arXiv:2204.02311)",
    ]


def data_lines(c: TrainConfig) -> list[str]:
    from aymen_gpt.data.loader import TokenRows
    from aymen_gpt.errors import DataError

    try:
        rows = TokenRows(Path(c.data), "train", block_size=c.block_size, seed=c.seed)
    except DataError:
        line = f"data      {c.data} is not there yet: fineweb.py makes it, 2 bytes a token on the disk"
        return [line, *doubts(c, None)]
    epochs = c.steps * c.rows_per_step / rows.rows_per_epoch
    line = f"data      {c.data}: {rows.n_tokens:,} train tokens ({gb(2 * rows.n_tokens)}), read {epochs:.2f} times"
    return [line, *doubts(c, rows.n_tokens)]


def memory_lines(request: Request) -> list[str]:
    m, device = request.memory(request.micro_batch), request.device
    parts = {
        "weights, gradients, two moments": m.state,
        "copies of weights for products": m.copies,
        "activations": m.activations,
        "logits of one chunk": m.logits,
        "all": m.total,
    }
    dtype = str(device.dtype).removeprefix("torch.")
    fits = request.fits(request.micro_batch)
    there = f" into {request.memory_gb:,.0f} GB" if request.memory_gb else ""
    return [
        f"memory    {request.gpus} x {device.name}, "
        f"micro-batch of {request.micro_batch} row{'s' * (request.micro_batch > 1)}, {dtype}, of each:",
        *(f"            {part:<32} {gb(size):>15}" for part, size in parts.items() if size),
        f"            {'fits' if fits else 'does not fit'}{there}"
        + ("" if fits else ": a smaller --preset, --block-size or --micro-batch, or another device (--on h200)"),
        f"update    {request.passes} micro-batch{'es' * (request.passes > 1)} on each device "
        f"make{'s' * (request.passes == 1)} {request.config.rows_per_step:,} rows",
    ]


def disk_lines(c: TrainConfig) -> list[str]:
    one = plan.checkpoint_bytes(c.model)
    n = c.keep_last + 1 + (c.steps // c.keep_every if c.keep_every else 0)
    return [f"disk      {gb(one)} a checkpoint, {gb(n * one)} for the {n} that are kept or being written"]


def assumed(request: Request, mfu: float) -> float:
    """Tokens a second of one device, at a share of its peak that the user assumes."""
    assert request.device.peak_flops is not None
    speed = mfu * request.device.peak_flops / request.config.model.flops_per_token
    print(f"assumed   MFU {mfu:g}: {speed:,.0f} tokens/s a device")
    return speed


def measured(request: Request) -> float:
    """Tokens a second of one device, by a probe."""
    probe = run_probe(request)
    speed, peak = probe.tokens_per_second(request), request.device.peak_flops
    share = f", MFU {100 * speed * request.config.model.flops_per_token / peak:.1f} %" if peak else ""
    print(
        f"probe     {PROBE_UPDATES} updates, medians: {probe.micro_seconds:.3g} s a micro-batch, "
        f"{probe.update_seconds:.3g} s AdamW: {speed:,.0f} tokens/s a device{share}\n"
        f"            memory {gb(probe.memory)} at the most"
    )
    return speed


def time_lines(request: Request, speed: float | None, dollars: float | None) -> list[str]:
    """How long, and for how much, at a speed of each device in tokens a second."""
    if speed is None:
        both = "" if dollars is None else "; the cost follows from it"
        return [f"time      --probe measures it, --on h100 --mfu 0.4 assumes that share of a GPU's peak{both}"]
    hours = request.tokens / (speed * request.gpus) / 3600
    ideal = ", if they never wait for each other" if request.gpus > 1 else ""
    lines = [f"time      {duration(hours)} on {request.gpus} device{'s' * (request.gpus > 1)}{ideal}"]
    if dollars is not None:
        cost = hours * request.gpus * dollars
        shown = f"{cost:,.0f}" if cost >= 100 else f"{cost:.2f}" if cost >= 0.01 else "less than 0.01"
        lines.append(f"cost      {shown} dollars at {dollars:g} a device and hour")
    return lines


def duration(hours: float) -> str:
    """
    >>> [duration(h) for h in (4000, 30.04, 0.5, 0.01)]
    ['4,000 hours', '30.0 hours', '30 minutes', '36 seconds']
    """
    if hours >= 1:
        return f"{hours:,.0f} hours" if hours >= 100 else f"{hours:.1f} hours"
    return f"{60 * hours:.2g} minutes" if hours >= 1 / 60 else f"{3600 * hours:.2g} seconds"


def gb(size: float) -> str:
    """
    >>> gb(34_000_000), gb(1_493_000_000), gb(5_036_700_000_000)
    ('34.0 MB', '1.49 GB', '5,037 GB')
    """
    if size < 1e8:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e9:,.0f} GB" if size >= 1e11 else f"{size / 1e9:.2f} GB"


def run_probe(request: Request) -> Probe:
    """Train on random tokens, one micro-batch an update (two where there are more); no file is read or written."""
    import torch

    from aymen_gpt.model import cpu
    from aymen_gpt.training import device as devices
    from aymen_gpt.training.distributed import Ranks
    from aymen_gpt.training.trainer import Trainer

    c, device = request.config, request.device
    if device.place.type == "cpu":
        cpu.keep_freed_memory()
    print(f"probing   {PROBE_UPDATES} updates ...", file=sys.stderr)
    trainer = Trainer(c, device, Ranks(), None, None, "")  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(c.seed)
    micro, update = [], []
    for _ in range(PROBE_UPDATES):
        tokens = torch.randint(c.model.vocab_size, (request.micro_batch, c.block_size + 1), generator=draw)
        seconds = probe_update(trainer, tokens, min(request.passes, 2))
        micro.append(seconds[0])
        update.append(seconds[1])
    return Probe(statistics.median(micro), statistics.median(update), devices.peak_memory(device.place))


def probe_update(trainer: "Trainer", tokens: "torch.Tensor", passes: int) -> tuple[float, float]:
    """Seconds of a forward and backward pass, and of the update that follows."""
    from aymen_gpt.training import optim

    began = time.perf_counter()
    for _ in range(passes):
        (trainer.batch_loss(tokens) / tokens[:, 1:].numel()).backward()
    synchronize(trainer.device)
    middle = time.perf_counter()
    optim.clip_gradients(trainer.parameters, trainer.config.grad_clip)
    trainer.optimizer.step()
    trainer.sum.clear()
    synchronize(trainer.device)
    return (middle - began) / passes, time.perf_counter() - middle


def synchronize(device: "Device") -> None:
    import torch

    if device.place.type == "cuda":
        torch.cuda.synchronize(device.place)


if __name__ == "__main__":
    from aymen_gpt.__main__ import main

    main("plan")
