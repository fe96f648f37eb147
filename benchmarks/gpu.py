"""What one CUDA GPU does with this code: right first, then fast. Run it through benchmarks/gpu.sh.

    python benchmarks/gpu.py [--parts NAME ...] [--seconds 520] [--json FILE] [--data SHARDS] [--quick]

    correct     loss and gradients on the device against float32 on the CPU, eager and compiled
    resume      with --deterministic, a run that is stopped and continued against one left alone, bit for bit
    step        tokens/s and MFU of the update of GPT-2 124M as pretrain.py makes it: 8 micro-batches of 64 x 1,024
    hellaswag   seconds for the whole validation set, 124M, bfloat16
    curve       the loss of a short real run on the shards in --data, if there are any
    variants    the same update with other attention, loss, residual stream, micro-batch and ways to compile
    matrix      the rates of large bf16 products: the ceiling beside every MFU

Needs no network. Each part is a process of its own; every line is in the JSON file as soon as it is measured, and
what does not fit into --seconds is left out, so that a run cut short loses nothing. A part that fails is reported
and the next one runs; the exit code is then 1. --quick makes everything small enough for a CPU: the same code,
numbers without meaning.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from aymen_gpt.commands.pretrain import build
from aymen_gpt.data.shards import shard_name, write_shard
from aymen_gpt.errors import Stopped
from aymen_gpt.evaluation import hellaswag
from aymen_gpt.evaluation.hellaswag_data import evenly_spaced, load_examples
from aymen_gpt.model.folders import checkpoints
from aymen_gpt.model.gpt import GPT, PRESETS, GPTConfig
from aymen_gpt.model.loss import linear_cross_entropy
from aymen_gpt.reporting.run_folder import read_lines
from aymen_gpt.training import device as devices
from aymen_gpt.training.config import resolve
from aymen_gpt.training.distributed import Ranks
from aymen_gpt.training.runlog import RunLog
from aymen_gpt.training.trainer import Trainer

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What every part gets."""

    device: devices.Device
    quick: bool
    data: Path | None

    @property
    def compiled(self) -> tuple[bool, ...]:
        """Eager and compiled; compiling takes a CPU minutes."""
        return (False,) if self.quick else (False, True)

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds of one call, the device waited for."""
        wait = torch.cuda.synchronize if self.device.place.type == "cuda" else lambda: None
        wait()
        began = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - began


def correct(s: Setting) -> Iterator[Row]:
    """Relative error of the loss and of all gradients against float32 on the CPU, from random tokens."""
    config = GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=256)
    tokens = torch.randint(50257, (4, 257), generator=torch.Generator().manual_seed(2))
    reference = GPT(config, torch.Generator().manual_seed(1))
    expected, expected_grads = loss_and_gradients(reference, tokens, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        for compiled in s.compiled:
            model = GPT(config, torch.Generator().manual_seed(1)).to(s.device.place)
            loss, grads = loss_and_gradients(model, tokens.to(s.device.place), dtype, compiled)
            error = ((grads - expected_grads).norm() / expected_grads.norm()).item()
            limit = 2e-3 if dtype == torch.float32 else 3e-2  # TF32 is on for float32 products
            yield {
                "dtype": str(dtype).removeprefix("torch."),
                "compiled": compiled,
                "loss_error": abs(loss - expected) / expected,
                "gradient_error": error,
                "ok": error < limit,
            }


def loss_and_gradients(
    model: GPT, tokens: Tensor, dtype: torch.dtype, compiled: bool = False
) -> tuple[float, Tensor]:
    """Mean loss, and all gradients in one float64 vector on the CPU."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return linear_cross_entropy(model.hidden(x), model.wte.weight, y, model.config.vocab_size)

    value = (torch.compile(loss, dynamic=False) if compiled else loss)(tokens[:, :-1], tokens[:, 1:])
    value = value / tokens[:, 1:].numel()
    value.backward()
    grads = [p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None]
    return value.item(), torch.cat(grads)


class StopAt:
    """A stop signal that comes in a chosen step."""

    name = "SIGTERM"

    def __init__(self, step: int) -> None:
        self.step, self.asked = step, 0

    @property
    def requested(self) -> bool:
        self.asked += 1
        return self.asked == self.step


