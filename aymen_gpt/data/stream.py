"""The tokens of a source as one stream that knows where in the source it stands and what it has counted."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from aymen_gpt.data.slices import Source
from aymen_gpt.data.sources import NAMED
from aymen_gpt.data.workers import Batch


@dataclass(frozen=True)
class Position:
    """A place in the source: so many files, slices of the next, rows of that and tokens of the next row.

    A manifest keeps it under the same names.
    """

    file: int = 0
    part: int = 0
    row: int = 0
    token: int = 0


@dataclass
class Totals:
    """What has become tokens so far; a document counts when its first token does."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0  # of UTF-8 text
    skipped: dict[str, int] = field(default_factory=dict)  # rows without usable text, by reason
    bad: dict[str, str] = field(default_factory=dict)  # file: its first row that is not merely empty, and why

    def add(self, n_tokens: int, sizes: list[int]) -> None:
        """Count tokens, and the documents of these sizes that begin with them."""
        self.tokens += n_tokens
        self.documents += len(sizes)
        self.bytes += sum(sizes)

    def skip(self, file: str, part: int, rows: list[tuple[int, str]]) -> None:
        """Count (row, reason) without usable text of a slice."""
        for row, reason in rows:
            self.skipped[reason] = self.skipped.get(reason, 0) + 1
            if reason != "empty" and len(self.bad) < NAMED:
                self.bad.setdefault(file, f"slice {part}, row {row}: {reason}")


class TokenStream:
    """The source from a position on; ``batches`` begin with the slice of that position."""

    def __init__(self, source: Source, batches: Iterator[Batch], position: Position, totals: Totals) -> None:
        self.position = position  # of the next token
        self.totals = totals
        self.batch: Batch | None = None  # the newest one
        self._source = source
        self._batches = batches
        self._used = 0  # tokens of the batch that are taken
        self._told = 0  # its skipped rows that are counted

    def take(self, n: int) -> tuple[np.ndarray, list[str | None], list[str | None]] | None:
        """The next tokens, at least one and at most ``n``, and the ids and urls of their documents.

        None at the end of the source.
        """
        batch = None if self.ended() else self.batch
        if batch is None:
            return None
        start, stop = self._used, min(self._used + n, len(batch.tokens))
        first = bisect_right(batch.bounds, start) - 1
        end = bisect_left(batch.bounds, stop)  # documents first to end have tokens here
        self.totals.add(stop - start, batch.sizes[bisect_left(batch.bounds, start) : end])
        self._used = stop
        cut = 0 if stop == batch.bounds[end] else stop - batch.bounds[end - 1]
        self.position = Position(batch.file, batch.part, batch.rows[end - 1] + (cut == 0), cut)
        self._count_skipped(self.position.row)
        return batch.tokens[start:stop], batch.ids[first:end], batch.urls[first:end]

    def ended(self) -> bool:
        """Whether no token is left. Moves on to the batch that has the next one."""
        while self.batch is None or self._used == len(self.batch.tokens):
            if self.batch is not None:
                self._count_skipped()
            following = next(self._batches, None)
            if following is None:
                if self.batch is not None:  # behind the skipped rows at the end, which are counted now
                    self.position = Position(self.batch.file, self.batch.part + 1)
                return True
            self.batch = following
            here = self.position
            begin = here if (following.file, following.part) == (here.file, here.part) else Position()
            self._used = following.bounds[bisect_left(following.rows, begin.row)] + begin.token
            self._told = bisect_left(following.skipped, (begin.row, ""))
        return False

    def _count_skipped(self, before_row: int = 2**63) -> None:
        """Count the rows of the batch before this one that have no usable text."""
        assert self.batch is not None
        stop = bisect_left(self.batch.skipped, (before_row, ""))
        rows, self._told = self.batch.skipped[self._told : stop], stop
        self.totals.skip(self._source.files[self.batch.file].name, self.batch.part, rows)
