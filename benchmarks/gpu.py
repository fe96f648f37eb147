"""What one CUDA GPU does with this code: right first, then fast. Run it through benchmarks/gpu.sh.

    python benchmarks/gpu.py [--parts matrix correct resume step hellaswag curve] [--json FILE] [--quick]

    matrix      the rates of large bf16 products: the ceiling beside every MFU
    correct     loss and gradients on the device against float32 on the CPU, eager and compiled
    resume      a run that is stopped and continued against the uninterrupted one, bit for bit
    step        tokens/s and MFU of the 124M step at T = 1,024: attention kernels, losses, residuals, micro-batches
    hellaswag   seconds for the whole validation set, 124M, bfloat16
    curve       the loss of a short real run on the shards in --data, if there are any

Needs no network. --quick makes everything small enough for a CPU: the same code, numbers without meaning. A part
that fails is reported and the next one runs; the exit code is then 1.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
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
from aymen_gpt.training import device as devices
from aymen_gpt.training import optim
from aymen_gpt.training.config import resolve
from aymen_gpt.training.distributed import Ranks
from aymen_gpt.training.runlog import RunLog


@dataclass(frozen=True)
class Setting:
    """What every part is told."""

    device: devices.Device
    quick: bool
    data: Path | None

    @property
    def compiled(self) -> tuple[bool, ...]:
        """Eager and compiled; compiling takes a CPU minutes."""
        return (False,) if self.quick else (False, True)

    def sync(self) -> None:
        if self.device.place.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeats: int) -> float:
        """Median seconds of one call, the device waited for; two calls warm up."""
        found = []
        for _ in range(repeats + 2):
            self.sync()
            began = time.perf_counter()
            work()
            self.sync()
            found.append(time.perf_counter() - began)
        return statistics.median(found[2:])


Table = list[dict[str, Any]]


def matrix(s: Setting) -> Table:
    """TFLOP/s of bf16 products of random numbers."""
    n = 256 if s.quick else 8192
    tokens = 256 if s.quick else 65536
    sizes = [(n, n, n), (tokens, 768, 3072), (tokens, 3072, 768), (tokens, 768, 50304)]
    rows = []
    for m, k, cols in sizes:
        a = torch.randn(m, k, device=s.device.place, dtype=torch.bfloat16)
        b = torch.randn(k, cols, device=s.device.place, dtype=torch.bfloat16)
        seconds = s.seconds(lambda a=a, b=b: a @ b, 3 if s.quick else 20)  # type: ignore[misc]
        rows.append({"product": f"{m:,} x {k:,} x {cols:,}", "tflops": 2 * m * k * cols / seconds / 1e12})
    return rows


def correct(s: Setting) -> Table:
    """Relative error of the loss and of all gradients against float32 on the CPU, from fresh random tokens."""
    config = GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=256)
    tokens = torch.randint(50257, (4, 257))
    reference = GPT(config, torch.Generator().manual_seed(1))
    expected, expected_grads = loss_and_gradients(reference, tokens, torch.float32)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for compiled in s.compiled:
            model = GPT(config, torch.Generator().manual_seed(1)).to(s.device.place)
            loss, grads = loss_and_gradients(model, tokens.to(s.device.place), dtype, compiled)
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "compiled": compiled,
                    "loss_error": abs(loss - expected) / expected,
                    "gradient_error": ((grads - expected_grads).norm() / expected_grads.norm()).item(),
                }
            )
            limit = 2e-3 if dtype == torch.float32 else 3e-2  # TF32 is on for float32 products
            assert rows[-1]["gradient_error"] < limit, rows[-1]
    return rows


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


def resume(s: Setting) -> Table:
    """Losses and final weights of 8 steps in one go, and of 3 + 5, eager and compiled."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        data = random_shards(Path(temporary) / "shards")
        for compiled in s.compiled:
            runs = [Path(temporary) / f"{name}-{compiled}" for name in ("whole", "parts")]
            short_run(s, data, runs[0], compiled, 99)
            with contextlib.suppress(Stopped):
                short_run(s, data, runs[1], compiled, 3)
            short_run(s, data, runs[1], compiled, 99)
            losses = [[row["loss"] for row in metrics(run) if "loss" in row] for run in runs]
            weights = [(checkpoints(run)[0] / "model.safetensors").read_bytes() for run in runs]
            difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
            rows.append(
                {"compiled": compiled, "same_bits": weights[0] == weights[1], "loss_difference": difference}
            )
    return rows


