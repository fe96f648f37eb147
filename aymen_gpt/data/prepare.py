"""Text to token shards: bounded memory, any number of workers, safe to kill at any moment.

The source's slices (slices.py) are dealt to worker processes, which tokenize them (workers.py); their batches are
put back into the order of the source (stream.py), so the shards hold the same bytes for any number of workers.
Every document stands behind one separator (id 50256) and is cut where a shard ends. The manifest is written anew
with each finished shard and says where in the source the next one begins: that is all that a resumed run needs.

Shard 0 is the validation split. It has shard_tokens tokens, but at most a twentieth of the estimated total
(of a small corpus 10,000 tokens or a quarter), so that any corpus gives both splits.
"""

import functools
import itertools
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from aymen_gpt import files
from aymen_gpt.data import encoder, fetch, shards, slices, sources, tokenizer, workers
from aymen_gpt.data.encoder import EncoderName
from aymen_gpt.data.slices import RESTART, Slice, Source
from aymen_gpt.data.stream import Position, TokenStream, Totals
from aymen_gpt.data.workers import Batch
from aymen_gpt.errors import DataError, UsageError

BYTES_PER_TOKEN = 4  # of English text, for estimates
SMALL_VAL = 10_000  # tokens of validation that a small corpus should have
BAD_ROWS = 1 / 1000  # more than this share of rows without usable text is an error
SOURCE_FOLDER = ".source"  # in the output folder: files downloaded from the Hub
REBUILT = ".repair"  # in the output folder: a shard and its table until they prove right


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

    def record(self) -> dict[str, Any]:
        """The options that decide the bytes of the shards, as a manifest keeps them; ``./texts/`` is ``texts``."""
        names = ("shard_tokens", "max_tokens", "text_column", "revision")
        words = [str(Path(word)) for word in self.source]
        return {"source": words} | {name: getattr(self, name) for name in names}


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