def resume(s: Setting) -> Iterator[Row]:
    """Losses and final weights of 8 steps in one go, and of 3 + 5, eager and compiled."""
    devices.be_deterministic()
    with tempfile.TemporaryDirectory() as temporary:
        data = random_shards(Path(temporary) / "shards")
        for compiled in s.compiled:
            runs = [Path(temporary) / f"{name}-{compiled}" for name in ("whole", "parts")]
            short_run(s, data, runs[0], compiled, 99)
            with contextlib.suppress(Stopped):
                short_run(s, data, runs[1], compiled, 3)
            short_run(s, data, runs[1], compiled, 99)
            losses = [
                [row["loss"] for row in read_lines(run / "metrics.jsonl", []) if "loss" in row] for run in runs
            ]
            weights = [(checkpoints(run)[0] / "model.safetensors").read_bytes() for run in runs]
            difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
            same = weights[0] == weights[1]
            yield {"compiled": compiled, "same_bits": same, "loss_difference": difference, "ok": same}


def random_shards(folder: Path, tokens: int = 200_000) -> Path:
    rng = np.random.default_rng(0)
    for index, split in enumerate(("val", "train")):
        ids = rng.integers(0, 2000, tokens).astype(np.uint16)
        ids[::500] = 50256
        write_shard(folder / shard_name(split, index), ids)
    return folder


def short_run(s: Setting, data: Path, run: Path, compiled: bool, stop_at: int) -> None:
    options = {"preset": "tiny", "data": str(data), "steps": 8, "compile": compiled, "checkpoint_every": 100}
    trainer = build(resolve(options), s.device, Ranks())
    with RunLog(run, 8) as log:
        trainer.fit(run, log, StopAt(stop_at))


def blocks_one_by_one(trainer: Trainer) -> None:
    """Each block is compiled alone, as a sharded model needs, and the loss alone."""
    for block in trainer.model.h:
        block.compile(dynamic=False)
    whole = torch.compile(linear_cross_entropy, dynamic=False)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with trainer.device.autocast():
            return whole(trainer.model.hidden(x), trainer.model.wte.weight, y, trainer.model.config.vocab_size)

    trainer.loss = loss


Variant = tuple[dict[str, Any], Callable[[Trainer], None] | None, SDPBackend | None]  # options, change, attention
VARIANTS: dict[str, Variant] = {
    "flash attention": ({}, None, SDPBackend.FLASH_ATTENTION),
    "bfloat16 residual": ({"residual": "bfloat16"}, None, None),
    "blocks compiled one by one": ({}, blocks_one_by_one, None),
    "micro-batch 32": ({"micro_batch": 32}, None, None),
    "eager": ({"compile": False}, None, None),
}


def step(s: Setting) -> Iterator[Row]:
    yield update_of(s, "as pretrain.py does", ({}, None, None))


def variants(s: Setting) -> Iterator[Row]:
    for name, variant in VARIANTS.items():
        try:
            yield update_of(s, name, variant)
        except RuntimeError as error:  # a kernel this device or torch does not have
            yield {"variant": name, "error": " ".join(str(error).split())[:100]}
        torch._dynamo.reset()
        if s.quick:
            return


def update_of(s: Setting, name: str, variant: Variant) -> Row:
    """Median of 5 whole updates after 2, data ready in host memory; the first one compiles."""
    changed, change, attention = variant
    small = {"preset": "tiny", "tokens_per_step": 64 * 8, "micro_batch": 4, "compile": False}
    large = {"preset": "gpt2", "tokens_per_step": 2**19, "micro_batch": 64, "compile": True}
    with tempfile.TemporaryDirectory() as temporary:
        data = random_shards(Path(temporary), 2 * 2**19)
        options = (small if s.quick else large) | {"data": str(data), "hellaswag_every": 0, "steps": 100}
        trainer = build(resolve(options | ({} if s.quick else changed)), s.device, Ranks())
        if change and not s.quick:
            change(trainer)
        if s.device.place.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = []
        with sdpa_kernel(attention) if attention and not s.quick else contextlib.nullcontext():
            for number in range(3 if s.quick else 7):
                batches = trainer.batches_of(number)
                found.append(s.seconds(partial(trainer.train_step, number, batches)))
    speed, peak = trainer.config.tokens_per_step / statistics.median(found[2:]), s.device.peak_flops
    return {
        "variant": name,
        "tokens_per_second": speed,
        "mfu": speed * trainer.config.model.flops_per_token / peak if peak else None,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if s.device.place.type == "cuda" else None,
        "first_step_seconds": found[0],
    }


def score(s: Setting) -> Iterator[Row]:
    """Seconds for HellaSwag, by one and by both protocols; the first call warms up."""
    config = GPTConfig(block_size=256, n_layer=2, n_head=2, n_embd=64) if s.quick else PRESETS["gpt2"]
    model = GPT(config, torch.Generator().manual_seed(1)).to(s.device.place).eval()
    examples = evenly_spaced(load_examples(), 20 if s.quick else None)
    for protocols in (("completion",), ("completion",), ("completion", "harness")):
        work = partial(hellaswag.evaluate, model, examples, protocols=protocols, dtype=torch.bfloat16)
        yield {"protocols": " + ".join(protocols), "n": len(examples), "seconds": s.seconds(work)}


