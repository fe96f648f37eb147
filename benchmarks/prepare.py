"""How fast text becomes shards, against the same work done one document at a time.

Claim: from parquet in to shards on the disk, `fineweb.py` is at least 7 times as fast as the program it replaces,
and 1.6 times with tiktoken alone, in bounded memory.

    python benchmarks/prepare.py                          the built-in corpus
    python benchmarks/prepare.py DIR --megabytes 200      the first 200 MB of text in DIR's parquet files

The program it replaces is written here again, in `original`: a pool of half the processors takes documents
one at a time (imap, chunksize 16), tiktoken makes a list of ids, NumPy an array with the separator in front,
and the parent copies it into the buffer of a shard, which np.save writes. Every measurement is a process of its
own, timed from outside, start-up included. The methods take turns (A B C A B C ...), so that whatever else
the machine does falls on all of them; a ratio compares neighbours of one round, and the MB per second of CPU time
(start-up and all processes included) hardly depends on the load. Peak memory is the sum over all processes of a
method, watched in a run that is not timed (Linux only).
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aymen_gpt.data import builtin, tokenizer
from aymen_gpt.data.prepare import Preparation, PrepareOptions

SHARD_TOKENS = 100_000_000  # the default of both programs
GROUP = 1000  # rows in a row group, as in FineWeb-Edu's files
METHODS = {
    "original": None,
    "tiktoken, 1 worker": ("tiktoken", 1),
    "tiktoken, 2 workers": ("tiktoken", 2),
    "gigatoken, 1 worker": ("gigatoken", 1),
    "gigatoken, 2 workers": ("gigatoken", 2),
}


def original(text: Path, out: Path) -> None:
    """Tokenize one document at a time into .npy shards."""
    out.mkdir()
    tokenizer.gpt2()  # before the processes are forked
    buffer, used, n_shards = np.empty(SHARD_TOKENS, np.uint16), 0, 0
    with multiprocessing.Pool(max(1, (os.cpu_count() or 1) // 2)) as pool:
        for ids in pool.imap(ids_of, documents(text), chunksize=16):
            while used + len(ids) >= SHARD_TOKENS:
                room = SHARD_TOKENS - used
                buffer[used:] = ids[:room]
                np.save(out / f"shard_{n_shards:06d}.npy", buffer)
                ids, used, n_shards = ids[room:], 0, n_shards + 1
            buffer[used : used + len(ids)] = ids
            used += len(ids)
    np.save(out / f"shard_{n_shards:06d}.npy", buffer[:used])


def ids_of(document: dict[str, str]) -> np.ndarray:
    ids = np.array([tokenizer.EOT, *tokenizer.gpt2().encode_ordinary(document["text"])])
    assert 0 <= ids.min() <= ids.max() < 2**16
    return ids.astype(np.uint16)


def documents(text: Path) -> Iterator[dict[str, str]]:
    for batch in pq.ParquetFile(text).iter_batches(GROUP, columns=["text"]):
        yield from batch.to_pylist()


def ours(text: Path, out: Path, encoder: Any, workers: int) -> None:
    options = PrepareOptions((str(text),), out, SHARD_TOKENS, workers=workers, encoder=encoder)
    Preparation(options, lambda event: None).run()


def take(source: Path, megabytes: float, target: Path) -> int:
    """Copy the first texts, with their ids and urls, into one file; returns their bytes."""
    n_bytes, tables = 0, []
    for path in [source] if source.is_file() else sorted(source.rglob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(100, columns=["text", "id", "url"]):
            if n_bytes < megabytes * 1e6:
                tables.append(batch)
                n_bytes += sum(len(text.encode()) for text in batch.column("text").to_pylist())
    if not tables:
        sys.exit(f"{source} holds no parquet files with columns text, id and url")
    pq.write_table(pa.Table.from_batches(tables), target, compression="zstd", row_group_size=GROUP)
    return n_bytes


def tokens_of(out: Path) -> tuple[int, str]:
    """How many tokens the shards hold, validation first, and their sha256."""
    n_tokens, digest = 0, hashlib.sha256()
    for path in sorted(out.glob("*.bin"), key=lambda path: path.name[-10:]) or sorted(out.glob("*.npy")):
        tokens = np.load(path) if path.suffix == ".npy" else np.fromfile(path, "<u2", offset=1024)
        n_tokens += len(tokens)
        digest.update(tokens.data)
    return n_tokens, digest.hexdigest()


def run(method: str, text: Path, out: Path, *, watch: bool = False) -> tuple[float, float, float]:
    """Seconds that a fresh process takes for it, on the clock and of all processors together, and its peak MB.

    The last, of it and its workers together, is 0 unless they are watched, which takes time.
    """
    before, began, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, __file__, "--run", method, str(text), str(out)])
    while watch and process.poll() is None:
        peak = max(peak, sum(map(memory, family(process.pid))))
        time.sleep(0.02)
    if process.wait():
        sys.exit(f"{method} failed")
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak / 1e6


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(member for child in children for member in family(int(child)))]


def memory(pid: int) -> int:
    """The bytes of a process, what it shares divided by those who share it."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def measure(source: Path, megabytes: float, rounds: int) -> dict[str, Any]:
    """Seconds of every method in every round, and what does not change from round to round."""
    peaks, found = {}, {}
    seconds: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        text, out = Path(folder) / "text.parquet", Path(folder) / "out"
        n_bytes = take(source, megabytes, text)
        for method in METHODS:  # not timed; the files come into memory
            *_, peaks[method] = run(method, text, out, watch=True)
            found[method] = tokens_of(out)
            shutil.rmtree(out)
        for round, method in itertools.product(range(rounds), METHODS):
            seconds[method].append(run(method, text, out)[:2])
            shutil.rmtree(out)
            print(f"round {round + 1}: {method}, {seconds[method][-1][0]:.2f} s", file=sys.stderr)
    assert len(set(found.values())) == 1, f"the methods disagree: {found}"
    from aymen_gpt.training.device import cpu_name  # here, as torch would slow the start of each method

    machine = {"processor": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()}
    versions = {name: version(name) for name in ("gigatoken", "tiktoken", "pyarrow", "numpy")}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "versions": {"python": platform.python_version()} | versions,
        "bytes": n_bytes,
        "tokens": found["original"][0],
        "seconds": seconds,
        "peak_mb": peaks,
    }


