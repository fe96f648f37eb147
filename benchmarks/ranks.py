"""What it costs to train with several processes, and what they send one another.

    python benchmarks/ranks.py --data data/edu-mini                  # 1 and 2 processes
    python benchmarks/ranks.py --data data/edu-mini --against 468df47    # in turns with another commit

A round trains --steps steps of a preset in new processes, one way after the other; a way's time is the median over
the rounds of a step's median seconds. Then it counts, for gpt2 on 8 ranks, the collectives of a step with two
micro-batches, and the bytes each takes from a rank: no other process is started for it, the group is fake.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aymen_gpt.model.gpt import GPT, PRESETS
from aymen_gpt.training import sharding
from aymen_gpt.training.distributed import Ranks

ROOT = Path(__file__).parent.parent


@contextmanager
def checkout(commit: str | None) -> Iterator[Path | None]:
    """A folder with the code of another commit, for as long as it is needed."""
    if commit is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", folder, commit], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


def step_seconds(code: Path, processes: int, options: list[str], threads: int) -> float:
    """The median of a run's steps but the first three."""
    with tempfile.TemporaryDirectory() as folder:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        words = [
            *(start if processes > 1 else []),
            str(code / "pretrain.py"),
            *options,
            "--run-dir",
            f"{folder}/run",
        ]
        env = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": str(threads)}
        subprocess.run([sys.executable, *words], env=env, check=True, capture_output=True)
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    return statistics.median(row["step_seconds"] for row in map(json.loads, lines[4:]))


class Collectives(TorchDispatchMode):
    """The bytes that each call of a collective takes from a rank, by its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: dict[str, list[int]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d":
            sizes = [t.nbytes for t in tree_leaves(args) if isinstance(t, Tensor)]
            self.taken.setdefault(op.__name__.partition(".")[0], []).append(max(sizes))
        return op(*args, **(kwargs or {}))


def collectives(preset: str, world_size: int, shard: int) -> dict[str, list[int]]:
    """Of a step with two micro-batches of one row; see Collectives."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    place, loss = torch.device("cpu"), lambda hidden, weight: (hidden @ weight.T).sum()
    try:
        model = sharding.shard(GPT(PRESETS[preset]), shard, Ranks(0, world_size, 0, world_size), place)
        with Collectives() as counted:
            for last in (False, True):
                sharding.accumulate(model, last=last)
                model(torch.zeros(1, 64, dtype=torch.int64), head=loss).backward()
    finally:
        dist.destroy_process_group()
    return counted.taken


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="folder of token shards")
    p.add_argument("--preset", default="demo", help="[demo]")
    p.add_argument("--steps", type=int, default=15, help="of a run [15]")
    p.add_argument("--rounds", type=int, default=5, help="[5]")
    p.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="[1 2]")
    p.add_argument("--against", metavar="COMMIT", help="run each with this commit too")
    args = p.parse_args()
    options = f"--preset {args.preset} --steps {args.steps} --val-tokens 1024 --hellaswag-every 0".split()
    options += ["--data", str(Path(args.data).resolve())]
    cores = os.cpu_count() or 1
    with checkout(args.against) as other:
        codes = {"here": ROOT} | ({args.against: other} if other else {})
        ways = {
            (n, name): partial(step_seconds, code, n, options, max(cores // n, 1))
            for n in args.processes
            for name, code in codes.items()
        }
        found: dict[Any, list[float]] = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, measure in ways.items():
                found[way].append(measure())
                print(*way, f"{1000 * found[way][-1]:.0f} ms", file=sys.stderr)
    print(f"| processes | code | ms a step, median of {args.rounds} | times {args.against or 'here'} |")
    print("|---|---|---|---|")
    for (n, name), seconds in found.items():
        base = found[n, args.against or "here"]
        ratio = statistics.median(a / b for a, b in zip(seconds, base, strict=True))
        print(f"| {n} | {name} | {1000 * statistics.median(seconds):.0f} | {ratio:.2f} |")
    weights = 4 * sum(p.numel() for p in GPT(PRESETS["gpt2"]).parameters())
    print(f"\ngpt2 on 8 ranks: {weights / 1e6:,.0f} MB of weights")
    for shard in (1, 8):
        for kind, sizes in collectives("gpt2", 8, shard).items():
            print(f"--shard {shard}: {len(sizes)} x {kind.strip('_')}, {sum(sizes) / 1e6:,.0f} MB in all")


if __name__ == "__main__":
    main()
