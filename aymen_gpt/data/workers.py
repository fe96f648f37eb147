"""Slices become tokens, in one process or many: the order is that of the source, whoever is faster.

The fast encoder (encoder.py) is held against tiktoken on about one document in a hundred; which ones is a
function of their place in the source.
"""

import itertools
import multiprocessing
import os
import signal
import threading
import zlib
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from aymen_gpt.data import encoder, slices, tokenizer
from aymen_gpt.data.encoder import EncoderName
from aymen_gpt.data.slices import Document, Slice
from aymen_gpt.errors import AymenError, DataError

AHEAD = 3  # slices dealt per worker before the first of them is needed: they bound the memory
SAMPLE = 100  # one document in so many is encoded by tiktoken too


@dataclass(frozen=True)
class Batch:
    """A slice, tokenized: D documents, n tokens."""

    file: int  # number in Source.files
    part: int  # number of the slice in the file
    fraction: float  # of the file that is read when this slice is
    tokens: np.ndarray  # (n,) uint16, each document behind its separator
    bounds: list[int]  # (D + 1,) where each document begins in tokens, and n
    rows: list[int]  # (D,) row of each document in the slice
    sizes: list[int]  # (D,) UTF-8 bytes of each
    ids: list[str | None]
    urls: list[str | None]
    skipped: list[tuple[int, str]]  # (row, reason)


def tokenize(slice: Slice, encoder_name: EncoderName) -> Batch:
    """Read a slice and turn its documents into tokens; the work that workers do."""
    rows = list(slices.read(slice))
    documents = [row for row in rows if not row.skipped]
    texts = [tokenizer.utf8(document.text) for document in documents]
    ids = encoder.encode_documents(texts, encoder_name)
    if encoder_name != "tiktoken":
        _check_sample(slice, documents, ids, encoder_name)
    separator = np.array([tokenizer.EOT], np.uint16)
    pieces = [piece for tokens in ids for piece in (separator, tokens)]
    return Batch(
        slice.file,
        slice.part,
        slice.fraction,
        np.concatenate(pieces, dtype=np.uint16, casting="unsafe") if pieces else np.empty(0, np.uint16),
        list(itertools.accumulate((1 + len(tokens) for tokens in ids), initial=0)),
        [document.row for document in documents],
        list(map(len, texts)),
        [document.id for document in documents],
        [document.url for document in documents],
        [(row.row, row.skipped) for row in rows if row.skipped],
    )


def _check_sample(
    slice: Slice, documents: list[Document], ids: list[np.ndarray], encoder_name: EncoderName
) -> None:
    """DataError when a document of the sample has other ids than tiktoken's."""
    for document, found in zip(documents, ids, strict=True):
        if _sampled(slice, document.row) and not np.array_equal(found, tokenizer.encode(document.text)):
            program = f"{encoder_name} {encoder.version(encoder_name)}"
            place = [f"{slice.path.name}, slice {slice.part}, row {document.row}", document.id, document.url]
            raise DataError(
                f"{program} gave other ids than tiktoken for {', '.join(filter(None, place))}: "
                "prepare all of it anew, with --restart --encoder tiktoken"
            )


def _sampled(slice: Slice, row: int) -> bool:
    """Two rows of every slice and one in a hundred, the same in any run."""
    return row < 2 or zlib.crc32(b"%d %d %d" % (slice.file, slice.part, row)) % SAMPLE == 0


def tokenize_all(dealt: Iterable[Slice], workers: int, encoder_name: EncoderName) -> Generator[Batch, None, None]:
    """The slices, tokenized by that many processes (0: by this one), in their order whoever is faster."""
    if workers == 0:
        yield from (tokenize(slice, encoder_name) for slice in dealt)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, _begin_worker)
    waiting: deque[Future[Batch]] = deque()
    try:
        for slice in dealt:
            waiting.append(pool.submit(tokenize, slice, encoder_name))
            if len(waiting) > AHEAD * workers:
                yield _result(waiting.popleft(), pool)
        while waiting:
            yield _result(waiting.popleft(), pool)
    except BrokenProcessPool:
        raise AymenError(
            "a worker process died; finished shards are safe: run the same command again "
            "(with fewer --workers if memory ran out, or with --encoder tiktoken)"
        ) from None
    finally:
        # Workers have nothing to tidy up. Asked to end instead, one would wait for ever on a lock of the queue
        # that another, killed from outside while they end, still held; and this process would wait for it.
        processes, answers = list((pool._processes or {}).values()), pool._result_queue._writer  # type: ignore
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
        answers.close()  # or the pool's thread waits for ever for the other half of an answer


def _result(future: "Future[Batch]", pool: ProcessPoolExecutor) -> Batch:
    """What the worker made. A pool does not notice that a worker died in the middle of its answer; this does."""
    while not wait([future], timeout=1).done:
        if not all(process.is_alive() for process in (pool._processes or {}).values()):
            raise BrokenProcessPool
    return future.result()


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent does, even by kill -9."""

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