def curve(s: Setting) -> Iterator[Row]:
    """A short run of the 124M model on real shards: validation loss by step and its seconds."""
    if s.data is None:
        yield {"skipped": "no --data"}
        return
    steps = 4 if s.quick else 200
    every = {"steps": steps, "warmup_steps": steps // 10, "val_every": steps // 4, "checkpoint_every": steps}
    small = {"preset": "tiny", "tokens_per_step": 512, "val_tokens": 2**10}
    large = {"preset": "gpt2", "tokens_per_step": 2**17, "val_tokens": 2**19}
    options = every | (small if s.quick else large) | {"data": str(s.data), "hellaswag_every": 0}
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        trainer = build(resolve(options), s.device, Ranks())
        with RunLog(run, steps) as log, contextlib.redirect_stdout(sys.stderr):
            seconds = s.seconds(lambda: trainer.fit(run, log, StopAt(0)))
        for row in read_lines(run / "metrics.jsonl", []):
            if "val_loss" in row:
                yield {k: row.get(k) for k in ("step", "tokens", "loss", "val_loss", "tokens_per_second")}
        yield {"seconds": seconds}


def matrix(s: Setting) -> Iterator[Row]:
    """TFLOP/s of bf16 products of random numbers, the median of 20."""
    n, tokens = (256, 256) if s.quick else (8192, 65536)
    for m, k, cols in ((n, n, n), (tokens, 768, 3072), (tokens, 3072, 768), (tokens, 768, 50304)):
        a = torch.randn(m, k, device=s.device.place, dtype=torch.bfloat16)
        b = torch.randn(k, cols, device=s.device.place, dtype=torch.bfloat16)
        seconds = [s.seconds(partial(torch.matmul, a, b)) for _ in range(22)]
        rate = 2 * m * k * cols / statistics.median(seconds[2:]) / 1e12
        yield {"product": f"{m:,} x {k:,} x {cols:,}", "tflops": rate}


PARTS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "correct": correct,
    "resume": resume,
    "step": step,
    "hellaswag": score,
    "curve": curve,
    "variants": variants,
    "matrix": matrix,
}


def table(rows: list[Row]) -> Iterator[str]:
    """A Markdown table of rows that need not have the same columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        values = (row.get(column, "") for column in columns)
        shown = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in values)
        yield "| " + " | ".join(shown) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description="correctness and speed on one CUDA GPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", type=Path, help="token shards for the curve")
    parser.add_argument("--seconds", type=float, default=520, help="what is not begun by then is left out [520]")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--as-part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if args.as_part:
        setting = Setting(devices.choose_device(args.device, "bfloat16"), args.quick, args.data)
        for row in PARTS[args.as_part](setting):
            print(json.dumps({"device": setting.device.name} | row), flush=True)
        return 0
    deadline = time.monotonic() + args.seconds
    found: dict[str, Any] = {"torch": torch.__version__, "quick": args.quick}
    failed = [part for part in args.parts if not measured(part, args, found, deadline)]
    print(f"\n{found.get('device')}, torch {torch.__version__}{f': failed: {failed}' if failed else ''}")
    return int(bool(failed))


def measured(part: str, args: argparse.Namespace, found: dict[str, Any], deadline: float) -> bool:
    """Run a part as a process, until the deadline, and keep each of its rows at once; whether all was well."""
    words = [sys.executable, __file__, "--as-part", part, "--device", args.device]
    words += ["--quick"] * args.quick + (["--data", str(args.data)] if args.data else [])
    rows = found[part] = []
    began = time.monotonic()

    def keep(row: Row) -> None:
        found["device"] = row.pop("device", found.get("device"))
        rows.append(row)
        if args.json:
            args.json.write_text(json.dumps(found, indent=2) + "\n")

    if began >= deadline:
        keep({"skipped": f"{args.seconds:.0f} s are over"})
    else:
        child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert child.stdout
        alarm = threading.Timer(deadline - began, child.kill)
        alarm.start()
        for line in child.stdout:
            if line.startswith('{"device"'):
                keep(json.loads(line))
        if child.wait() and not alarm.finished.is_set():
            keep({"error": f"ended with {child.returncode}, see above"})
        elif child.returncode:
            keep({"skipped": f"cut off: {args.seconds:.0f} s are over"})
        alarm.cancel()
    print(f"\n## {part} ({time.monotonic() - began:.0f} s)\n", *table(rows), sep="\n", flush=True)
    return all("error" not in row and row.get("ok", True) for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())
