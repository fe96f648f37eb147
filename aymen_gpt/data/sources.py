"""Where text comes from: the words after --source become files, in one fixed order.

hub              FineWeb-Edu's sample-10BT from the Hugging Face Hub (the default)
builtin          the documentation on this machine (builtin.py)
PATH             a file or a folder of .parquet, .jsonl, .jsonl.gz, .jsonl.zst, .txt or .md files
"""

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aymen_gpt.data import builtin, fetch, shards
from aymen_gpt.data.slices import FORMATS, Source, SourceFile, status_of
from aymen_gpt.errors import DataError, NetworkError, UsageError

DATASET, DATASET_FOLDER = "HuggingFaceFW/fineweb-edu", "sample/10BT"
# The commit that public training code of 2025 and 2026 pins: 14 files, 28.5 GB, 9,672,101 documents.
REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
SUFFIXES = tuple(FORMATS)
NAMED = 5  # files that an error names at most


def from_record(record: dict[str, Any], text_column: str | None = None) -> Source:
    """The source that a manifest names, its files out of reach. DataError for names that lead elsewhere."""
    listed = tuple(SourceFile(**file) for file in record["files"])
    for file in listed:
        fetch.check_name(file.name)
    return Source(listed, text_column, record["repo"], record["revision"])


def difference(before: Iterable[SourceFile], now: Iterable[SourceFile], *, times: bool = True) -> str:
    """How the files of a source differ, in words; "" when they do not. ``times``: of change, they count too."""
    old, new = ({file.name: (file.bytes, times and file.modified_ns) for file in files} for files in (before, now))
    differ = sorted(name for name in old | new if old.get(name) != new.get(name))
    words = [
        f"{name} {'is new' if name not in old else 'is gone' if name not in new else 'is not the same'}"
        for name in differ
    ]
    return ", ".join(words[:NAMED]) + f" and {len(words) - NAMED:,} more" * (len(words) > NAMED)


def open_source(
    words: Sequence[str],
    *,
    revision: str | None = None,
    text_column: str | None = None,
    out: Path | None = None,
) -> Source:
    """The files that the words mean, in order, without those in ``out``. UsageError when there are none.

    DataError for files and folders that cannot be read.
    """
    if list(words) == ["hub"]:
        with or_by_hand("give a folder that has them, --source FOLDER"):
            commit, listed = fetch.hub_list(
                DATASET, DATASET_FOLDER, revision=revision or REVISION, suffix=".parquet"
            )
        if not listed:
            raise DataError(f"{DATASET} has no parquet files in {DATASET_FOLDER} at revision {commit}")
        return Source(tuple(SourceFile(*file) for file in listed), text_column or "text", DATASET, commit)
    if revision is not None:
        raise UsageError(f"--revision names a commit of {DATASET}; it needs --source hub")
    found = [file for word in words for file in _files_of(word, out)]
    name, times = Counter(file.name for file in found).most_common(1)[0]
    if times > 1:
        raise UsageError(f"--source holds {name} twice; give each file once")
    return Source(tuple(found), text_column)


def _files_of(word: str, out: Path | None) -> list[SourceFile]:
    if word == "hub":
        raise UsageError("--source hub cannot be mixed with other sources")
    if word == "builtin":  # the name of the file carries the versions of all that it was made from
        path = builtin.build()
        return [SourceFile(path.name, path.stat().st_size, path=path)]
    path = Path(word)
    if not os.path.lexists(path):
        raise UsageError(f"--source {word}: no such file or folder (else it is `hub` or `builtin`)")
    if stat.S_ISDIR(status_of(path).st_mode):
        return _files_in(path, out)
    if path.suffix in (".bin", ".npy"):
        raise UsageError(f"--source {word}: tokens, no text; pretrain.py --data {path.parent} trains on them")
    if not path.name.endswith(SUFFIXES):
        raise UsageError(f"--source {word}: cannot read this kind of file, only {', '.join(SUFFIXES)}")
    return [_file(path.name, path)]


def _files_in(folder: Path, out: Path | None) -> list[SourceFile]:
    """The files of a folder in the order of their names, without hidden ones and what lies in ``out``."""
    if shards.list_shards(folder, "train") or shards.list_shards(folder, "val"):
        raise UsageError(
            f"--source {folder}: it holds token shards, no text; pretrain.py --data {folder} trains on them"
        )
    out = out and out.resolve()
    if out == folder.resolve():
        raise UsageError(f"--out {folder} is the source itself: take a folder of its own, as {folder / 'tokens'}")

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read {error.filename}: {error.strerror}")

    named: dict[str, Path] = {}
    for here, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name[0] != "." and Path(here, name).resolve() != out]
        paths = (Path(here, name) for name in names if _is_text(name, names))
        named |= {path.relative_to(folder).as_posix(): path for path in paths}
    if not named:
        raise UsageError(f"--source {folder}: the folder holds none of {', '.join(SUFFIXES)}")
    base = os.path.basename(os.path.abspath(folder))
    return [_file(f"{base}/{name}".lstrip("/"), named[name]) for name in sorted(named)]


def _is_text(name: str, beside: Sequence[str]) -> bool:
    """Whether a file of a folder is text by its name: not hidden, and no table that belongs to a shard."""
    stem, _, kind = name.removesuffix(".parquet").rpartition(".")
    table = kind == "documents" and f"{stem}.bin" in beside
    return name[0] != "." and name.endswith(SUFFIXES) and not table


def _file(name: str, path: Path) -> SourceFile:
    status = status_of(path)
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"--source {path}: a pipe or a device, no file; write its text into a file first")
    return SourceFile(name, status.st_size, path=path, modified_ns=status.st_mtime_ns)


@contextmanager
def or_by_hand(way: str) -> Iterator[None]:
    """Adds to a NetworkError how to go on without the Hub."""
    try:
        yield
    except NetworkError as error:
        raise NetworkError(f"{error}; or {way}") from None
