"""How fast rows of tokens come, and how little memory and waiting they cost.

    python benchmarks/loader.py [--tokens 100_000_000] [--rounds 5] [--json FILE]

Writes two shards of random tokens in documents of about 1,000 into a temporary folder and reads them as training
does, on one core. Claims measured: tokens/s of the loader alone (pages cached), the time to the first batch of a
shard not yet seen by the process, the time of a seek to a random step, and the memory that is the process's own.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from aymen_gpt.commands.options import whole_number
from aymen_gpt.data.loader import TokenRows
from aymen_gpt.data.shards import shard_name, write_shard

BATCHES = {"64 x 1,024": (64, 1024), "16 x 256": (16, 256)}


def make(folder: Path, tokens: int) -> None:
    rng = np.random.default_rng(0)
    for index in (1, 2):
        ids = rng.integers(0, 50256, tokens, dtype=np.uint16)
        ids[rng.integers(0, tokens, tokens // 1000)] = 50256
        write_shard(folder / shard_name("train", index), ids)


def own_memory() -> float:
    """Memory of this process that is not a file's pages, in MB (Linux)."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


def measure(folder: Path, rows: int, block_size: int, results) -> None:
    """One round in a fresh process: seconds to the first batch, tokens/s, seconds of a seek, own MB more."""
    before = own_memory()
    data = TokenRows(folder, "train", block_size=block_size, seed=int(time.time_ns()) % 2**32)
    began = time.perf_counter()
    data.rows(0, rows)
    first = time.perf_counter() - began
    steps, began = 100, time.perf_counter()
    for step in range(1, steps + 1):
        data.rows(step * rows, rows)
    rate = steps * rows * block_size / (time.perf_counter() - began)
    began = time.perf_counter()
    data.rows(data.rows_per_epoch * 3 // 4, rows)  # the other shard
    data.rows(data.rows_per_epoch * 1 // 4, rows)
    seek = (time.perf_counter() - began) / 2
    results.put((first, rate, seek, own_memory() - before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=whole_number, default=100_000_000, help="of one shard")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    found = {name: [] for name in BATCHES}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), options.tokens)
        for _ in range(options.rounds):
            for name, (rows, block_size) in BATCHES.items():
                results = spawn.Queue()
                process = spawn.Process(target=measure, args=(Path(folder), rows, block_size, results))
                process.start()
                found[name].append(results.get())
                process.join()
    print(f"Python {platform.python_version()}, numpy {np.__version__}, shards of {options.tokens:,} tokens,")
    print(f"medians of {options.rounds} fresh processes, one core")
    print(f"{'batch':<12}{'Mtokens/s':>12}{'first batch ms':>16}{'seek ms':>10}{'own memory MB':>15}")
    table = {}
    for name, rounds in found.items():
        first, rate, seek, memory = (statistics.median(values) for values in zip(*rounds, strict=True))
        table[name] = {"tokens_per_second": rate, "first_s": first, "seek_s": seek, "own_mb": memory}
        print(f"{name:<12}{rate / 1e6:>12.1f}{1000 * first:>16.0f}{1000 * seek:>10.1f}{memory:>15.1f}")
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