def random_shards(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for index, split in enumerate(("val", "train")):
        tokens = rng.integers(0, 2000, 200_000).astype(np.uint16)
        tokens[::500] = 50256
        write_shard(folder / shard_name(split, index), tokens)
    return folder


def short_run(s: Setting, data: Path, run: Path, compiled: bool, stop_at: int) -> None:
    options = {"preset": "tiny", "data": str(data), "steps": 8, "compile": compiled, "checkpoint_every": 100}
    trainer = build(resolve(options), s.device, Ranks())
    with RunLog(run, 8) as log:
        trainer.fit(run, log, StopAt(stop_at))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class LowPrecisionResidual(GPT):
    """The residual stream in the autocast dtype instead of float32."""

    def hidden(self, idx: Tensor, *args: Any, **more: Any) -> Tensor:
        x = (self.wte(idx) + self.wpe.weight[: idx.size(1)]).to(torch.bfloat16)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


@dataclass(frozen=True)
class Variant:
    """One way to make the step; the defaults are what pretrain.py does."""

    name: str
    attention: tuple[SDPBackend, ...] = ()
    full_logits: bool = False
    low_precision_residual: bool = False
    rows: int = 64
    fused: bool = True
    compiled: bool = True


CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
VARIANTS = [
    Variant("as pretrain.py does"),
    Variant("cuDNN attention", attention=(CUDNN,)),
    Variant("flash attention", attention=(FLASH,)),
    Variant("bfloat16 residual", low_precision_residual=True),
    Variant("cuDNN, bfloat16 residual", attention=(CUDNN,), low_precision_residual=True),
    Variant("full logits, compiled", full_logits=True, rows=32),
    Variant("cuDNN, bfloat16 residual, full logits", (CUDNN,), True, True, rows=32),
    Variant("micro-batch 32", rows=32),
    Variant("unfused AdamW", fused=False),
    Variant("eager", compiled=False),
]


def step(s: Setting) -> Table:
    """Tokens/s and MFU of forward, backward, clip and AdamW on one micro-batch."""
    config = GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=64) if s.quick else PRESETS["gpt2"]
    rows: Table = []
    for variant in VARIANTS[:3] if s.quick else VARIANTS:
        if s.quick:
            variant = replace(variant, rows=4, compiled=False, attention=())
        try:
            rows.append({"variant": variant.name, "rows": variant.rows} | one_step(s, config, variant))
        except RuntimeError as error:  # a kernel this device or torch does not have
            rows.append({"variant": variant.name, "error": " ".join(str(error).split())[:100]})
        torch._dynamo.reset()
        print(rows[-1], flush=True)
    return rows


