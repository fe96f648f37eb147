"""pretrain.py --plan: what a run will take, before anything is allocated; with --probe, 20 updates measured."""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aymen_gpt.training import plan
from aymen_gpt.training.config import TrainConfig

if TYPE_CHECKING:
    import torch

    from aymen_gpt.training.device import Device
    from aymen_gpt.training.trainer import Trainer

PROBE_UPDATES = 20


@dataclass(frozen=True)
class Request:
    """A run to be planned, on ``gpus`` devices of this machine's kind."""

    config: TrainConfig
    device: "Device"
    gpus: int

    @property
    def micro_batch(self) -> int:
        """Rows of one forward pass."""
        return self._dealt()[0]

    @property
    def passes(self) -> int:
        """Forward and backward passes of the first device in one update; others may do one less."""
        return self._dealt()[1]

    def _dealt(self) -> tuple[int, int]:
        largest = self.config.largest_micro_batch(on_cuda=self.device.place.type == "cuda")
        return plan.dealt(self.config.rows_per_step, self.gpus, largest)

    @property
    def tokens(self) -> int:
        return self.config.steps * self.config.tokens_per_step

    def memory(self, passes: int | None = None) -> plan.Memory:
        return plan.step_memory(
            self.config.model,
            micro_batch=self.micro_batch,
            passes=passes or self.passes,
            world_size=self.gpus,
            size=self.device.dtype.itemsize,
            on_cpu=self.device.place.type == "cpu",
        )


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
    config: TrainConfig, *, gpus: int | None, probe: bool, dollars: float | None, mfu: float | None
) -> int:
    """Print the plan of a run on ``gpus`` devices (default: those of torchrun, or one)."""
    from aymen_gpt.training import device as devices
    from aymen_gpt.training.distributed import ranks_from_environment

    ranks = ranks_from_environment()
    device = devices.choose_device(config.device, config.dtype, ranks.local_rank)
    request = Request(config, device, gpus or ranks.world_size)
    if not ranks.is_first:
        return 0
    print("\n".join([*model_lines(request), *data_lines(config), *memory_lines(request), *disk_lines(config)]))
    found = run_probe(request) if probe else None
    print("\n".join(time_lines(request, found, dollars, mfu)))
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
        return [f"data      {c.data} is not there yet: fineweb.py makes it, 2 bytes a token on the disk"]
    epochs = c.steps * c.rows_per_step / rows.rows_per_epoch
    return [
        f"data      {c.data}: {rows.n_tokens:,} train tokens ({gb(2 * rows.n_tokens)}), read {epochs:.2f} times"
    ]


def memory_lines(request: Request) -> list[str]:
    m, device = request.memory(), request.device
    on_cpu = device.place.type == "cpu"
    parts = {
        "weights": m.weights,
        "optimizer: two moments": m.moments,
        "gradients": m.gradients,
        "copies of weights for products": m.copies,
        "activations": m.activations,
        "logits and output layer": m.loss,
        "holes of the heap": m.holes,
        "Python and PyTorch": plan.PROCESS if on_cpu else 0,
    }
    peak = m.peak + (plan.PROCESS if on_cpu else 0)
    dtype = str(device.dtype).removeprefix("torch.")
    return [
        f"memory    {request.gpus} x {device.name}, micro-batch {request.micro_batch} rows, {dtype}, of each:",
        *(f"            {part:<32} {gb(size):>15}" for part, size in parts.items() if size),
        f"            {'at the most, in':<32} {gb(peak):>15}  {m.moment} (not all is there at once)",
        f"            and {gb(m.saving)} of host memory while a checkpoint is written",
        f"update    {request.passes} micro-batches on each device make {request.config.rows_per_step:,} rows",
    ]


def disk_lines(c: TrainConfig) -> list[str]:
    one = plan.checkpoint_bytes(c.model)
    n = c.keep_last + 1 + (c.steps // c.keep_every if c.keep_every else 0)
    return [f"disk      {gb(one)} a checkpoint, {gb(n * one)} for the {n} that are kept or being written"]


def time_lines(request: Request, probe: Probe | None, dollars: float | None, mfu: float | None) -> list[str]:
    """Hours and dollars, from what was measured or from an MFU that the user assumes."""
    peak, flops = request.device.peak_flops, request.config.model.flops_per_token
    lines = []
    if probe is not None:
        speed = probe.tokens_per_second(request)
        share = f", MFU {100 * speed * flops / peak:.1f} %" if peak else ""
        predicted = request.memory(min(request.passes, 2)).peak
        if request.device.place.type == "cpu":
            predicted += plan.PROCESS
        lines += [
            f"probe     {PROBE_UPDATES} updates, medians: {probe.micro_seconds:.3g} s a micro-batch, "
            f"{probe.update_seconds:.3g} s AdamW: {speed:,.0f} tokens/s a device{share}",
            f"            memory {gb(probe.memory)} at the most, predicted {gb(predicted)}",
        ]
    elif mfu and peak:
        speed = mfu * peak / flops
        lines += [f"assumed   MFU {mfu:g}: {speed:,.0f} tokens/s a device"]
    else:
        return [f"time      --probe measures it{'; --mfu 0.5 assumes that share of the peak' if peak else ''}"]
    hours = request.tokens / (speed * request.gpus) / 3600
    ideal = ", if they never wait for each other" if request.gpus > 1 else ""
    lines.append(f"time      {hours:,.1f} hours on {request.gpus} device{'s' * (request.gpus > 1)}{ideal}")
    if dollars is not None:
        cost = hours * request.gpus * dollars
        lines.append(f"cost      {cost:,.0f} dollars at {dollars:g} a device and hour")
    return lines


def gb(size: float) -> str:
    """
    >>> gb(1_493_000_000)
    '1.49 GB'
    """
    return f"{size / 1e9:,.2f} GB"


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