def table(result: dict[str, Any]) -> str:
    """The result in Markdown. Rates are medians; a ratio is the median, least and greatest of the rounds."""
    lines = [
        "| method | MB/s | M tokens/s | times the original | MB per CPU second | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    seconds = result["seconds"]
    for method, taken in seconds.items():
        ratios = [before / after for (before, _), (after, _) in zip(seconds["original"], taken, strict=True)]
        clock, processors = (1e6 * statistics.median(column) for column in zip(*taken, strict=True))
        cells = [
            method,
            f"{result['bytes'] / clock:.1f}",
            f"{result['tokens'] / clock:.1f}",
            f"{statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f})",
            f"{result['bytes'] / processors:.1f}",
            f"{result['peak_mb'][method]:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    machine, rounds = result["machine"], len(seconds["original"])
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return f"""\
{result["date"]}, {machine["processor"]}, {machine["cores"]} cores, {machine["system"]}; {versions}.
{result["bytes"] / 1e6:.0f} MB of text, {result["tokens"] / 1e6:.1f}M tokens, {rounds} rounds; all ids are equal.

{chr(10).join(lines)}"""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "source", nargs="?", type=Path, help="parquet file or folder (default: the built-in corpus, 11 MB)"
    )
    p.add_argument("--megabytes", type=float, default=100, help="text to prepare (default: 100)")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--json", type=Path, help="write the numbers here too")
    args = p.parse_args()
    result = measure(args.source or builtin.build(), args.megabytes, args.rounds)
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        method, text, out = sys.argv[2:]
        chosen = METHODS[method]
        original(Path(text), Path(out)) if chosen is None else ours(Path(text), Path(out), *chosen)
    else:
        main()
