"""Data that is tokens already: checked, hashed and listed in a manifest, but not tokenized again.

    hub-tokens:OWNER/DATASET   .bin files of a dataset on the Hugging Face Hub, as kjj0/finewebedu10B-gpt2
    tokens:FOLDER              .bin files of llm.c, modded-nanogpt or nanoGPT (train.bin, val.bin), or .npy shards

Each file says its split in its name: train or val, then perhaps a number. A file in llm.c's format becomes one
shard as it is, by a hard link, a copy or a download; any other is rewritten as shards of at most shard_tokens.
The source itself is never changed, and every id is looked at. As in prepare.py the manifest is written anew with
each shard and says where the next one begins.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from aymen_gpt import files
from aymen_gpt.data import fetch, prepare, shards
from aymen_gpt.data.prepare import Position, PrepareOptions, Progress, Report, Summary, Totals
from aymen_gpt.data.sources import Source, SourceFile, or_by_hand
from aymen_gpt.data.tokenizer import EOT
from aymen_gpt.errors import DataError, UsageError

WORDS = ("tokens:", "hub-tokens:")
NAME = re.compile(r"(?:.*[\W_])?(?P<split>train|val)(?:_(?P<number>\d+))?\.(?:bin|npy)")
CHUNK = 2**22  # tokens that are looked at, or rewritten, at a time


def is_tokens(words: Iterable[str]) -> bool:
    """Whether any of the words after --source names tokens; ``adopt`` is for them, ``prepare`` for text."""
    return any(word.startswith(WORDS) for word in words)


def adopt(options: PrepareOptions, report: Report) -> Summary:
    """Bring the folder ``options.out`` to completion, from wherever an earlier call left it.

    Shards made by that call are compared with their sha256. UsageError when the folder was begun with other
    options, DataError when a file is no GPT-2 tokens or a split is missing, NetworkError, CannotWrite.
    """
    with prepare.begun(options, lambda: _find(options), lambda options, _: options.shard_tokens, report) as begun:
        manifest, source = begun
        if source is None:
            shards.check_shards(options.out)
            return prepare.summary(options.out, manifest, already=True)
        if manifest["shards"]:
            _mend(options, source, manifest, report)
        _append(options, source, manifest, report)
        prepare.finish(options, source, manifest)
        return prepare.summary(options.out, manifest, already=False)


def repair(out: Path, report: Report, *, keep_source: bool = False) -> list[str]:
    """Get the damaged shards of a folder from their source again; returns their names."""
    with files.lock(out, "--out"):
        manifest = shards.read_manifest(out)
        if manifest is None:
            raise DataError(f"{out} has no {shards.MANIFEST}")
        options = replace(prepare.recorded_options(out, manifest), keep_source=keep_source)
        source = prepare.open_source(options, manifest, lambda: _find(options))
        damaged = _mend(options, source, manifest, report)
        prepare.drop_downloads(options, source, len(source.files))
        return damaged


def _find(options: PrepareOptions) -> Source:
    """The token files that the word means: validation first, each split in the order of its numbers."""
    word, *others = options.source
    if others:
        raise UsageError(f"--source {' '.join(options.source)}: tokens cannot be mixed with other sources")
    if options.text_column is not None:
        raise UsageError(f"--text-column is for text; --source {word} is tokens")
    kind, _, name = word.partition(":")
    source = _on_hub(name, options.revision) if kind == "hub-tokens" else _in_folder(Path(name), options)
    places: dict[tuple[str, int], SourceFile] = {}
    for file in source.files:
        if match := NAME.fullmatch(file.name):
            place = match["split"], int(match["number"] or 0)
            if place in places:
                raise DataError(
                    f"two {place[0]} files have number {place[1]}: {places[place].name} and {file.name}"
                )
            places[place] = file
    for split in ("val", "train"):
        if split not in {found for found, _ in places}:
            raise DataError(
                f"--source {word} has no {split} file, and both splits are needed: "
                f"name one of its files {split}.bin or edufineweb_{split}_000000.bin"
            )
    for file in places.values():
        if file.path is not None:
            shards.map_tokens(file.path)  # its header and size, before anything is written
    order = sorted(places, key=lambda place: (place[0] == "train", place[1]))
    return replace(source, files=tuple(places[place] for place in order))


def _on_hub(repo: str, revision: str | None) -> Source:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UsageError(f"--source hub-tokens:{repo}: a dataset is OWNER/NAME, as kjj0/finewebedu10B-gpt2")
    with or_by_hand("give a folder that has them, --source tokens:FOLDER"):
        commit, listed = fetch.hub_list(repo, "", revision=revision or "main", suffix=".bin")
    return Source(tuple(SourceFile(file.name, file.bytes, file.sha256) for file in listed), None, repo, commit)


def _in_folder(folder: Path, options: PrepareOptions) -> Source:
    if options.revision is not None:
        raise UsageError("--revision names a commit on the Hub; --source names a folder")
    if not folder.is_dir():
        raise UsageError(f"--source {options.source[0]}: no such folder")
    if folder.resolve() == options.out.resolve():
        raise UsageError(f"--out {options.out} is the source itself: take another folder")
    inside = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return Source(tuple(SourceFile(path.name, path.stat().st_size, path=path) for path in inside))


def _append(options: PrepareOptions, source: Source, manifest: dict[str, Any], report: Report) -> None:
    """Append shards to the manifest, saving it with each, until the source is exhausted.

    Training ends before that with the shard that reaches max_tokens; it has at least one.
    """
    done, totals = manifest["shards"], Totals.of(manifest)
    position = Position(**done[-1]["end"]) if done else Position()
    while position.file < len(source.files):
        trained = done and _split(source.files[done[-1]["begin"]["file"]]) == "train"
        if trained and totals.tokens >= (options.max_tokens or 2**63):
            return
        name = shards.shard_name(_split(source.files[position.file]), len(done))
        done.append(_adopt(options, source, position, options.out / name, report))
        position = Position(**done[-1]["end"])
        totals.tokens += done[-1]["tokens"]
        totals.documents += done[-1]["documents"]
        manifest["totals"] = asdict(totals)
        shards.write_manifest(options.out, manifest)
        prepare.drop_downloads(options, source, position.file)
        report(Progress(totals, len(done), position.file / len(source.files)))


def _split(file: SourceFile) -> str:
    match = NAME.fullmatch(file.name)
    assert match is not None, file.name
    return match["split"]


def _mend(options: PrepareOptions, source: Source, manifest: dict[str, Any], report: Report) -> list[str]:
    """Make damaged shards again; returns their names."""
    damaged = shards.verify(options.out)
    for record in manifest["shards"]:
        if record["file"] in damaged:
            report(f"getting {record['file']} again ({damaged[record['file']]})")
            path = options.out / record["file"]
            found = _adopt(options, source, Position(**record["begin"]), path, report)
            if found["sha256"] != record["sha256"]:
                path.unlink()
                raise DataError(f"{path} cannot be made again: its source holds other tokens now")
    return list(damaged)


def _adopt(options: PrepareOptions, source: Source, begin: Position, path: Path, report: Report) -> dict[str, Any]:
    """Make one shard of what stands at ``begin`` in the source; returns its record for the manifest."""
    origin = prepare.bring(options, source, begin.file, report)
    tokens = shards.map_tokens(origin)
    as_it_is = origin.suffix == ".bin" and shards.is_llmc(origin)
    stop = len(tokens) if as_it_is else min(begin.token + options.shard_tokens, len(tokens))
    documents = 0

    def checked() -> Iterator[np.ndarray]:
        nonlocal documents
        for start in range(begin.token, stop, CHUNK):
            piece = tokens[start : min(start + CHUNK, stop)]
            shards.check_ids(origin, piece, start)
            documents += int(np.count_nonzero(piece == EOT))
            yield piece

    if as_it_is:
        for _ in checked():
            pass
        _link(origin, path)
    else:
        shards.write_shard(path, checked())
    if not documents:
        report(f"{path.name} has no separator (id {EOT}) and is read as one document: are these GPT-2's tokens?")
    end = Position(begin.file + 1) if stop == len(tokens) else replace(begin, token=stop)
    counts = {
        "file": path.name,
        "tokens": stop - begin.token,
        "documents": documents,
        "sha256": files.sha256(path),
    }
    return counts | {"begin": asdict(begin), "end": asdict(end)}


def _link(origin: Path, path: Path) -> None:
    """Give a file a second name by a hard link; by a copy where there are none, as across file systems."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        os.link(origin.resolve(), temporary)
        os.replace(temporary, path)
        files.sync(path.parent)
    except OSError:
        with files.whole_file(path) as copy, origin.open("rb") as file:
            shutil.copyfileobj(file, copy, 2**20)
    finally:
        temporary.unlink(missing_ok=True)  # two names of one file are not renamed onto each other
