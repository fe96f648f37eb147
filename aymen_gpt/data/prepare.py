"""Text to token shards: bounded memory, any number of workers, safe to kill at any moment.

The source's parts are dealt to worker processes, which tokenize them; their batches are put back into the
order of the source, so the shards hold the same bytes for any number of workers. Every document stands
behind one separator (id 50256) and is cut where a shard ends. The manifest is written anew with each
finished shard and says where in the source the next one begins: that is all that a resumed run needs.

The fast encoder (encoder.py) is held against tiktoken on about one document in a hundred; which ones is a
function of their place in the source. Should one differ, everything is done again with tiktoken alone.

Shard 0 is the validation split. It has shard_tokens tokens, but at most a twentieth of the estimated total
(of a small corpus 10,000 tokens or a quarter), so that any corpus gives both splits.
"""

import itertools
import multiprocessing
import os
import re
import shutil
import signal
import threading
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from aymen_gpt import files
from aymen_gpt.data import encoder, shards, sources, tokenizer
from aymen_gpt.data.encoder import EncoderName
from aymen_gpt.data.fetch import check_name
from aymen_gpt.data.sources import Document, Part, Source, SourceFile
from aymen_gpt.errors import AymenError, DataError, UsageError

AHEAD = 3  # parts dealt per worker before the first of them is needed: they bound the memory
BYTES_PER_TOKEN = 4  # of English text, for estimates
SMALL_VAL = 10_000  # tokens of validation that a small corpus should have
SAMPLE = 100  # one document in so many is encoded by tiktoken too
BAD_ROWS = 1 / 1000  # more than this share of rows without usable text is an error
NAMED = 5  # files that an error names at most
OURS = re.compile(rf"{re.escape(shards.MANIFEST)}|{re.escape(shards.CHECKED)}|\w[\w.-]*_\d{{6}}\..+")
SOURCE_FOLDER = ".source"  # in the output folder: files downloaded from the Hub


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare. The options up to ``revision`` decide the bytes of the shards."""

    source: tuple[str, ...] = ("hub",)
    out: Path = Path("edu_fineweb10B")
    shard_tokens: int = 100_000_000
    max_tokens: int | None = None
    text_column: str | None = None
    revision: str | None = None
    workers: int | None = None  # processes; None: one for each CPU; 0: all work in this process
    keep_source: bool = False
    encoder: EncoderName = "gigatoken"  # where it is installed, else tiktoken
    restart: bool = False  # set aside what is there and begin anew
    skip_bad_rows: bool = False  # leave out rows without usable text however many there are


class Inexact(AymenError):
    """The fast encoder gave a document other ids than tiktoken."""


@dataclass(frozen=True)
class Position:
    """A place in the source: so many files, parts of the next, rows of it and tokens of the next row."""

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

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> "Totals":
        return cls(**{f.name: manifest["totals"][f.name] for f in fields(cls) if f.name in manifest["totals"]})


@dataclass(frozen=True)
class Progress:
    totals: Totals
    shards: int
    fraction: float  # of the source, or of max_tokens


Report = Callable[[Progress | str], None]  # told of numbers again and again, and of events once


@dataclass(frozen=True)
class Summary:
    folder: Path
    shards: int
    totals: Totals
    already: bool  # nothing had to be done


@dataclass(frozen=True)
class Batch:
    """A part, tokenized: D documents, n tokens."""

    part: Part
    tokens: np.ndarray  # (n,) uint16, each document behind its separator
    bounds: np.ndarray  # (D + 1,) where each document begins in tokens, and n
    rows: list[int]  # (D,) row of each document in the part
    sizes: list[int]  # (D,) UTF-8 bytes of each
    ids: list[str | None]
    urls: list[str | None]
    skipped: list[tuple[int, str]]  # (row, reason)


Batches = Callable[[Position], Generator[Batch, None, None]]  # a source from a position on


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens for a shard, and the ids and urls of the documents they belong to."""

    tokens: np.ndarray
    ids: list[str | None]
    urls: list[str | None]


