"""The same work on many machines: each prepares one share of the source, and merging gives one machine's shards.

    python fineweb.py --part 2/8 ...    the second of eight shares -> DIR/parts/2-of-8, wherever DIR can be seen
    python fineweb.py --merge ...       all of them, with the same options -> DIR

Shares are contiguous and about equal in bytes. A slice of the source (slices.py) belongs to the share in which its
first byte lies; compressed files are not divided. A share is kept in bundles: Arrow files of the very batches that
workers (workers.py) hand to prepare.py, which writes the shards from them as it does from its own workers'.
"""

import functools
import re
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, fields, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aymen_gpt import files
from aymen_gpt.data import shards, sources
from aymen_gpt.data.prepare import Preparation, PrepareOptions, Progress, Report, check_options
from aymen_gpt.data.slices import COMPRESSED, Slice, Source, slices_of
from aymen_gpt.data.stream import Position, Totals
from aymen_gpt.data.workers import Batch
from aymen_gpt.errors import DataError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa


def share_folder(out: Path, number: int, count: int) -> Path:
    """Where the share ``number`` (from 1) of ``count`` is kept."""
    return out / "parts" / f"{number}-of-{count}"


class SharePreparation(Preparation):
    """The share ``number`` (from 1) of ``count``, as bundles in a folder of its own.

    Rows without usable text are judged when all shares are merged.
    """

    def __init__(self, options: PrepareOptions, number: int, count: int, report: Report) -> None:
        super().__init__(replace(options, out=share_folder(options.out, number, count)), report)
        self.no_text = options.out
        self.number, self.count = number, count

    def check_complete(self) -> None:
        self.check_source()

    def write(self) -> None:
        """Append bundles to the manifest, saving it with each, to the end of the share or of what any can need."""
        done, totals = self.manifest["shards"], Totals(**self.manifest["totals"])
        with closing(self.batches(self.position())) as batches:
            while totals.tokens < self.limit and (first := next(batches, None)) is not None:
                room = min(self.options.shard_tokens, self.limit - totals.tokens)
                done.append(
                    self._write_bundle(f"tokens_{len(done):06d}.arrow", chain([first], batches), room, totals)
                )
                self.manifest["totals"] = asdict(totals)
                self.save()
                self.drop_downloads(done[-1]["end"]["file"])

    def _write_bundle(self, name: str, batches: Iterator[Batch], room: int, totals: Totals) -> dict[str, Any]:
        """Fill one bundle until it has ``room`` tokens or more, counting them; its record for the manifest."""
        import pyarrow as pa

        schema, packed = _schema(), pa.ipc.IpcWriteOptions(compression="zstd")
        before, end = replace(totals), Position()
        with files.whole_file(self.out / name) as file, pa.ipc.new_file(file, schema, options=packed) as bundle:
            for batch in batches:
                row = vars(batch) | {"tokens": batch.tokens.tobytes()}
                bundle.write_batch(pa.RecordBatch.from_pylist([row], schema))
                totals.add(len(batch.tokens), batch.sizes)
                totals.skip(self.source.files[batch.file].name, batch.part, batch.skipped)
                end = Position(batch.file, batch.part + 1)
                fraction = self._place(batch.file, batch.fraction) - (self.number - 1)
                of_all = min(max(fraction, totals.tokens / self.limit), 1)
                self.report(Progress(totals, len(self.manifest["shards"]), of_all))
                if totals.tokens - before.tokens >= room:
                    break
        return {
            "file": name,
            "tokens": totals.tokens - before.tokens,
            "documents": totals.documents - before.documents,
            "sha256": files.sha256(self.out / name),
            "end": asdict(end),
        }

    def slices(self, position: Position) -> Iterator[Slice]:
        """The slices of the share from there on; only files that hold some of them are opened or downloaded."""
        for number in range(position.file, len(self.source.files)):
            packed = self.source.files[number].name.endswith(COMPRESSED)
            owner = self._owner(number, 0)
            if not owner <= self.number <= (owner if packed else self._owner(number, 1)):
                continue
            for slice in slices_of(self.source, number, self.bring(number)):
                if owner == self.number and (number, slice.part) >= (position.file, position.part):
                    yield slice
                if not packed:
                    owner = self._owner(number, slice.fraction)

    def _owner(self, file: int, fraction: float) -> int:
        """The number of the share that owns what stands behind this fraction of a file."""
        return min(int(self._place(file, fraction)) + 1, self.count)

    def _place(self, file: int, fraction: float) -> float:
        """Where this fraction of a file ends, in shares: 1.5 is the middle of the second."""
        before = self.bytes_before
        return (before[file] + fraction * self.source.files[file].bytes) * self.count / max(before[-1], 1)


