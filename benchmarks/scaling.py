"""Predicted step time on many GPUs, from a rate per GPU, bytes and links: the table of docs/scaling.md.

    python benchmarks/scaling.py [--preset gpt2] [--tokens-per-second RATE] [--gpus 1 8 64 512]

The default rate is not ours: 488,000 tokens/s of GPT-2 124M on one H200 are the best public figure of a comparable
script (modded-nanogpt, records/track_3_optimization, torch.compile and scaled_dot_product_attention). Models of
other sizes are given the same MFU. The other constants are below, each with its origin.
"""

import argparse
from dataclasses import dataclass

from aymen_gpt.model.gpt import PRESETS, GPTConfig
from aymen_gpt.training.config import RECIPES

ANCHOR = 488_000  # tokens/s of GPT-2 124M on one GPU
PER_NODE = 8
# Bytes/s that an all-reduce moves per GPU. Inside a node: NVLink's 450 GB/s a direction (data sheet), of which
# NCCL reaches about four fifths. Between nodes: one 400 Gbit/s adapter a GPU, 50 GB/s, of which nine tenths.
NVLINK, NETWORK = 0.8 * 450e9, 0.9 * 50e9
MEMORY = 3.9e12  # bytes/s that an H200 reads and writes its memory with; 4.8e12 by the data sheet
UPDATE_BYTES = 28  # a parameter: AdamW reads weight, gradient and two moments, and writes all but the gradient
HOP = 15e-6  # seconds of one step of a ring between nodes, whatever its bytes
BACKWARD = 2 / 3  # of the compute


@dataclass(frozen=True)
class Step:
    """Seconds of the parts of one update."""

    gpus: int
    rows: float  # of one GPU
    tokens: int
    compute: float
    reduce: float
    last: float  # of ``reduce``: the token embedding, whose gradient is ready last
    update: float

    @property
    def seconds(self) -> float:
        """When nothing overlaps: torch.compile's one backward graph hands out all gradients at its end."""
        return self.compute + self.reduce + self.update

    @property
    def overlapped(self) -> float:
        """When all but the last bucket is summed during backward, as far as that is long enough."""
        hidden = min(self.reduce - self.last, BACKWARD * self.compute)
        return self.seconds - hidden


def predict(m: GPTConfig, tokens: int, gpus: int, rate: float) -> Step:
    """``rate``: tokens/s of one GPU on this model."""
    weights = 4.0 * m.n_params
    return Step(
        gpus=gpus,
        rows=tokens / m.block_size / gpus,
        tokens=tokens,
        compute=tokens / gpus / rate,
        reduce=all_reduce(weights, gpus),
        last=all_reduce(4.0 * m.padded_vocab_size * m.n_embd, gpus),
        update=UPDATE_BYTES * m.n_params / MEMORY,
    )


def all_reduce(size: float, gpus: int) -> float:
    """Seconds to sum ``size`` bytes over all: rings inside the nodes, then between them an eighth of it each."""
    inside = min(gpus, PER_NODE)
    nodes = -(-gpus // PER_NODE)
    seconds = 2 * (inside - 1) / inside * size / NVLINK
    return seconds + 2 * (nodes - 1) / nodes * size / inside / NETWORK + 2 * (nodes - 1) * HOP


def rate_of(m: GPTConfig, anchor: float) -> float:
    """Tokens/s at the MFU that ``anchor`` is for GPT-2 124M."""
    return anchor * PRESETS["gpt2"].flops_per_token / m.flops_per_token


def table(preset: str, gpus: list[int], anchor: float) -> str:
    m, tokens = PRESETS[preset], RECIPES[preset].get("tokens_per_step", 2**19)
    lines = [
        "| GPUs | rows a GPU | compute ms | reduce ms | update ms | step ms "
        "| with overlap | tokens/s | efficiency |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    one = predict(m, tokens, 1, rate_of(m, anchor)).overlapped
    for s in (predict(m, tokens, n, rate_of(m, anchor)) for n in gpus):
        parts = " | ".join(f"{1000 * t:,.1f}" for t in (s.compute, s.reduce, s.update, s.seconds, s.overlapped))
        share = one / s.gpus / s.overlapped
        lines.append(
            f"| {s.gpus} | {s.rows:g} | {parts} | {s.tokens / s.overlapped / 1e6:,.2f} M | {100 * share:.0f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="predicted step time on many GPUs")
    parser.add_argument("--preset", choices=PRESETS, default="gpt2")
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--tokens-per-second", type=float, default=ANCHOR, help="GPT-2 124M on one GPU [488000]")
    args = parser.parse_args()
    print(table(args.preset, args.gpus, args.tokens_per_second))


if __name__ == "__main__":
    main()