def tokenize(part: Part, encoder_name: EncoderName) -> Batch:
    """Read a part and turn its documents into tokens; the work that workers do."""
    rows = list(sources.read(part))
    documents = [row for row in rows if not row.skipped]
    texts = [tokenizer.utf8(document.text) for document in documents]
    ids = encoder.encode_documents(texts, encoder_name)
    if encoder_name != "tiktoken":
        _check_sample(part, documents, ids, encoder_name)
    separator = np.array([tokenizer.EOT], np.uint16)
    pieces = [piece for tokens in ids for piece in (separator, tokens)]
    return Batch(
        replace(part, content=None),
        np.concatenate(pieces, dtype=np.uint16, casting="unsafe") if pieces else np.empty(0, np.uint16),
        np.cumsum([0, *(1 + len(tokens) for tokens in ids)]),
        [document.row for document in documents],
        list(map(len, texts)),
        [document.id for document in documents],
        [document.url for document in documents],
        [(row.row, row.skipped) for row in rows if row.skipped],
    )


def _check_sample(part: Part, documents: list[Document], ids: list[np.ndarray], encoder_name: EncoderName) -> None:
    """Inexact when a document of the sample has other ids than tiktoken's."""
    for document, found in zip(documents, ids, strict=True):
        if _sampled(part, document.row) and not np.array_equal(found, tokenizer.encode(document.text)):
            program = f"{encoder_name} {encoder.version(encoder_name)}"
            place = [f"{part.path.name}, part {part.index}, row {document.row}", document.id, document.url]
            raise Inexact(f"{program} gave other ids than tiktoken for {', '.join(filter(None, place))}")


def _sampled(part: Part, row: int) -> bool:
    """Two rows of every part and one in a hundred, the same in any run."""
    return row < 2 or zlib.crc32(b"%d %d %d" % (part.file, part.index, row)) % SAMPLE == 0


def tokenize_all(parts: Iterable[Part], workers: int, encoder_name: EncoderName) -> Generator[Batch, None, None]:
    """The parts tokenized by that many processes (0: by this one), in their order whoever is faster."""
    if workers == 0:
        yield from (tokenize(part, encoder_name) for part in parts)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, _begin_worker)
    waiting: deque[Future[Batch]] = deque()
    try:
        for part in parts:
            waiting.append(pool.submit(tokenize, part, encoder_name))
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class TokenStream:
    """The source from a position on, as one stream of tokens that knows where it is and what it has counted."""

    def __init__(self, source: Source, batches: Iterator[Batch], position: Position, totals: Totals) -> None:
        self.position = position  # of the next token
        self.totals = totals
        self.part: Part | None = None  # the newest one seen
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
        self.position = Position(batch.part.file, batch.part.index, row, cut)
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
                if self.part is not None:  # behind the skipped rows at the end, which are counted now
                    self.position = Position(self.part.file, self.part.index + 1)
                return None
            self.part = self._batch.part
        return self._batch

    def _count_skipped(self, batch: Batch, before_row: int | None) -> None:
        for row, reason in batch.skipped[self._told :]:
            if before_row is not None and row >= before_row:
                return
            self._told += 1
            self.totals.skipped[reason] = self.totals.skipped.get(reason, 0) + 1
            name = self._source.files[batch.part.file].name
            if reason != "empty" and len(self.totals.bad) < NAMED:
                self.totals.bad.setdefault(name, f"part {batch.part.index}, row {row}: {reason}")


