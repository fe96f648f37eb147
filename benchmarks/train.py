"""The training step against what others would run: tokens/s, MFU, peak memory, in one alternating run.

    python benchmarks/train.py [--shape gpt2-256 gpt2-1024 small gpu] [--rounds 7] [--json FILE]

Every variant is a live process of its own; the rounds step them in turn, A B C A B C, so that a machine that slows
down slows all. A step is zero_grad, forward, backward, clip to 1.0, AdamW, on the same random tokens. Variants:

    ours               what pretrain.py runs on this device by default
    transformers       GPT2LMHeadModel with sdpa attention, its own loss, torch's AdamW as it comes, autocast
    ... compiled       the same through torch.compile
    textbook           our GPT, full float32 logits, F.cross_entropy, AdamW as it comes, no compile, autocast

MFU = tokens/s x GPTConfig.flops_per_token (6N + 12LTC: PaLM, arXiv:2204.02311, appendix B) / the device's peak;
it is left out where the peak is unknown. Memory is the most the process held (CUDA: that its tensors held).
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from alternating import Work, alternate, command

from aymen_gpt.commands.options import whole_number
from aymen_gpt.model import cpu
from aymen_gpt.model.gpt import GPT, PRESETS, GPTConfig
from aymen_gpt.training import device as devices
from aymen_gpt.training import optim
from aymen_gpt.training.config import resolve
from aymen_gpt.training.distributed import Ranks
from aymen_gpt.training.trainer import Trainer

Shape = tuple[GPTConfig, int]  # a model and the rows of one micro-batch, which is the whole step here
SHAPES: dict[str, Shape] = {
    "gpt2-256": (replace(PRESETS["gpt2"], block_size=256), 4),
    "gpt2-1024": (PRESETS["gpt2"], 1),
    "gpu": (PRESETS["gpt2"], 64),  # a GPU's own size: with the others it measures launches
    "small": (GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=256), 16),
    "tiny": (GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=32), 4),
}
Step = Callable[[torch.Tensor], float]  # tokens (rows, T + 1) -> the mean loss before the update


def ours(shape: Shape, device: devices.Device) -> Step:
    """The trainer itself, without data and run folder."""
    config, rows = shape
    sizes = {name: size for name, size in asdict(config).items() if name != "vocab_size"}
    step = {"tokens_per_step": rows * config.block_size, "micro_batch": rows, "device": device.place.type}
    c = resolve(sizes | step)
    trainer = Trainer(c, device, Ranks(), None, None, "")  # type: ignore[arg-type]
    steps = iter(range(10**9))

    def step(tokens: torch.Tensor) -> float:
        return trainer.train_step(next(steps), [tokens])[0]["loss"]

    return step


def textbook(shape: Shape, device: devices.Device) -> Step:
    model = GPT(shape[0], torch.Generator().manual_seed(1337)).to(device.place)

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(tokens[:, :-1])  # (B, T, V)
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    return _plain_step(model, loss, device)


def transformers(shape: Shape, device: devices.Device, compiled: bool = False) -> Step:
    from transformers import GPT2Config, GPT2LMHeadModel

    c, _ = shape
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.padded_vocab_size,  # a multiple of 128: the kinder case
            n_positions=c.block_size,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            attn_implementation="sdpa",
        )
    ).to(device.place)
    forward = torch.compile(model, dynamic=False) if compiled else model

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        return forward(input_ids=x, labels=y, shift_labels=y).loss

    return _plain_step(model, loss, device)


def _plain_step(
    model: torch.nn.Module, loss: Callable[[torch.Tensor], torch.Tensor], device: devices.Device
) -> Step:
    optimizer = torch.optim.AdamW(optim.decay_groups(model, 0.1), lr=6e-4, betas=(0.9, 0.95), eps=1e-8)

    def step(tokens: torch.Tensor) -> float:
        tokens = tokens.to(device.place)
        optimizer.zero_grad(set_to_none=True)
        with device.autocast():
            value = loss(tokens)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return value.item()

    return step


VARIANTS = {
    "ours": ours,
    "transformers": transformers,
    "transformers compiled": partial(transformers, compiled=True),
    "textbook": textbook,
}


def build(variant: str, shape: Shape, dtype: str) -> Work:
    """A variant in its own process; every step is on new random tokens, the same for all."""
    device = devices.choose_device("auto", dtype)
    if variant == "ours" and device.place.type == "cpu":
        cpu.keep_freed_memory()  # as pretrain.py does
    step = VARIANTS[variant](shape, device)

    config, rows = shape

    def once(number: int) -> float:
        draw = torch.Generator().manual_seed(number)
        return step(torch.randint(config.vocab_size, (rows, config.block_size + 1), generator=draw))

    return once


def measure(name: str, rounds: int, dtype: str, variants: list[str]) -> Iterator[dict[str, Any]]:
    """Step the variants in turn; one result a variant."""
    config, rows = SHAPES[name]
    builds = {variant: partial(build, variant, SHAPES[name], dtype) for variant in variants}
    timings = alternate(builds, range(2, 2 + rounds), warm_up=range(2))
    peak = devices.choose_device("auto", dtype).peak_flops
    for variant, timing in timings.items():
        speed = rows * config.block_size / timing.median
        yield {
            "shape": name,
            "variant": variant,
            "tokens_per_second": speed,
            "best": rows * config.block_size / min(timing.seconds),
            "ours_is_times": timing.times_slower(timings["ours"]),
            "gflops": speed * config.flops_per_token / 1e9,
            "mfu": speed * config.flops_per_token / peak if peak else None,
            "peak_gb": timing.peak_gb,
            "last_loss": timing.value,
            "seconds": timing.seconds,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="the training step against others', alternating")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help="[gpt2-256 gpt2-1024 small, on CUDA gpu]")
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=whole_number, default=7)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # for all alike: the commands set it for ours
    device = devices.choose_device("auto", args.dtype)
    machine = f"{device.name}, {torch.get_num_threads()} threads, {device.dtype}, torch {torch.__version__}"
    print(f"{machine}, {args.rounds} rounds\n")
    print("| shape | variant | tokens/s (best) | ours is | GFLOP/s | MFU | peak GB |")
    print("|---|---|---|---|---|---|---|")
    results = []
    usual = ["gpu"] if device.place.type == "cuda" else ["gpt2-256", "gpt2-1024", "small"]
    for name in args.shape or usual:
        for r in measure(name, args.rounds, args.dtype, args.variant):
            results.append(r)
            mfu = "" if r["mfu"] is None else f"{100 * r['mfu']:.1f} %"
            print(
                f"| {name} | {r['variant']} | {r['tokens_per_second']:,.0f} ({r['best']:,.0f}) "
                f"| {r['ours_is_times']:.2f}x | {r['gflops']:,.0f} | {mfu} | {r['peak_gb']:.2f} |",
                flush=True,
            )
            assert math.isfinite(r["last_loss"])
    if args.json:
        record = {"command": command(), "machine": machine, "results": results}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