class Preparation:
    """The folder ``options.out`` on its way to completion. shares.py has other ways to fill one.

    Once ``run`` or ``repair`` has begun, ``source`` and ``manifest`` are those of the folder.
    """

    to_restart = "the same command with --restart"

    def __init__(self, options: PrepareOptions, report: Report) -> None:
        self.options, self.out, self.report = options, options.out, report
        self.no_text = options.out  # no file in there is taken for text
        self.limit = options.max_tokens or 2**63  # tokens
        self.source = Source(())
        self.manifest: dict[str, Any] = {}

    def run(self) -> Summary:
        """Do all that is left to do, from wherever an earlier call ended.

        UsageError when the folder was begun with other options, DataError when the source is bad, too small or has
        changed, NetworkError, CannotWrite; after any of them the finished shards stay.
        """
        with held(self.out):
            if self.options.restart:
                set_aside(self.out, self.report)
            self.manifest = shards.read_manifest(self.out) or {}
            if self.manifest:
                check_options(self.options, self.manifest)
            already = self.manifest.get("complete", False)
            if already:
                self.check_complete()
            else:
                self.source = self.open_source()
                files.sweep(self.out)
                self.manifest = self.manifest or self.new_manifest(self.val_tokens())
                self.choose_encoder()
                self.write()
                self.manifest["complete"] = True
                self.save()
                self.drop_downloads(len(self.source.files))
        return Summary(self.out, len(self.manifest["shards"]), Totals(**self.manifest["totals"]), already)

    def check_complete(self) -> None:
        """What is asked when nothing is left to do: is all this still true?"""
        self.check_source()
        shards.check_shards(self.out)

    # The source

    def find_source(self, words: tuple[str, ...]) -> Source:
        """The files that the words of --source mean now."""
        if "builtin" in words:
            self.report("gathering the documentation that is installed with Python (half a minute the first time)")
        revision, text_column = self.options.revision, self.options.text_column
        return sources.open_source(words, revision=revision, text_column=text_column, out=self.no_text)

    def open_source(self, *, to_repair: bool = False) -> Source:
        """The source of the options. DataError unless it is the one that the folder was begun with.

        To repair, files of the same names and sizes are enough: the hash of the shard is what decides.
        """
        if not self.manifest:
            return self.find_source(self.options.source)
        known = sources.from_record(self.manifest["source"], self.options.text_column or "text")
        if known.repo:
            return known
        source = self.find_source(self.options.source)
        changed = sources.difference(known.files, source.files, times=not to_repair)
        self._refuse_if(changed, "put back what it was made from" if to_repair else RESTART)
        return source

    def check_source(self) -> None:
        """DataError when files of a complete folder's source have changed. They need not be there any more.

        What comes from the Hub is what it was, and the builtin corpus is another with every package renewed.
        """
        known = [f for f in sources.from_record(self.manifest["source"]).files if f.modified_ns is not None]
        if known:
            with suppress(UsageError):
                found = self.find_source(tuple(word for word in self.options.source if word != "builtin"))
                self._refuse_if(sources.difference(known, found.files), RESTART)

    def _refuse_if(self, changed: str, way: str) -> None:
        if changed:
            raise DataError(f"the source has changed since {self.out} was begun ({changed}): {way}")

    def bring(self, number: int) -> Path:
        """The path of a file of the source, downloaded into the output folder if need be."""
        file, count, folder = self.source.files[number], len(self.source.files), self.out / SOURCE_FOLDER
        if file.path is not None:
            return file.path
        assert self.source.repo is not None
        self.report(f"downloading {file.name} ({file.bytes / 1e9:.1f} GB, file {number + 1} of {count})")
        place: dict[str, Any] = {"revision": self.source.revision, "repo_type": "dataset", "folder": folder}
        with sources.or_by_hand(f"put it at {folder / file.name}"):
            return fetch.hub_file(self.source.repo, file.name, sha256=file.sha256, **place)

    def drop_downloads(self, count: int) -> None:
        """Delete the first ``count`` files of the source where they were downloaded."""
        if self.source.repo is None or self.options.keep_source:
            return
        folder = self.out / SOURCE_FOLDER
        for file in self.source.files[:count]:
            fetch.check_name(file.name, folder)
            (folder / file.name).unlink(missing_ok=True)
        if count == len(self.source.files):
            shutil.rmtree(folder, ignore_errors=True)

    # The manifest

    def new_manifest(self, val_tokens: int) -> dict[str, Any]:
        return {
            "format": shards.FORMAT,
            "complete": False,
            "options": self.options.record(),
            "source": self.source.record(),
            "tokenizer": shards.TOKENIZER,
            "encoder": None,
            "shard_tokens": {"val": val_tokens, "train": self.options.shard_tokens},
            "totals": asdict(Totals()),
            "shards": [],
        }

    def val_tokens(self) -> int:
        """The tokens of shard 0."""
        estimate = min(slices.estimated_bytes(self.source) // BYTES_PER_TOKEN, self.limit)
        return max(1, min(self.options.shard_tokens, max(estimate // 20, min(estimate // 4, SMALL_VAL))))

    def save(self) -> None:
        shards.write_manifest(self.out, self.manifest)

    # The work

    def choose_encoder(self) -> None:
        """Note the encoder in the manifest. A folder that tiktoken has worked on stays with it."""
        before = self.manifest.get("encoder") or {"name": "gigatoken"}
        name: EncoderName = "gigatoken"
        if self.options.encoder == "tiktoken" or before["name"] == "tiktoken":
            name = "tiktoken"
        elif reason := encoder.missing():
            self.report(f"encoding with tiktoken: {reason}")
            name = "tiktoken"
        self.manifest["encoder"] = {"name": name, "version": encoder.version(name)}

    def write(self) -> None:
        """Write what the manifest lacks, with the encoder it names."""
        self.append_shards()
        if len(self.manifest["shards"]) >= 2:
            return
        total = self.manifest["totals"]["tokens"]  # the estimate was too high; now the total is known
        if total < 20:
            raise DataError(f"the source has only {total} tokens: too few for training and validation")
        self.report(f"a small corpus ({total:,} tokens): again, with a tenth of it for validation")
        self.manifest = self.new_manifest(total // 10) | {"encoder": self.manifest["encoder"]}
        self.append_shards()

    def append_shards(self) -> None:
        """Append shards to the manifest, saving it with each, until the source or max_tokens is exhausted."""
        done, totals = self.manifest["shards"], Totals(**self.manifest["totals"])
        position = self.position()
        if done:
            self.report(f"continuing after {len(done)} finished shards ({totals.tokens:,} tokens)")
        with closing(self.batches(position)) as batches:
            stream = TokenStream(self.source, batches, position, totals)
            while totals.tokens < self.limit and not stream.ended():
                split = "train" if done else "val"
                room = min(self.manifest["shard_tokens"][split], self.limit - totals.tokens)
                name = shards.shard_name(split, len(done), "edufineweb" if self.source.repo else "shard")
                done.append(_write_shard(stream, self.out / name, room, self._tell))
                self.manifest["totals"] = asdict(totals)
                self.check_bad_rows(totals, at_least=100)
                self.save()
                self.drop_downloads(stream.position.file)
        self.manifest["totals"] = asdict(totals)
        self.check_bad_rows(totals, at_least=1)

    def check_bad_rows(self, totals: Totals, at_least: int) -> None:
        """DataError when too many rows, and at least so many, have no usable text."""
        skipped = sum(totals.skipped.values())
        bad, rows = skipped - totals.skipped.get("empty", 0), skipped + totals.documents
        if bad >= at_least and bad > BAD_ROWS * rows and not self.options.skip_bad_rows:
            first = "; ".join(f"{name}, {place}" for name, place in totals.bad.items())
            raise DataError(
                f"{bad:,} of {rows:,} rows have no usable text (more than {BAD_ROWS:.1%}): {first}; mend or "
                f"remove them and type {self.to_restart}, or leave such rows out with --skip-bad-rows"
            )

    def _tell(self, stream: TokenStream) -> None:
        batch, before = stream.batch, self.bytes_before
        reached = before[batch.file] + self.source.files[batch.file].bytes * batch.fraction if batch else 0
        fraction = max(reached / max(before[-1], 1), stream.totals.tokens / self.limit)
        self.report(Progress(stream.totals, len(self.manifest["shards"]), fraction))

    @functools.cached_property
    def bytes_before(self) -> list[int]:
        """How many bytes the source has before each of its files, and in all."""
        return list(itertools.accumulate((file.bytes for file in self.source.files), initial=0))

    def position(self) -> Position:
        """Where in the source the manifest's last shard ends."""
        done = self.manifest["shards"]
        return Position(**done[-1]["end"]) if done else Position()

    def batches(self, position: Position) -> Generator[Batch, None, None]:
        """The source, tokenized, from the slice of a position on."""
        tokenizer.vocabulary()  # fetched once, before the workers want it
        count = (os.cpu_count() or 1) if self.options.workers is None else self.options.workers
        return workers.tokenize_all(self.slices(position), count, self.manifest["encoder"]["name"])

    def slices(self, position: Position) -> Iterator[Slice]:
        """The slices from that of a position on; a file on the Hub is downloaded when its turn comes."""
        for number in range(position.file, len(self.source.files)):
            for slice in slices.slices_of(self.source, number, self.bring(number)):
                if (number, slice.part) >= (position.file, position.part):
                    yield slice

    def repair(self) -> list[str]:
        """Rebuild the damaged files of the folder from their source rows; returns their names."""
        with held(self.out):
            files.sweep(self.out)
            damaged = shards.verify(self.out)
            self.manifest = shards.read_manifest(self.out) or {}
            records = self.manifest["shards"]
            if damaged and not ("options" in self.manifest and all("begin" in record for record in records)):
                raise DataError(f"{self.out} cannot be repaired, {', '.join(damaged)}: get its files again")
            if damaged:
                options = self.manifest["options"]
                self.options = replace(self.options, **options | {"source": tuple(options["source"])})
                self.source = self.open_source(to_repair=True)
                self.choose_encoder()
            for record in records:
                names = {record["file"], shards.sources_path(Path(record["file"])).name} & damaged.keys()
                if names:
                    self.report("rebuilding " + ", ".join(f"{name} ({damaged[name]})" for name in sorted(names)))
                    self._rebuild(record)
            self.drop_downloads(len(self.source.files))
            return list(damaged)

    def _rebuild(self, record: dict[str, Any]) -> None:
        """Write a shard and its table anew. They replace what is there only if the manifest knows their tokens."""
        path, begin, folder = self.out / record["file"], Position(**record["begin"]), self.out / REBUILT
        shutil.rmtree(folder, ignore_errors=True)  # of a repair that was killed
        try:
            with closing(self.batches(begin)) as batches:
                stream = TokenStream(self.source, batches, begin, Totals())
                found = _write_shard(stream, folder / path.name, record["tokens"], lambda stream: None)
            if found["sha256"] != record["sha256"]:
                raise DataError(f"{path} cannot be rebuilt: its source or its tokenizer gives other tokens now")
            for made in sorted(folder.iterdir()):
                os.replace(made, self.out / made.name)
            files.sync(self.out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if found["documents_sha256"] != record.get("documents_sha256"):  # another pyarrow writes the same rows
            record["documents_sha256"] = found["documents_sha256"]
            self.save()


def _write_shard(
    stream: TokenStream, path: Path, room: int, tell: Callable[[TokenStream], None]
) -> dict[str, Any]:
    """Fill one shard from the stream; returns its record for the manifest."""
    begin = stream.position
    ids: list[str | None] = []
    urls: list[str | None] = []

    def pieces() -> Iterator[np.ndarray]:
        left = room
        while left and (piece := stream.take(left)) is not None:
            tokens, new_ids, new_urls = piece
            left -= len(tokens)
            ids.extend(new_ids)
            urls.extend(new_urls)
            yield tokens
            tell(stream)

    n_tokens = shards.write_shard(path, pieces())
    shards.write_document_sources(path, ids, urls)
    counts = {"file": path.name, "tokens": n_tokens, "documents": len(ids), "sha256": files.sha256(path)}
    counts["documents_sha256"] = files.sha256(shards.sources_path(path))
    return counts | {"begin": asdict(begin), "end": asdict(stream.position)}


def check_options(options: PrepareOptions, manifest: dict[str, Any]) -> None:
    """UsageError unless the folder was begun with these options."""
    if "options" not in manifest:
        raise UsageError(f"{options.out} holds tokens that fineweb.py did not make: take another --out")
    for name, wanted in options.record().items():
        known = manifest["options"][name]
        if known != wanted:
            before, now = (" ".join(v) if name == "source" else v or "unset" for v in (known, wanted))
            raise UsageError(
                f"{options.out} was prepared with --{name.replace('_', '-')} {before}, not {now}: "
                f"give the same options, or another --out"
            )


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


def set_aside(out: Path, report: Report) -> None:
    """Move all that a preparation left in a folder into ``out``/earlier-1, or -2, ...; nothing is deleted."""
    shard = r"(\w[\w.-]*_(train|val)|tokens)_\d{6}\.(bin|arrow|(documents|rows)\.parquet)"
    known = (shards.MANIFEST, shards.CHECKED)
    ours = [path for path in out.iterdir() if path.name in known or re.fullmatch(shard, path.name)]
    if not ours:
        return
    ours.sort(key=lambda path: path.name == shards.MANIFEST)  # last: it knows of the others
    target = files.move_to_earlier(out, ours)
    report(f"{target} holds what was there. If this is interrupted, type the command again without --restart")