def prepare(options: PrepareOptions, report: Report) -> Summary:
    """Bring the folder ``options.out`` to completion, from wherever an earlier call left it.

    UsageError when the folder was begun with other options, DataError when the source is bad or too small,
    NetworkError, CannotWrite; after any of them the finished shards stay.
    """
    with begun(options, lambda: find_text(options, report), val_tokens, report) as (manifest, source):
        if source is None:
            check_same_source(options, manifest, lambda options: find_text(options, report))
            shards.check_shards(options.out)
            return summary(options.out, manifest, already=True)

        def work(manifest: dict[str, Any]) -> dict[str, Any]:
            def batches(position: Position) -> Generator[Batch, None, None]:
                return tokenized(options, manifest, _parts(options, source, position, report))

            return write_shards(options, source, manifest, batches, report)

        manifest = exactly(options, source, manifest, report, work)
        finish(options, source, manifest)
        return summary(options.out, manifest, already=False)


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Keep a folder, made if need be, from other processes; one that stays empty is removed again."""
    new = [folder for folder in (out, *out.parents) if not os.path.lexists(folder)]
    with files.lock(out, "--out"):
        try:
            yield
        finally:
            with suppress(OSError):
                if os.listdir(out) == [".lock"]:
                    (out / ".lock").unlink()
                    for folder in new:
                        folder.rmdir()


@contextmanager
def begun(
    options: PrepareOptions,
    find: Callable[[], Source],
    val_tokens: Callable[[PrepareOptions, Source], int],
    report: Report,
) -> Iterator[tuple[dict[str, Any], Source | None]]:
    """Hold the folder: its manifest, new or as an earlier call left it, and its source; None when it is complete.

    UsageError when it was begun with other options, CannotWrite when another process holds it.
    """
    with held(options.out):
        if options.restart:
            set_aside(options.out, report)
        manifest = shards.read_manifest(options.out)
        if manifest is not None:
            check_same_options(options, manifest)
            if manifest["complete"]:
                yield manifest, None
                return
        source = open_source(options, manifest, find)
        files.sweep(options.out)
        yield manifest or _new_manifest(options, source, val_tokens(options, source)), source


def set_aside(out: Path, report: Report) -> None:
    """Move all that a preparation left in a folder into ``out``/earlier-1, or -2, ...; nothing is deleted."""
    ours = [path for path in out.iterdir() if OURS.fullmatch(path.name)]
    if not ours:
        return
    number = 1 + max([int(p.name[8:]) for p in out.glob("earlier-*") if p.name[8:].isdigit()], default=0)
    target = out / f"earlier-{number}"
    target.mkdir()
    for path in sorted(
        ours, key=lambda path: path.name == shards.MANIFEST
    ):  # without it the rest would be forgotten
        path.rename(target / path.name)
    report(f"{target} holds what was there; type the command without --restart should it be interrupted now")


def finish(options: PrepareOptions, source: Source, manifest: dict[str, Any]) -> None:
    manifest["complete"] = True
    shards.write_manifest(options.out, manifest)
    drop_downloads(options, source, len(source.files))


def exactly(
    options: PrepareOptions,
    source: Source,
    manifest: dict[str, Any],
    report: Report,
    work: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    """Do the work that a manifest lacks; should the fast encoder prove inexact, all of it with tiktoken.

    Returns the manifest that the work returns.
    """
    _choose_encoder(options, manifest, report)
    try:
        return work(manifest)
    except Inexact as error:
        report(f"WARNING: {error}; everything again, with tiktoken")
        return work(_begin_again(options, source, manifest))


def _begin_again(options: PrepareOptions, source: Source, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a preparation that has not begun and will use tiktoken; it is on the disk already."""
    again = _new_manifest(options, source, val_tokens(options, source)) | {"encoder": _encoder("tiktoken")}
    shards.write_manifest(options.out, again)
    for record in manifest["shards"]:
        for path in options.out.glob(Path(record["file"]).stem + ".*"):
            path.unlink()
    return again


def _choose_encoder(options: PrepareOptions, manifest: dict[str, Any], report: Report) -> None:
    """Note the encoder in the manifest. A folder that tiktoken has worked on stays with it."""
    begun_with = manifest.get("encoder") or {"name": "gigatoken"}
    name: EncoderName = "gigatoken"
    if options.encoder == "tiktoken" or begun_with["name"] == "tiktoken":
        name = "tiktoken"
    elif reason := encoder.missing():
        report(f"encoding with tiktoken: {reason}")
        name = "tiktoken"
    manifest["encoder"] = _encoder(name)


def _encoder(name: EncoderName) -> dict[str, str]:
    return {"name": name, "version": encoder.version(name)}


