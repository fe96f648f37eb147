"""From token shards to rows of training data, in an order that is a pure function of (seed, epoch).

Epoch e permutes the shards and, inside each shard, the documents. The permuted shard is one stream of n
tokens, cut into (n - 1) // block_size rows of block_size + 1 tokens: a row's last token is the first of the
row behind it, so that every token is a target once an epoch; the tail of a shard that fills no row is dropped.
The rows of a shard are permuted too, or a batch would be little more than one book where documents are long.
Row g of the whole run is found by arithmetic: there is no state to save, and resuming is a seek.

Permutations come from numpy's SeedSequence and raw Philox numbers, which numpy promises never to change.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from aymen_gpt.data.shards import (
    CHUNK,
    MANIFEST,
    finished_manifest,
    list_shards,
    open_shard,
    read_document_sources,
    way_out,
)
from aymen_gpt.data.tokenizer import EOT
from aymen_gpt.errors import DataError

KEPT = 2  # shards whose tokens (mapped) and document order (in memory) are kept at hand


@dataclass(frozen=True)
class DocumentRead:
    """What one row reads of one document."""

    row: int  # row of the run
    shard: str  # file name
    document: int  # number in the shard, from 0
    start: int  # first token read, counted from the document's own start (its separator)
    tokens: int
    id: str | None  # as the source named it, None when nobody recorded it
    url: str | None


@dataclass(frozen=True)
class _Order:
    """The D documents and R rows of one shard in the order of one epoch."""

    documents: np.ndarray  # (D,) their numbers in the shard
    begins: np.ndarray  # (D,) where each begins in the shard
    bounds: np.ndarray  # (D + 1,) where each begins in the epoch's stream, and the stream's end
    rows: np.ndarray  # (R,) which row of the stream is read first, second, ...


class TokenRows:
    """Rows of block_size + 1 tokens, in an order that is a pure function of (seed, epoch).

    ``seed`` None keeps the order of the files, as validation does. DataError when there are no shards, not
    all of them yet, or too few tokens for one row.
    """

    def __init__(self, folder: Path, split: str, *, block_size: int, seed: int | None) -> None:
        self.block_size = block_size
        self.seed = seed
        finished_manifest(folder)  # or it says that there is more to come
        self.paths = list_shards(folder, split)
        if not self.paths:
            raise DataError(f"no {split} shards in {folder}: {self._way_out(folder, split)}")
        lengths = np.array([len(open_shard(path)) for path in self.paths])
        self.n_tokens = int(lengths.sum())
        self._shard_rows = (lengths - 1) // block_size
        self.rows_per_epoch = int(self._shard_rows.sum())
        if self.rows_per_epoch == 0:
            name = {"val": "validation", "train": "training"}[split]
            where = f" in the largest of its {len(lengths)} shards" if len(lengths) > 1 else ""
            raise DataError(
                f"{name} needs at least {block_size + 1} tokens, {folder} has {lengths.max()}{where}: "
                "prepare more text, or lower --block-size"
            )
        self._tokens = lru_cache(KEPT)(self._map)
        self._begins = lru_cache(KEPT)(self._find_documents)
        self._order = lru_cache(KEPT)(self._order_documents)
        self._sources = lru_cache(KEPT)(
            lambda shard: read_document_sources(self.paths[shard], len(self._begins(shard)))
        )

    @staticmethod
    def _way_out(folder: Path, split: str) -> str:
        """What to do when a folder has no shards of a split."""
        if (folder / MANIFEST).exists():
            return way_out(folder)
        if others := list_shards(folder, {"val": "train", "train": "val"}[split]):
            name = re.sub(r"(train|val)(_\d{6})?\.(\w+)$", rf"{split}_000000.\3", others[0].name)
            return f"rename one of its files to {name}"
        source = " --source builtin" if folder.name == "builtin" else ""
        out = "" if str(folder) == "edu_fineweb10B" else f"{source} --out {folder}"
        return f"run python fineweb.py{out} first"

    def rows(self, start: int, count: int) -> np.ndarray:
        """Rows start to start + count of the run, over as many epochs as it takes.

        (count, block_size + 1) uint16; row[:-1] is the input, row[1:] the target.
        """
        out = np.empty((count, self.block_size + 1), np.uint16)
        for row, (epoch, shard, place) in zip(out, self._places(start, count), strict=True):
            tokens, filled = self._tokens(shard), 0
            for _, begin, end in self._pieces(epoch, shard, place):
                row[filled : filled + end - begin] = tokens[begin:end]
                filled += end - begin
        return out

    def documents(self, start: int, count: int) -> list[DocumentRead]:
        """Which documents the rows start to start + count read, in reading order.

        DataError when the table that names the documents of a shard is damaged.
        """
        reads = []
        for row, (epoch, shard, place) in enumerate(self._places(start, count), start):
            sources = self._sources(shard)
            for number, begin, end in self._pieces(epoch, shard, place):
                id, url = sources[number] if sources else (None, None)
                offset = begin - int(self._begins(shard)[number])
                name = self.paths[shard].name
                reads.append(DocumentRead(row, name, number, offset, end - begin, id, url))
        return reads

    def _places(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(epoch, shard, row of the shard's stream) of each row of the request."""
        row, stop = start, start + count
        while row < stop:
            epoch, row_of_epoch = divmod(row, self.rows_per_epoch)
            order = self._permutation(len(self.paths), epoch)
            ends = np.cumsum(self._shard_rows[order])
            place = int(np.searchsorted(ends, row_of_epoch, side="right"))
            shard, left = int(order[place]), int(ends[place]) - row_of_epoch
            first, n_rows = int(self._shard_rows[shard]) - left, min(left, stop - row)
            for place in self._order(epoch, shard).rows[first : first + n_rows].tolist():
                yield epoch, shard, place
            row += n_rows

    def _pieces(self, epoch: int, shard: int, place: int) -> Iterator[tuple[int, int, int]]:
        """(document, begin, end in the shard): what one row of the shard's stream reads."""
        order = self._order(epoch, shard)
        start, stop = place * self.block_size, (place + 1) * self.block_size + 1
        a = int(np.searchsorted(order.bounds, start, side="right")) - 1
        b = int(np.searchsorted(order.bounds, stop, side="left"))
        bounds = order.bounds[a : b + 1].tolist()
        places = zip(order.documents[a:b].tolist(), order.begins[a:b].tolist(), strict=True)
        for i, (document, begin) in enumerate(places):
            from_start, to_stop = max(start, bounds[i]), min(stop, bounds[i + 1])
            yield document, begin + from_start - bounds[i], begin + to_stop - bounds[i]

    def _map(self, shard: int) -> np.ndarray:
        return np.asarray(open_shard(self.paths[shard]))

    def _find_documents(self, shard: int) -> np.ndarray:
        """(D,) where the documents of a shard begin: at each separator, and at 0 if it begins inside one."""
        tokens = self._tokens(shard)
        chunks = range(0, len(tokens), CHUNK)
        found = np.concatenate([np.flatnonzero(tokens[i : i + CHUNK] == EOT) + i for i in chunks])
        return found if len(found) and found[0] == 0 else np.concatenate([[0], found])

    def _order_documents(self, epoch: int, shard: int) -> _Order:
        begins = self._begins(shard)
        lengths = np.diff(begins, append=len(self._tokens(shard)))
        documents = self._permutation(len(begins), epoch, shard)
        bounds = np.concatenate([[0], np.cumsum(lengths[documents])])
        rows = self._permutation(int(self._shard_rows[shard]), epoch, shard, 1)
        return _Order(documents, begins[documents], bounds, rows)

    def _permutation(self, n: int, *key: int) -> np.ndarray:
        """(n,) a permutation of range(n), a pure function of the seed and the key; in order without a seed."""
        if self.seed is None:
            return np.arange(n)
        draws = np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=key)).random_raw(n)
        return np.argsort(draws, kind="stable")


def deal(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """The (start, count) of one rank's contiguous share of ``count`` rows: 512 over 3 is 171, 171, 170."""
    share, extra = divmod(count, world_size)
    return rank * share + min(rank, extra), share + (rank < extra)
