"""The same work on many machines: each prepares one share of the source, and merging gives one machine's shards.

    python fineweb.py --part 2/8 ...    the second of eight shares -> DIR/parts/2-of-8, wherever DIR can be seen
    python fineweb.py --merge ...       all of them, with the same options -> DIR

Shares are contiguous and about equal in bytes. A slice of the source (slices.py) belongs to the share in which its
first byte lies; compressed files are not divided. A share is kept in bundles: the tokens of whole slices in
llm.c's format, and a parquet table with all their rows, one row group for a slice. Read again they are the very
batches that workers hand to prepare.py, which writes the shards from them as it does from its own workers'.
"""

import functools
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aymen_gpt import files
from aymen_gpt.data import shards, sources
from aymen_gpt.data.prepare import Preparation, PrepareOptions, Progress, Report, Summary, check_options
from aymen_gpt.data.slices import COMPRESSED, Slice, slices_of
from aymen_gpt.data.sources import Source
from aymen_gpt.data.stream import Position, Totals
from aymen_gpt.data.workers import Batch
from aymen_gpt.errors import DataError, UsageError

if TYPE_CHECKING:
    import pyarrow.parquet as pq

FOLDER = "parts"  # in the output folder


@dataclass(frozen=True)
class Share:
    """One of ``count`` contiguous shares of a source."""

    number: int  # from 1
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def folder(self, out: Path) -> Path:
        return out / FOLDER / f"{self.number}-of-{self.count}"