def repair(
    out: Path,
    report: Report,
    *,
    workers: int | None = None,
    keep_source: bool = False,
    encoder: EncoderName = "gigatoken",
) -> list[str]:
    """Rebuild the damaged files of a folder from their source rows; returns their names."""
    with held(out):
        files.sweep(out)
        damaged = shards.verify(out)
        manifest = shards.read_manifest(out)
        if not damaged or manifest is None:
            return []
        if "options" not in manifest or not all("begin" in record for record in manifest["shards"]):
            raise DataError(f"{out} cannot be repaired, {', '.join(damaged)}: get its files again")
        options = recorded_options(out, manifest)
        options = replace(options, workers=workers, keep_source=keep_source, encoder=encoder)
        source = open_source(options, manifest, lambda: find_text(options, report), to_repair=True)
        _choose_encoder(options, manifest, report)
        for record in manifest["shards"]:
            names = {record["file"], shards.sources_path(Path(record["file"])).name} & damaged.keys()
            if names:
                report("rebuilding " + ", ".join(f"{name} ({damaged[name]})" for name in sorted(names)))
                _rebuild(options, source, manifest, record, report)
        drop_downloads(options, source, len(source.files))
        return list(damaged)


def _rebuild(
    options: PrepareOptions, source: Source, manifest: dict[str, Any], record: dict[str, Any], report: Report
) -> None:
    path = options.out / record["file"]
    begin = Position(**record["begin"])
    with closing(tokenized(options, manifest, _parts(options, source, begin, report))) as batches:
        stream = TokenStream(source, batches, begin, Totals())
        found = _write_shard(stream, path, record["tokens"], lambda: None)
    if found["sha256"] != record["sha256"]:
        path.unlink()
        raise DataError(f"{path} cannot be rebuilt: its source or its tokenizer gives other tokens now")
    if found["documents_sha256"] != record.get("documents_sha256"):  # the same rows as another pyarrow writes them
        record["documents_sha256"] = found["documents_sha256"]
        shards.write_manifest(options.out, manifest)


