"""The CUDA path on a machine without a GPU: all of it runs on a pretended H100, and nothing is computed.

    python -m tools.rehearse [--parts run traces code kernels] [--json FILE]        make rehearse

    run      a trainer built, its micro-batch fitted, steps, validation, samples, HellaSwag and checkpoints
             in bfloat16, float16 and float32: no tensor on the wrong device, and how often the host waits
    traces   how many programs torch.compile makes for one run, and that each is one graph
    code     GPT-2 124M at 64 x 1,024 taken to Triton source: products, bytes moved, launches, peak, atomics, and
             what they come to on an A100, H100 and H200 on paper
    kernels  every Triton kernel of a small model compiled for sm_80 and sm_90

What this proves and what it cannot: docs/cuda.md. Exit code 1 where a budget is exceeded.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tools import pretend_cuda

Table = list[dict[str, Any]]
STEP_WAITS = 1  # the loss, the norm and the ranks' verdicts are read together
LOSS_GB = 1.7  # that the loss's kernel moves a chunk of 8,192 tokens: logits read, gradient written
PEAK_GB = 26.0  # of GPT-2 124M at 64 x 1,024


class OverBudget(Exception):
    """Something costs more than it may."""


@contextmanager
def made_trainer(device: str, dtype: str, **options: Any) -> Iterator[Any]:
    """A tiny trainer on random tokens."""
    from aymen_gpt.data.loader import TokenRows
    from aymen_gpt.data.shards import shard_name, write_shard
    from aymen_gpt.training import device as devices
    from aymen_gpt.training.config import resolve
    from aymen_gpt.training.distributed import Ranks
    from aymen_gpt.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        for index, split in enumerate(("val", "train")):
            tokens = np.random.default_rng(index).integers(0, 50256, 100_000).astype(np.uint16)
            tokens[::400] = 50256
            write_shard(data / shard_name(split, index), tokens)
        config = resolve(
            {"preset": "tiny", "data": folder, "dtype": dtype, "val_tokens": 64 * 3, "compile": False} | options
        )
        train = TokenRows(data, "train", block_size=64, seed=1)
        val = TokenRows(data, "val", block_size=64, seed=None)
        yield Trainer(config, devices.choose_device(device, dtype), Ranks(), train, val, "")


def _look(
    found: Table,
    waits: pretend_cuda.HostWaits,
    dtype: str,
    what: str,
    work: Callable[[], object],
    budget: int | None = None,
) -> None:
    """Do a piece of work and note how often the host waits in it; OverBudget where that is too often."""
    waits.counts.clear()
    work()
    count, where = waits.waits(), dict(waits.counts)
    found.append({"dtype": dtype, "what": what, "waits": count, "where": where})
    if budget is not None and count > budget:
        raise OverBudget(f"{what} in {dtype} waits {count} times, {budget} at most: {where}")


def run() -> Table:
    """Each thing that a run does, in three precisions, and where the host waits for the device in it."""
    from aymen_gpt.evaluation import hellaswag
    from aymen_gpt.evaluation.hellaswag_data import evenly_spaced, load_examples
    from aymen_gpt.model.generation import generate
    from aymen_gpt.training import checkpoint

    examples = evenly_spaced(load_examples(), 8)
    found: Table = []
    for dtype in ("bfloat16", "float16", "float32"):
        with (
            pretend_cuda.pretended_gpu() as waits,
            made_trainer("cuda", dtype, micro_batch=2, tokens_per_step=64 * 5) as trainer,
        ):
            look = partial(_look, found, waits, dtype)
            look("micro-batch fitted", trainer.fit_micro_batch)
            for number in range(2):
                batches = trainer.batches_of(number)
                assert len(batches) == 3
                look("a step of 3 micro-batches", partial(trainer.train_step, number, batches), STEP_WAITS)
            look("validation of 2 micro-batches", trainer.validation_loss, 1)
            look("samples of 3 x 64 tokens", lambda: trainer.sample(1))
            look("a checkpoint's capture", lambda: checkpoint.capture(trainer.model, trainer.optimizer))
            look(
                "HellaSwag, 8 examples",
                lambda: hellaswag.evaluate(trainer.model, examples, dtype=trainer.device.dtype),
            )
            greedy = generate(trainer.model, [1, 2, 3], 8, temperature=0.0)
            look("8 tokens, greedy", partial(list, greedy), 3 * 8)
            drawn = generate(trainer.model, [1, 2, 3], 8, top_k=50, top_p=0.9)
            look("8 tokens, top-k and top-p", partial(list, drawn), 3 * 8)
            for tensor in (*trainer.model.parameters(), *trainer.model.buffers()):
                assert tensor.device.type == "cuda"
    return found


def traces() -> Table:
    """Programs that torch.compile traces in a run, each one whole graph; on the CPU, which traces the same."""
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        made.append(len(graph.graph.nodes))
        return graph.forward

    found: Table = []
    with made_trainer("cpu", "bfloat16", compile=True, tokens_per_step=64 * 22, val_tokens=64 * 11) as trainer:
        torch._dynamo.reset()
        trainer.loss = torch.compile(trainer._loss, dynamic=False, fullgraph=True, backend=backend)

        def look(what: str, work: Callable[[], object]) -> None:
            before = len(made)
            work()
            found.append({"what": what, "programs": len(made) - before})

        trainer.micro_batch = 4
        for rows in (4, 4):
            look(f"a micro-batch of {rows} tried", partial(trainer._fits, rows))
        look("a step of 5 x 4 + 2 rows", lambda: trainer.train_step(0, trainer.batches_of(0)))
        look("another", lambda: trainer.train_step(1, trainer.batches_of(1)))
        look("validation of 2 x 4 + 3 rows", trainer.validation_loss)
        look("a third step", lambda: trainer.train_step(2, trainer.batches_of(2)))
        torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    if len(made) >= limit:
        raise OverBudget(f"{len(made)} programs, and torch.compile gives up at {limit}")
    return found


@dataclass(frozen=True)
class Rates:
    """What a GPU does in practice on large work, from published measurements (docs/cuda.md): TFLOP/s, TB/s."""

    matmul: float
    memory: float
    attention: tuple[float, float]  # forward and backward
    peak: float


GPUS = {
    "A100": Rates(235, 1.7, (150, 110), 312),
    "H100": Rates(620, 2.7, (420, 330), 989),
    "H200": Rates(620, 3.9, (420, 330), 989),
}
OTHER_GB = 6.6  # a step's AdamW and clipping, and the casts of weights, outside the two programs


def code() -> Table:
    """GPT-2 124M at 64 x 1,024 as generated code, and its speed on paper."""
    from aymen_gpt.model.gpt import PRESETS
    from tools.codegen import count, programs

    gpt2, rows = PRESETS["gpt2"], 64
    tokens = rows * gpt2.block_size
    sources = programs(gpt2, rows)
    if len(sources) != 2:
        raise OverBudget(f"{len(sources)} programs for forward and backward, where 2 do")
    forward, backward = (count(source) for source in sources)
    # Two products of (T, hs) and (hs, T) or the reverse in forward and five in backward, of which causality
    # spares half.
    one = tokens * gpt2.block_size * gpt2.n_embd * gpt2.n_layer / 1e12
    attention = (2 * one, 5 * one)
    loss_gb = sum(gb for name, gb in forward.kernel_gb.items() if "logsumexp" in name) / (tokens / 8192)
    exact = sum(count(source).atomics for source in programs(replace(gpt2, n_layer=2), rows, deterministic=True))
    facts = {
        "products, TFLOP": (forward.matmul_flops + backward.matmul_flops) / 1e12,
        "causal attention, TFLOP": sum(attention),
        "kernels launched": forward.launches + backward.launches,
        "Triton kernels move in forward, GB": sum(forward.kernel_gb.values()),
        "Triton kernels move in backward, GB": sum(backward.kernel_gb.values()),
        "of forward, the loss: GB a chunk of 8,192 tokens": loss_gb,
        "most memory of forward's buffers, GB": forward.peak_gb,
        "atomic additions": forward.atomics + backward.atomics,
        "atomic additions with --deterministic": exact,
    }
    found: Table = [{"what": what, "value": value} for what, value in facts.items()]
    gb = sum(forward.kernel_gb.values()) + sum(backward.kernel_gb.values()) + OTHER_GB
    less = [count(source) for source in programs(gpt2, rows, residual=torch.bfloat16)]
    less_gb = sum(gb for program in less for gb in program.kernel_gb.values()) + OTHER_GB
    found.append({"what": "with --residual bfloat16: both, GB", "value": less_gb - OTHER_GB})
    found.append({"what": "with --residual bfloat16: most memory, GB", "value": less[0].peak_gb})
    for name, r in GPUS.items():
        for note, moved in (("", gb), (", --residual bfloat16", less_gb)):
            seconds = facts["products, TFLOP"] / r.matmul + moved / 1000 / r.memory
            seconds += sum(work / rate for work, rate in zip(attention, r.attention, strict=True))
            speed = tokens / seconds
            mfu = speed * gpt2.flops_per_token / 1e12 / r.peak
            found.append({"what": f"{name}{note} on paper, tokens/s (MFU {100 * mfu:.1f} %)", "value": speed})
    for what, value, most in (
        ("the loss's kernel moves {:.2f} GB a chunk", loss_gb, LOSS_GB),
        ("forward's buffers take {:.1f} GB", forward.peak_gb, PEAK_GB),
        ("{} atomic additions with --deterministic", exact, 0),
    ):
        if value > most:
            raise OverBudget(f"{what.format(value)}, {most} at most")
    return found


def kernels() -> Table:
    """Machine code for two architectures from every Triton kernel of a GPT-2 of one layer."""
    from aymen_gpt.model.gpt import PRESETS
    from tools.codegen import kernels as compiled
    from tools.codegen import programs

    sources = programs(replace(PRESETS["gpt2"], n_layer=1), 64)
    found: Table = []
    for architecture in (80, 90):
        results = [compiled(source, architecture) for source in sources]
        failures = [failure for *_, failed in results for failure in failed]
        if failures:
            raise OverBudget(f"{len(failures)} kernels do not compile for sm_{architecture}: {failures}")
        number, made = (sum(result[i] for result in results) for i in (0, 1))  # type: ignore[misc]
        found.append({"architecture": f"sm_{architecture}", "kernels": number, "programs": made})
    return found


PARTS: dict[str, Callable[[], Table]] = {"run": run, "traces": traces, "code": code, "kernels": kernels}


def shown(rows: Table) -> Iterator[str]:
    """A Markdown table; the places where the host waits are for the JSON only."""
    columns = [key for key in rows[0] if key != "where"]
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        cells = [
            f"{v:,.{2 if v < 1000 else 0}f}" if isinstance(v, float) else str(v) for v in map(row.get, columns)
        ]
        yield "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description="the CUDA path on a pretended GPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    pretend_cuda.preload()
    results: dict[str, Any] = {"torch": torch.__version__}
    failed = False
    for part in args.parts:
        began = time.perf_counter()
        try:
            results[part] = PARTS[part]()
        except OverBudget as error:
            failed = True
            print(f"\n{part}: over budget: {error}", file=sys.stderr)
            continue
        print(f"\n{part} ({time.perf_counter() - began:.0f} s)\n", *shown(results[part]), sep="\n", flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=2) + "\n")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
