"""The tokens of a source as one stream that knows where in the source it stands and what it has counted."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from aymen_gpt.data.slices import Slice
from aymen_gpt.data.sources import NAMED, Source
from aymen_gpt.data.workers import Batch


@dataclass(frozen=True)
class Position:
    """A place in the source: so many files, slices of the next, rows of it and tokens of the next row."""

    file: int = 0
    slice: int = 0
    row: int = 0
    token: int = 0

    @classmethod
    def of(cls, place: dict[str, int]) -> "Position":
        """The position that a manifest keeps. A slice is called a part there."""
        return cls(place["file"], place["part"], place["row"], place["token"])

    def record(self) -> dict[str, int]:
        return {"file": self.file, "part": self.slice, "row": self.row, "token": self.token}


@dataclass
class Totals:
    """What has become tokens so far; a document counts when its first token does."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0  # of UTF-8 text
    skipped: dict[str, int] = field(default_factory=dict)  # rows without usable text, by reason
    bad: dict[str, str] = field(default_factory=dict)  # file: its first row that is not merely empty, and why

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> "Totals":
        return cls(**{f.name: manifest["totals"][f.name] for f in fields(cls) if f.name in manifest["totals"]})


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens for a shard, and the ids and urls of the documents they belong to."""

    tokens: np.ndarray
    ids: list[str | None]
    urls: list[str | None]


class TokenStream:
    """The source from a position on, as one stream of tokens that knows where it is and what it has counted."""

    def __init__(self, source: Source, batches: Iterator[Batch], position: Position, totals: Totals) -> None:
        self.position = position  # of the next token
        self.totals = totals
        self.slice: Slice | None = None  # the newest one seen
        self._source = source
        self._batches = batches
        self._batch: Batch | None = None
        self._used = position.token  # tokens of the batch that are taken
        self._told = 0  # its skipped rows that are counted

    def take(self, n: int) -> Piece | None:
        """The next tokens, at least one and at most ``n``; None at the end of the source."""
        batch = self._current()
        if batch is None:
            return None
        start, stop = self._used, min(self._used + n, len(batch.tokens))
        first = int(np.searchsorted(batch.bounds, start, side="right")) - 1
        end = int(np.searchsorted(batch.bounds, stop, side="left"))  # documents first to end have tokens here
        new = first if start == batch.bounds[first] else first + 1
        self.totals.tokens += stop - start
        self.totals.documents += end - new
        self.totals.bytes += sum(batch.sizes[new:end])
        self._used = stop
        cut = 0 if stop == batch.bounds[end] else stop - int(batch.bounds[end - 1])
        row = batch.rows[end - 1] + (cut == 0)
        self.position = Position(batch.slice.file, batch.slice.index, row, cut)
        self._count_skipped(batch, row)
        return Piece(batch.tokens[start:stop], batch.ids[first:end], batch.urls[first:end])

    def ended(self) -> bool:
        return self._current() is None

    def _current(self) -> Batch | None:
        """The batch that has the next token; None at the end of the source."""
        while self._batch is None or self._used >= len(self._batch.tokens):
            if self._batch is not None:
                self._count_skipped(self._batch, None)
                self._used, self._told = 0, 0
            self._batch = next(self._batches, None)
            if self._batch is None:
                if self.slice is not None:  # behind the skipped rows at the end, which are counted now
                    self.position = Position(self.slice.file, self.slice.index + 1)
                return None
            self.slice = self._batch.slice
        return self._batch

    def _count_skipped(self, batch: Batch, before_row: int | None) -> None:
        for row, reason in batch.skipped[self._told :]:
            if before_row is not None and row >= before_row:
                return
            self._told += 1
            self.totals.skipped[reason] = self.totals.skipped.get(reason, 0) + 1
            name = self._source.files[batch.slice.file].name
            if reason != "empty" and len(self.totals.bad) < NAMED:
                self.totals.bad.setdefault(name, f"slice {batch.slice.index}, row {row}: {reason}")