def one_step(s: Setting, config: GPTConfig, v: Variant) -> dict[str, Any]:
    kind = LowPrecisionResidual if v.low_precision_residual else GPT
    model = kind(config, torch.Generator().manual_seed(1)).to(s.device.place)
    optimizer = optim.adamw(model, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
    if not v.fused:
        optimizer = torch.optim.AdamW(optimizer.param_groups, lr=6e-4, betas=(0.9, 0.95), fused=False)
    tokens = torch.randint(50257, (v.rows, config.block_size + 1), device=s.device.place)
    if s.device.place.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            if v.full_logits:
                return F.cross_entropy(model(x).float().flatten(0, 1), y.flatten(), reduction="sum")
            return linear_cross_entropy(model.hidden(x), model.wte.weight, y, config.vocab_size)

    run = torch.compile(loss, dynamic=False) if v.compiled else loss

    def once() -> None:
        with sdpa_kernel(list(v.attention)) if v.attention else contextlib.nullcontext():
            (run(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()).backward()
        optim.clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = s.seconds(once, 2 if s.quick else 10)
    speed = v.rows * config.block_size / seconds
    peak = s.device.peak_flops
    return {
        "tokens_per_second": speed,
        "mfu": speed * config.flops_per_token / peak if peak else None,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if s.device.place.type == "cuda" else None,
    }


def score(s: Setting) -> Table:
    """Seconds for HellaSwag, by one and by both protocols; twice: the first call warms up."""
    config = GPTConfig(block_size=256, n_layer=2, n_head=2, n_embd=64) if s.quick else PRESETS["gpt2"]
    model = GPT(config, torch.Generator().manual_seed(1)).to(s.device.place).eval()
    examples = load_examples()
    if s.quick:
        examples = evenly_spaced(examples, 20)
    rows = []
    for protocols in (("completion",), ("completion",), ("completion", "harness")):
        s.sync()
        began = time.perf_counter()
        result = hellaswag.evaluate(model, examples, protocols=protocols, dtype=torch.bfloat16)
        s.sync()
        seconds = time.perf_counter() - began
        accuracy = result.tally("completion").as_dict()["acc_norm"]
        rows.append(
            {"protocols": " + ".join(protocols), "n": len(examples), "seconds": seconds, "acc_norm": accuracy}
        )
    return rows


def curve(s: Setting) -> Table:
    """A short run of the 124M model on real shards: validation loss by step and its seconds."""
    if s.data is None:
        return [{"skipped": "no --data"}]
    steps = 4 if s.quick else 200
    options = {
        "preset": "tiny" if s.quick else "gpt2",
        "data": str(s.data),
        "steps": steps,
        "tokens_per_step": 512 if s.quick else 2**17,
        "val_every": steps // 4,
        "val_tokens": 2**10 if s.quick else 2**19,
        "hellaswag_every": 0,
        "checkpoint_every": steps,
    }
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        config = resolve(options)
        began = time.perf_counter()
        trainer = build(config, s.device, Ranks())
        with RunLog(run, steps) as log:
            trainer.fit(run, log, StopAt(0))
        found = [row for row in metrics(run) if "val_loss" in row]
        seconds = time.perf_counter() - began
    return [
        {k: row.get(k) for k in ("step", "tokens", "loss", "val_loss", "tokens_per_second")} for row in found
    ] + [{"seconds": seconds}]


PARTS: dict[str, Callable[[Setting], Table]] = {
    "matrix": matrix,
    "correct": correct,
    "resume": resume,
    "step": step,
    "hellaswag": score,
    "curve": curve,
}


def table(rows: Table) -> Iterator[str]:
    """A markdown table of rows that need not have the same columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(cell(row.get(column)) for column in columns) + " |"


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description="correctness and speed on one CUDA GPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", type=Path, help="token shards for the curve")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    setting = Setting(devices.choose_device(args.device, "bfloat16"), args.quick, args.data)
    found: dict[str, Any] = {"device": setting.device.name, "torch": torch.__version__, "quick": args.quick}
    failed = False
    for part in args.parts:
        began = time.perf_counter()
        try:
            found[part] = PARTS[part](setting)
        except Exception:
            failed = True
            found[part] = [{"error": traceback.format_exc(limit=3)}]
        found[f"{part}_seconds"] = time.perf_counter() - began
        print(f"\n## {part} ({found[f'{part}_seconds']:.0f} s)\n", *table(found[part]), sep="\n", flush=True)
        if args.json:
            args.json.write_text(json.dumps(found, indent=2) + "\n")
    print(f"\n{setting.device.name}, torch {torch.__version__}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