def parse(text: str) -> Share:
    """
    >>> parse("2/8")
    Share(number=2, count=8)
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--part is I/N, the I-th of N from 1/N to N/N; got {text}")
    return Share(int(match[1]), int(match[2]))


def prepare_share(options: PrepareOptions, share: Share, report: Report) -> Summary:
    """Bring one share of ``options.out`` to completion, from wherever an earlier call left it.

    Errors as ``prepare.prepare``; rows without usable text are judged when all shares are merged.
    """
    return SharePreparation(options, share, report).run()


def merge(options: PrepareOptions, report: Report) -> Summary:
    """Write into ``options.out`` the shards that ``prepare.prepare`` would, from its finished shares.

    It can be killed and continued as that can. DataError names shares that are missing, unfinished or damaged.
    """
    return Merge(options, report).run()


class SharePreparation(Preparation):
    """One share of the source, as bundles in a folder of its own."""

    def __init__(self, options: PrepareOptions, share: Share, report: Report) -> None:
        super().__init__(replace(options, out=share.folder(options.out)), report)
        self.no_text = options.out
        self.share = share

    def check_complete(self) -> None:
        self.check_source()

    def write(self) -> None:
        """Append bundles to the manifest, saving it with each, until the share or max_tokens is exhausted."""
        done, totals = self.manifest["shards"], Totals.of(self.manifest)
        begin = Position.of(done[-1]["end"]) if done else Position()
        limit = self.options.max_tokens or 2**63  # no share needs more, whatever stands before it

        def tell(batch: Batch) -> None:
            totals.tokens += len(batch.tokens)
            totals.documents += len(batch.rows)
            totals.bytes += sum(batch.sizes)
            for _, reason in batch.skipped:
                totals.skipped[reason] = totals.skipped.get(reason, 0) + 1
            fraction = self._place(batch.slice.file, batch.slice.fraction) - (self.share.number - 1)
            self.report(Progress(totals, len(done), min(max(fraction, totals.tokens / limit), 1)))

        with closing(self.batches(begin)) as batches:
            while totals.tokens < limit and (first := next(batches, None)) is not None:
                room = min(self.options.shard_tokens, limit - totals.tokens)
                path = self.out / f"tokens_{len(done):06d}.bin"
                done.append(_write_bundle(path, chain([first], batches), room, tell))
                self.manifest["totals"] = asdict(totals)
                self.save()
                self.drop_downloads(done[-1]["end"]["file"])

    def slices(self, position: Position) -> Iterator[Slice]:
        """The slices of the share from there on; only files that hold some of them are opened or downloaded."""
        for number in range(position.file, len(self.source.files)):
            packed = self.source.files[number].name.endswith(COMPRESSED)
            owner = self._owner(number, 0)
            if not owner <= self.share.number <= (owner if packed else self._owner(number, 1)):
                continue
            for slice in slices_of(self.source, number, self.bring(number)):
                if owner == self.share.number and (number, slice.index) >= (position.file, position.slice):
                    yield slice
                if not packed:
                    owner = self._owner(number, slice.fraction)

    def _owner(self, file: int, fraction: float) -> int:
        """The number of the share that owns what stands behind this fraction of a file."""
        return min(int(self._place(file, fraction)) + 1, self.share.count)

    def _place(self, file: int, fraction: float) -> float:
        """Where this fraction of a file ends, in shares: 1.5 is the middle of the second."""
        before = self.bytes_before
        return (before[file] + fraction * self.source.files[file].bytes) * self.share.count / max(before[-1], 1)


class Merge(Preparation):
    """The shards of the whole source, from its finished shares: neither the source nor the network is read."""

    to_restart = "the commands with --part again, each with --restart, and then this one with --restart"

    @functools.cached_property
    def finished(self) -> "list[Finished]":
        return _finished_shares(self.options)

    def check_complete(self) -> None:
        shards.check_shards(self.out)

    def open_source(self, *, to_repair: bool = False) -> Source:
        record = self.finished[0].manifest["source"]
        if self.manifest and self.manifest["source"] != record:
            raise UsageError(f"{self.out} was begun with other files than its parts: take another --out")
        return sources.from_record(record)

    def val_tokens(self) -> int:
        return int(self.finished[0].manifest["shard_tokens"]["val"])

    def choose_encoder(self) -> None:
        self.manifest["encoder"] = self.finished[0].manifest["encoder"]

    def batches(self, position: Position) -> Generator[Batch, None, None]:
        for share in self.finished:
            for record in share.manifest["shards"]:
                if (record["end"]["file"], record["end"]["part"]) > (position.file, position.slice):
                    yield from _read_bundle(share.folder / record["file"], record, position)


@dataclass(frozen=True)
class Finished:
    folder: Path
    manifest: dict[str, Any]


def _finished_shares(options: PrepareOptions) -> list[Finished]:
    """Every share, in order. DataError unless all are finished and fit together."""
    folder = options.out / FOLDER
    names = [path.name for path in folder.glob("*-of-*")] if folder.is_dir() else []
    counts = sorted({int(name.split("-of-")[1]) for name in names if re.fullmatch(r"\d+-of-\d+", name)})
    if not counts:
        raise DataError(f"{folder} holds no parts: run python fineweb.py --part 1/N to N/N with the same options")
    if len(counts) > 1:
        raise DataError(f"{folder} holds parts of {counts[0]} and of {counts[1]}: delete those not wanted")
    finished, missing = [], []
    for share in (Share(number, counts[0]) for number in range(1, counts[0] + 1)):
        manifest = shards.read_manifest(share.folder(options.out))
        if manifest and manifest["complete"]:
            finished.append(Finished(share.folder(options.out), manifest))
        else:
            missing.append(str(share))
    if missing:
        raise DataError(
            f"parts {', '.join(missing)} of {options.out} are not finished: "
            f"run python fineweb.py --part {missing[0]} with the same options"
        )
    _check_alike(options, finished)
    return finished


def _check_alike(options: PrepareOptions, finished: list[Finished]) -> None:
    for share in finished:
        check_options(replace(options, out=share.folder), share.manifest)
        for key in ("source", "tokenizer", "encoder"):
            if share.manifest[key] != finished[0].manifest[key]:
                raise DataError(f"{share.folder} has another {key} than {finished[0].folder}: delete one of them")


def rows_path(bundle: Path) -> Path:
    return bundle.with_suffix(".rows.parquet")


def _write_bundle(
    path: Path, batches: Iterator[Batch], room: int, tell: Callable[[Batch], None]
) -> dict[str, Any]:
    """Fill one bundle until it has ``room`` tokens or more; returns its record for the manifest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = [(name, pa.int64()) for name in ("file", "part", "row", "tokens", "bytes")]
    words = [(name, pa.string()) for name in ("id", "url", "skipped")]
    schema = pa.schema([*numbers, *words, ("fraction", pa.float64())])
    documents, end = 0, Position()

    def pieces(table: "pq.ParquetWriter") -> Iterator[np.ndarray]:
        nonlocal documents, end
        n_tokens = 0
        for batch in batches:
            if rows := _rows(batch):
                table.write_table(pa.Table.from_pylist(rows, schema), row_group_size=len(rows))
            n_tokens += len(batch.tokens)
            documents += len(batch.rows)
            end = Position(batch.slice.file, batch.slice.index + 1)
            tell(batch)
            yield batch.tokens
            if n_tokens >= room:
                return

    with files.whole_file(rows_path(path)) as file, pq.ParquetWriter(file, schema, compression="zstd") as table:
        n_tokens = shards.write_shard(path, pieces(table))
    hashes = {"sha256": files.sha256(path), "rows_sha256": files.sha256(rows_path(path))}
    return {"file": path.name, "tokens": n_tokens, "documents": documents} | hashes | {"end": end.record()}