def write_shards(
    options: PrepareOptions, source: Source, manifest: dict[str, Any], batches: Batches, report: Report
) -> dict[str, Any]:
    """Write what the manifest lacks; returns it, or the one that took its place."""
    _append_shards(options, source, manifest, batches, report)
    if len(manifest["shards"]) >= 2:
        return manifest
    total = manifest["totals"]["tokens"]  # the estimate was too high; now the total is known
    if total < 20:
        raise DataError(f"the source has only {total} tokens: too few for training and validation")
    report(f"a small corpus ({total:,} tokens): again, with a tenth of it for validation")
    again = _new_manifest(options, source, total // 10) | {"encoder": manifest["encoder"]}
    _append_shards(options, source, again, batches, report)
    return again


def _append_shards(
    options: PrepareOptions, source: Source, manifest: dict[str, Any], batches: Batches, report: Report
) -> None:
    """Append shards to the manifest, saving it with each, until the source or max_tokens is exhausted."""
    done = manifest["shards"]
    totals = Totals.of(manifest)
    position = Position(**done[-1]["end"]) if done else Position()
    limit = options.max_tokens or 2**63
    before = list(itertools.accumulate((file.bytes for file in source.files), initial=0))
    if done:
        report(f"continuing after {len(done)} finished shards ({totals.tokens:,} tokens)")

    def tell() -> None:
        part = stream.part
        reached = before[part.file] + source.files[part.file].bytes * part.fraction if part else 0
        report(Progress(totals, len(done), max(reached / max(before[-1], 1), totals.tokens / limit)))

    with closing(batches(position)) as found:
        stream = TokenStream(source, found, position, totals)
        while totals.tokens < limit and not stream.ended():
            split = "train" if done else "val"
            room = min(manifest["shard_tokens"][split], limit - totals.tokens)
            name = shards.shard_name(split, len(done), "edufineweb" if source.repo else "shard")
            done.append(_write_shard(stream, options.out / name, room, tell))
            manifest["totals"] = asdict(totals)
            _check_bad_rows(options, totals, at_least=100)
            shards.write_manifest(options.out, manifest)
            drop_downloads(options, source, stream.position.file)
    manifest["totals"] = asdict(totals)
    _check_bad_rows(options, totals, at_least=1)


def _write_shard(stream: TokenStream, path: Path, room: int, tell: Callable[[], None]) -> dict[str, Any]:
    """Fill one shard from the stream; returns its record for the manifest."""
    begin = stream.position
    ids: list[str | None] = []
    urls: list[str | None] = []

    def pieces() -> Iterator[np.ndarray]:
        left = room
        while left and (piece := stream.take(left)) is not None:
            left -= len(piece.tokens)
            ids.extend(piece.ids)
            urls.extend(piece.urls)
            yield piece.tokens
            tell()

    n_tokens = shards.write_shard(path, pieces())
    shards.write_document_sources(path, ids, urls)
    counts = {"file": path.name, "tokens": n_tokens, "documents": len(ids), "sha256": files.sha256(path)}
    counts["documents_sha256"] = files.sha256(shards.sources_path(path))
    return counts | {"begin": asdict(begin), "end": asdict(stream.position)}


def tokenized(
    options: PrepareOptions, manifest: dict[str, Any], parts: Iterable[Part]
) -> Generator[Batch, None, None]:
    tokenizer.vocabulary()  # fetched once, before the workers want it
    workers = (os.cpu_count() or 1) if options.workers is None else options.workers
    return tokenize_all(parts, workers, manifest["encoder"]["name"])


def _parts(options: PrepareOptions, source: Source, position: Position, report: Report) -> Iterator[Part]:
    """The parts from a position on; a file on the Hub is downloaded when its turn comes."""
    for number in range(position.file, len(source.files)):
        path = bring(options, source, number, report)
        for part in sources.parts(source, number, path):
            if (number, part.index) == (position.file, position.part):
                yield replace(part, skip=position.row)
            elif (number, part.index) > (position.file, position.part):
                yield part


def bring(options: PrepareOptions, source: Source, number: int, report: Report) -> Path:
    """The path of a file of the source, downloaded into the output folder if need be."""
    file = source.files[number]
    if file.path is None:
        report(f"downloading {file.name} ({file.bytes / 1e9:.1f} GB, file {number + 1} of {len(source.files)})")
    return sources.bring(source, number, options.out / SOURCE_FOLDER)


def drop_downloads(options: PrepareOptions, source: Source, count: int) -> None:
    """Delete the first ``count`` files of the source where they were downloaded."""
    if source.repo is None or options.keep_source:
        return
    folder = options.out / SOURCE_FOLDER
    for file in source.files[:count]:
        check_name(file.name, folder)
        (folder / file.name).unlink(missing_ok=True)
    if count == len(source.files):
        shutil.rmtree(folder, ignore_errors=True)


def find_text(options: PrepareOptions, report: Report) -> Source:
    if "builtin" in options.source:
        report("gathering the documentation that is installed with Python (half a minute the first time)")
    return sources.open_source(
        options.source, revision=options.revision, text_column=options.text_column, out=options.out
    )


def open_source(
    options: PrepareOptions,
    manifest: dict[str, Any] | None,
    find: Callable[[], Source],
    *,
    to_repair: bool = False,
) -> Source:
    """The source that ``find`` finds. DataError unless it is the one that the folder was begun with.

    To repair, files of the same names and sizes are enough: the hash of the shard is what decides.
    """
    known = described(manifest["source"], options.text_column or "text") if manifest else None
    if known and known.repo:
        return known
    source = find()
    if known:
        way = "put back what it was made from" if to_repair else sources.RESTART
        _refuse_changes(options, changes(known.files, source.files, times=not to_repair), way)
    return source


def check_same_source(
    options: PrepareOptions, manifest: dict[str, Any], find: Callable[[PrepareOptions], Source]
) -> None:
    """DataError when the files that a finished folder was made from have changed. They need not be there any more.

    What comes from the Hub is what it was, and the builtin corpus is another with every package that is renewed.
    """
    known = [file for file in described(manifest["source"]).files if file.modified_ns is not None]
    words = tuple(word for word in options.source if word != "builtin")
    if known:
        with suppress(UsageError):
            source = find(replace(options, source=words))
            _refuse_changes(options, changes(known, source.files), sources.RESTART)


def _refuse_changes(options: PrepareOptions, changed: str, way: str) -> None:
    if changed:
        raise DataError(f"the source has changed since {options.out} was begun ({changed}): {way}")


def changes(before: Iterable[SourceFile], now: Iterable[SourceFile], *, times: bool = True) -> str:
    """How the files of a source differ, in words; "" when they do not. ``times`` counts modification times too."""
    old, new = ({file.name: (file.bytes, times and file.modified_ns) for file in files} for files in (before, now))
    differ = sorted(name for name in old | new if old.get(name) != new.get(name))
    words = [
        f"{name} {'is new' if name not in old else 'is gone' if name not in new else 'is not the same'}"
        for name in differ
    ]
    return ", ".join(words[:NAMED]) + f" and {len(words) - NAMED:,} more" * (len(words) > NAMED)


def described(known: dict[str, Any], text_column: str | None = None) -> Source:
    """A manifest's description as the source that it was, its files out of reach. DataError for unsafe names."""
    listed = tuple(SourceFile(**file) for file in known["files"])
    for file in listed:
        check_name(file.name)
    return Source(listed, text_column, known["repo"], known["revision"])


def _description(source: Source) -> dict[str, Any]:
    names = ("name", "bytes", "sha256", "modified_ns")
    listed = [{name: getattr(file, name) for name in names} for file in source.files]
    return {"repo": source.repo, "revision": source.revision, "files": listed}


def _deciding_options(options: PrepareOptions) -> dict[str, Any]:
    """The options that decide the bytes of the shards, as the manifest keeps them."""
    names = ("shard_tokens", "max_tokens", "text_column", "revision")
    return {"source": _without_slashes(options.source)} | {name: getattr(options, name) for name in names}


def _without_slashes(words: Iterable[str]) -> list[str]:
    """The words of --source, the same for ``texts`` and ``./texts/``."""
    return [str(Path(word)) for word in words]


def recorded_options(out: Path, manifest: dict[str, Any]) -> PrepareOptions:
    given = manifest["options"] | {"source": tuple(manifest["options"]["source"])}
    return PrepareOptions(**given, out=out)


def check_same_options(options: PrepareOptions, manifest: dict[str, Any]) -> None:
    if "options" not in manifest:
        raise UsageError(f"{options.out} holds tokens that fineweb.py did not make: take another --out")
    for name, wanted in _deciding_options(options).items():
        found = manifest["options"][name]
        if name == "source":
            found = _without_slashes(found)
        if found != wanted:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{options.out} was prepared with {flag} {_typed(found)}, not {_typed(wanted)}: "
                f"give the same options, or another --out"
            )