class Merge(Preparation):
    """The shards of the whole source, from its finished shares: neither the source nor the network is read.

    DataError names shares that are missing, unfinished or damaged.
    """

    to_restart = "the commands with --part again, each with --restart, and then this one with --restart"

    @functools.cached_property
    def finished(self) -> list[tuple[Path, dict[str, Any]]]:
        """Folder and manifest of every share, in order. DataError unless all are finished and fit together."""
        folder = self.out / "parts"
        names = [re.fullmatch(r"\d+-of-(\d+)", path.name) for path in folder.glob("*-of-*")]
        counts = sorted({int(name[1]) for name in names if name})
        if not counts:
            again = "run python fineweb.py --part 1/N to N/N with the same options"
            raise DataError(f"{folder} holds no parts: {again}")
        if len(counts) > 1:
            raise DataError(f"{folder} holds parts of {counts[0]} and of {counts[1]}: delete those not wanted")
        finished, missing = [], []
        for number in range(1, counts[0] + 1):
            share = share_folder(self.out, number, counts[0])
            manifest = shards.read_manifest(share)
            if manifest and manifest["complete"]:
                finished.append((share, manifest))
            else:
                missing.append(f"{number}/{counts[0]}")
        if missing:
            raise DataError(
                f"parts {', '.join(missing)} of {self.out} are not finished: "
                f"run python fineweb.py --part {missing[0]} with the same options"
            )
        for share, manifest in finished:
            check_options(replace(self.options, out=share), manifest)
            for key in ("source", "tokenizer", "encoder"):
                if manifest[key] != finished[0][1][key]:
                    raise DataError(f"{share} has another {key} than {finished[0][0]}: delete one of them")
        return finished

    def check_complete(self) -> None:
        shards.check_shards(self.out)

    def open_source(self, *, to_repair: bool = False) -> Source:
        record = self.finished[0][1]["source"]
        if self.manifest and self.manifest["source"] != record:
            raise UsageError(f"{self.out} was begun with other files than its parts: take another --out")
        return sources.from_record(record)

    def val_tokens(self) -> int:
        return int(self.finished[0][1]["shard_tokens"]["val"])

    def choose_encoder(self) -> None:
        self.manifest["encoder"] = self.finished[0][1]["encoder"]

    def batches(self, position: Position) -> Generator[Batch, None, None]:
        for folder, manifest in self.finished:
            for record in manifest["shards"]:
                if (record["end"]["file"], record["end"]["part"]) > (position.file, position.part):
                    batches = _read_bundle(folder / record["file"], record["sha256"])
                    yield from (b for b in batches if (b.file, b.part) >= (position.file, position.part))


def _read_bundle(path: Path, sha256: str) -> Iterator[Batch]:
    """The batches of a bundle, as ``workers.tokenize`` made them. DataError when it is missing or damaged."""
    import pyarrow as pa

    if path.suffix != ".arrow" or not path.is_file() or files.sha256(path) != sha256:
        share = path.parent.name.replace("-of-", "/")
        again = f"delete {path.parent} and run python fineweb.py --part {share} with the same options"
        raise DataError(f"{path} is missing or damaged: {again}")
    with path.open("rb") as file, pa.ipc.open_file(file) as bundle:
        for number in range(bundle.num_record_batches):
            (row,) = bundle.get_batch(number).to_pylist()
            yield Batch(**row | {"tokens": np.frombuffer(row["tokens"], np.uint16)})


def _schema() -> "pa.Schema":
    """A bundle's columns: the fields of Batch. A batch is one row; tokens are uint16, little-endian."""
    import pyarrow as pa

    number, numbers, words = pa.int64(), pa.list_(pa.int64()), pa.list_(pa.string())
    skipped = pa.map_(number, pa.string())
    types = number, number, pa.float64(), pa.large_binary(), numbers, numbers, numbers, words, words, skipped
    return pa.schema(zip((field.name for field in fields(Batch)), types, strict=True))