def _rows(batch: Batch) -> list[dict[str, Any]]:
    """The rows of a batch, skipped ones among them, as the table keeps them."""
    part = {"file": batch.slice.file, "part": batch.slice.index, "fraction": batch.slice.fraction}
    lengths = np.diff(batch.bounds).tolist()
    columns = zip(batch.rows, lengths, batch.sizes, batch.ids, batch.urls, strict=True)
    rows = [
        part | {"row": row, "tokens": length, "bytes": size, "id": id, "url": url}
        for row, length, size, id, url in columns
    ]
    rows += [part | {"row": row, "tokens": 0, "bytes": 0, "skipped": reason} for row, reason in batch.skipped]
    return sorted(rows, key=itemgetter("row"))


def _read_bundle(path: Path, record: dict[str, Any], position: Position) -> Iterator[Batch]:
    """The batches of a bundle from a position on, as ``workers.tokenize`` made them."""
    import pyarrow.parquet as pq

    for file, key in ((path, "sha256"), (rows_path(path), "rows_sha256")):
        if not file.is_file() or files.sha256(file) != record[key]:
            again = (
                f"delete {path.parent} and run python fineweb.py --part {path.parent.name.replace('-of-', '/')}"
            )
            raise DataError(f"{file} is missing or damaged: {again} with the same options")
    tokens = shards.open_shard(path) if record["tokens"] else np.empty(0, np.uint16)
    table = pq.ParquetFile(rows_path(path))
    start = 0
    for group in range(table.num_row_groups):
        rows = table.read_row_group(group).to_pylist()
        stop = start + sum(row["tokens"] for row in rows)
        place = rows[0]["file"], rows[0]["part"]
        if place == (position.file, position.slice):
            rows = [row for row in rows if row["row"] >= position.row]
        if place >= (position.file, position.slice) and rows:
            yield _batch(rows, tokens[stop - sum(row["tokens"] for row in rows) : stop])
        start = stop


def _batch(rows: list[dict[str, Any]], tokens: np.ndarray) -> Batch:
    documents = [row for row in rows if row["skipped"] is None]
    return Batch(
        slice=Slice(rows[0]["file"], rows[0]["part"], Path(), 0, 0, None, rows[0]["fraction"]),
        tokens=tokens,
        bounds=np.cumsum([0, *(row["tokens"] for row in documents)]),
        rows=[row["row"] for row in documents],
        sizes=[row["bytes"] for row in documents],
        ids=[row["id"] for row in documents],
        urls=[row["url"] for row in documents],
        skipped=[(row["row"], row["skipped"]) for row in rows if row["skipped"] is not None],
    )