def _typed(value: object) -> str:
    return "unset" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _new_manifest(options: PrepareOptions, source: Source, val_tokens: int) -> dict[str, Any]:
    return {
        "format": shards.FORMAT,
        "complete": False,
        "options": _deciding_options(options),
        "source": _description(source),
        "tokenizer": {
            "name": "gpt2",
            "vocabulary_sha256": tokenizer.vocabulary_sha256(),
            "separator": tokenizer.EOT,
        },
        "encoder": None,
        "shard_tokens": {"val": val_tokens, "train": options.shard_tokens},
        "totals": asdict(Totals()),
        "shards": [],
    }


def val_tokens(options: PrepareOptions, source: Source) -> int:
    estimate = min(sources.estimated_bytes(source) // BYTES_PER_TOKEN, options.max_tokens or 2**63)
    return max(1, min(options.shard_tokens, max(estimate // 20, min(estimate // 4, SMALL_VAL))))


def _check_bad_rows(options: PrepareOptions, totals: Totals, at_least: int) -> None:
    skipped = sum(totals.skipped.values())
    bad, rows = skipped - totals.skipped.get("empty", 0), skipped + totals.documents
    if bad >= at_least and bad > BAD_ROWS * rows and not options.skip_bad_rows:
        first = "; ".join(f"{name}, {place}" for name, place in totals.bad.items())
        raise DataError(
            f"{bad:,} of {rows:,} rows have no usable text (more than {BAD_ROWS:.1%}): {first}; mend or remove "
            "them and type the same command with --restart, or leave such rows out with --skip-bad-rows"
        )


def summary(folder: Path, manifest: dict[str, Any], *, already: bool) -> Summary:
    return Summary(folder, len(manifest["shards"]), Totals.of(manifest), already)
