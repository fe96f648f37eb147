"""Where text comes from: the words after --source become files, and files become parts.

A part (one row group of a parquet file, one slice of a jsonl file, one txt file) is small to describe, can be sent
to another process, and can be read there alone; what cannot be entered half-way (a compressed file, a very
large row group) is cut up here, and its parts carry their rows with them. Files and parts have one fixed
order, so (file, part, row) names a document for good; rows are counted in the part, skipped ones included.

    hub              FineWeb-Edu's sample-10BT from the Hugging Face Hub (the default)
    builtin          the documentation on this machine (builtin.py)
    PATH             a file or a folder of .parquet, .jsonl, .jsonl.gz, .jsonl.zst, .txt or .md files
"""

import functools
import gzip
import io
import json
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aymen_gpt.data import builtin, fetch, shards
from aymen_gpt.data.tokenizer import utf8
from aymen_gpt.errors import AymenError, DataError, NetworkError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

DATASET, DATASET_FOLDER = "HuggingFaceFW/fineweb-edu", "sample/10BT"
# The commit that public training code of 2025 and 2026 pins: 14 files, 28.5 GB, 9,672,101 documents.
REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
WHOLE = (".txt", ".md")  # files that are one document
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", *WHOLE)
SLICE = 2**23  # bytes of a jsonl file that make one part
LARGE = 2**25  # bytes of a row group that is cut into parts
RESTART = "type the same command with --restart to prepare what is there now"
COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class SourceFile:
    """One file of the source. ``path`` is where it lies, None while it is still on the Hub."""

    name: str  # what the manifest calls it
    bytes: int
    sha256: str | None = None
    path: Path | None = None
    modified_ns: int | None = None  # None where its name already says what is in it


@dataclass(frozen=True)
class Source:
    """An ordered list of files, and where they come from."""

    files: tuple[SourceFile, ...]
    text_column: str | None = None
    repo: str | None = None  # of the Hub, when the files come from there
    revision: str | None = None  # the commit that the files belong to


@dataclass(frozen=True)
class Part:
    """A piece of a file that is read alone: a row group, or the lines that begin in bytes start to stop."""

    file: int  # number in Source.files
    index: int  # number in the file
    path: Path
    start: int
    stop: int
    text_column: str | None
    fraction: float  # of the file that is read when this part is
    version: tuple[int, int] = (0, 0)  # bytes and modification time (ns) that the file must still have
    rows: int | None = None  # of a row group
    content: Any = None  # the part's rows, when they travel with it: bytes, or an arrow RecordBatch
    skip: int = 0  # rows at the beginning that are not wanted


@dataclass(frozen=True)
class Document:
    """One row of a part; ``skipped`` says why it has no usable text."""

    row: int
    text: str
    id: str | None = None
    url: str | None = None
    skipped: Literal["empty", "null", "not a string", "not UTF-8", "not JSON", "nested too deep"] | None = None


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
        files = tuple(SourceFile(file.name, file.bytes, file.sha256) for file in listed)
        return Source(files, text_column or "text", DATASET, commit)
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
    if stat.S_ISDIR(_status(path).st_mode):
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
    table = kind in ("documents", "rows") and f"{stem}.bin" in beside
    return name[0] != "." and name.endswith(SUFFIXES) and not table


def _file(name: str, path: Path) -> SourceFile:
    status = _status(path)
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"--source {path}: a pipe or a device, no file; write its text into a file first")
    return SourceFile(name, status.st_size, path=path, modified_ns=status.st_mtime_ns)


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def bring(source: Source, number: int, folder: Path) -> Path:
    """The local path of a file, downloaded into ``folder`` first when it is still on the Hub."""
    file = source.files[number]
    if file.path is not None:
        return file.path
    assert source.repo is not None
    with or_by_hand(f"put it at {folder / file.name}"):
        return fetch.hub_file(
            source.repo,
            file.name,
            revision=source.revision,
            repo_type="dataset",
            folder=folder,
            sha256=file.sha256,
        )


@contextmanager
def or_by_hand(way: str) -> Iterator[None]:
    """Adds to a NetworkError how to go on without the Hub."""
    try:
        yield
    except NetworkError as error:
        raise NetworkError(f"{error}; or {way}") from None


def estimated_bytes(source: Source) -> int:
    """About how many bytes of text the source has: a function of its files, cheap to find out."""
    return sum(_estimated_bytes(file) for file in source.files)


def _estimated_bytes(file: SourceFile) -> int:
    if file.path is not None and file.name.endswith(".parquet"):
        with _readable(file.path):
            groups = _parquet(file.path).metadata
            return sum(groups.row_group(i).total_byte_size for i in range(groups.num_row_groups))
    return file.bytes * (2 if file.name.endswith((".parquet", ".gz", ".zst")) else 1)


def parts(source: Source, number: int, path: Path) -> Iterator[Part]:
    """The parts of one file, in order. DataError when it is not what its name says, or changes meanwhile."""
    file = source.files[number]
    kind = file.name
    modified = path.stat().st_mtime_ns if file.modified_ns is None else file.modified_ns
    version = file.bytes, modified
    with _readable(path, version):
        if kind.endswith(".parquet"):
            found = _parquet_parts(path, source.text_column)
        elif kind.endswith(COMPRESSED):
            found = _compressed_parts(path, source.text_column)
        else:
            found = _text_parts(path, source.text_column, file.bytes)
        for index, part in enumerate(found):
            yield replace(part, file=number, index=index, version=version)


def _parquet_parts(path: Path, text_column: str | None) -> Iterator[Part]:
    column = _text_column(path, text_column)
    file = _parquet(path)
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    total = sum(group.num_rows for group in groups)
    done = 0
    for i, group in enumerate(groups):
        done += group.num_rows
        part = Part(0, 0, path, i, i + 1, column, done / max(total, 1), rows=group.num_rows)
        if group.total_byte_size <= LARGE:
            yield part
        else:
            rows = max(group.num_rows * SLICE // group.total_byte_size, 1)
            for batch in _batches(file, part, rows):
                yield replace(part, content=batch, rows=len(batch))


def _compressed_parts(path: Path, text_column: str | None) -> Iterator[Part]:
    import pyarrow as pa

    with (
        path.open("rb") as packed,
        gzip.open(packed) if path.suffix == ".gz" else pa.input_stream(packed, compression="zstd") as stream,
    ):
        file = io.BufferedReader(stream, 2**20)
        while lines := file.readlines(SLICE):
            content = b"".join(lines)
            yield Part(
                0, 0, path, 0, len(content), text_column, packed.tell() / path.stat().st_size, content=content
            )


def _text_parts(path: Path, text_column: str | None, size: int) -> Iterator[Part]:
    step = size if path.suffix in WHOLE else SLICE
    for start in range(0, size, step or 1):
        stop = min(start + step, size)
        yield Part(0, 0, path, start, stop, text_column, stop / size)


def read(part: Part) -> Iterator[Document]:
    """The rows of a part from ``part.skip`` on. DataError when the file is damaged or has changed."""
    with _readable(part.path, part.version if part.content is None else None):
        if part.path.name.endswith(".parquet"):
            yield from _read_parquet(part)
        elif part.path.suffix in WHOLE:
            yield from _read_txt(part)
        else:
            yield from _read_jsonl(part)


@contextmanager
def _readable(path: Path, version: tuple[int, int] | None = None) -> Iterator[None]:
    """DataError when the file cannot be read, or does not have this version before and after it is read."""
    import pyarrow as pa

    try:
        _check_version(path, version)
        yield
    except (pa.ArrowException, zlib.error, OSError, EOFError) as error:
        if isinstance(error, AymenError):
            raise
        _check_version(path, version)
        raise DataError(_why_unreadable(path, error)) from None
    _check_version(path, version)


def _why_unreadable(path: Path, error: Exception) -> str:
    if number := getattr(error, "errno", None):
        return f"cannot read {path}: {os.strerror(number)}"
    reason = fetch.one_line(str(error))
    if "too much memory" in reason:
        return f"{path} was compressed with a window of more than 128 MB (zstd --long): compress it again without"
    again = f"get it again or remove it, then {RESTART}"
    return f"{path} is damaged or cut off ({reason}): {again}"


def _check_version(path: Path, version: tuple[int, int] | None) -> None:
    if version is None:
        return
    status = _status(path)
    if (status.st_size, status.st_mtime_ns) != version:
        sizes = f"{status.st_size:,} bytes, {version[0]:,} before"
        raise DataError(f"{path} changed while it was read ({sizes}): {RESTART}")


def _document(row: int, value: object, id: object = None, url: object = None) -> Document:
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError:
            return Document(row, "", skipped="not UTF-8")
    if value is None:
        return Document(row, "", skipped="null")
    if not isinstance(value, str):
        return Document(row, "", skipped="not a string")
    if not value or value.isspace():
        return Document(row, "", skipped="empty")
    return Document(row, value, _name(id), _name(url))


def _name(value: object) -> str | None:
    """An id or a url as text that can be written; what is not Unicode in it becomes U+FFFD."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return None if value is None else utf8(str(value)).decode()


def _parquet(path: Path) -> "pq.ParquetFile":
    """The file opened so that it reads no more than it must."""
    import pyarrow.parquet as pq

    metadata = _metadata(path, path.stat().st_mtime_ns)
    return pq.ParquetFile(path, metadata=metadata, buffer_size=2**20, pre_buffer=False)


@functools.lru_cache(maxsize=2)
def _metadata(path: Path, changed_ns: int) -> "pq.FileMetaData":
    """The file's footer, read once: it describes all row groups (6 ms for 730 of them), a part needs one."""
    import pyarrow.parquet as pq

    return pq.read_metadata(path)


def _batches(file: "pq.ParquetFile", part: Part, rows: int) -> Iterator["pa.RecordBatch"]:
    names = [n for n in ("id", "url") if file.schema_arrow.names.count(n) == 1 and n != part.text_column]
    columns = [part.text_column, *names]
    return file.iter_batches(rows, row_groups=[part.start], columns=columns, use_threads=False)


def _text_column(path: Path, wanted: str | None) -> str:
    """The column that holds the text: the wanted one, else text, else content, else the only one of strings."""
    schema = _parquet(path).schema_arrow
    strings = [field.name for field in schema if _holds_text(field.type)]
    names = [wanted] if wanted else ["text", "content", *(strings if len(strings) == 1 else [])]
    found = next((name for name in names if name in strings), None)
    if found and schema.names.count(found) == 1:
        return found
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    lack = f"{schema.names.count(found)} columns {found}" if found else f"no text column {wanted or 'text'}"
    raise UsageError(f"{path} has {lack}; its columns: {columns}; use --text-column NAME")


def _holds_text(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    names = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary")
    return any(getattr(pa.types, name)(kind) for name in names)


def _read_parquet(part: Part) -> Iterator[Document]:
    row = 0
    for batch in _batches(_parquet(part.path), part, 256) if part.content is None else [part.content]:
        wanted = batch.slice(min(max(part.skip - row, 0), len(batch)))
        row += len(batch) - len(wanted)
        nothing = [None] * len(wanted)
        names = ("id", "url")
        known = [_values(wanted.column(n)) if n in wanted.schema.names else nothing for n in names]
        for text, id, url in zip(_values(wanted.column(part.text_column)), *known, strict=True):
            yield _document(row, text, id, url)
            row += 1
    _check_all(part, row, part.rows, "rows")


def _values(column: "pa.Array") -> list[Any]:
    """The values as Python objects; a string that is not UTF-8 stays bytes, a date beyond Python's is a string."""
    import pyarrow as pa

    for kind in (None, pa.large_binary(), pa.string()):
        try:
            return (column if kind is None else column.cast(kind)).to_pylist()
        except (ValueError, OverflowError, pa.ArrowException):
            pass
    return [None] * len(column)


def _read_jsonl(part: Part) -> Iterator[Document]:
    row = -1
    for offset, line in _lines(part, part.start - 1):
        if offset >= part.stop:
            return
        row += offset >= part.start
        if row < part.skip or line.isspace():
            continue
        try:
            yield _record(row, json.loads(line.decode("utf-8-sig")), part.text_column)
        except UnicodeDecodeError:
            yield Document(row, "", skipped="not UTF-8")
        except ValueError:
            yield Document(row, "", skipped="not JSON")
        except RecursionError:
            yield Document(row, "", skipped="nested too deep")


def _record(row: int, record: object, text_column: str | None) -> Document:
    known = record if isinstance(record, dict) else {}
    return _document(row, _text_of(record, text_column), known.get("id"), known.get("url"))


def _text_of(record: object, key: str | None) -> object:
    if not isinstance(record, dict):
        return record
    strings = [name for name, value in record.items() if isinstance(value, str)]
    names = [key] if key else ["text", "content", *(strings if len(strings) == 1 else [])]
    return next((record[name] for name in names if name in record), None)


def _read_txt(part: Part) -> Iterator[Document]:
    content = part.path.read_bytes()
    _check_all(part, len(content), part.stop, "bytes")
    if not part.skip:
        yield _document(0, content, None, part.path.name)


def _lines(part: Part, start: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of every whole line that begins after byte ``start``, or at the first byte."""
    with part.path.open("rb") if part.content is None else io.BytesIO(part.content) as file:
        offset = max(start, 0)
        if offset:
            file.seek(offset)
            offset += len(file.readline())  # the rest of a line that belongs to an earlier part
        for line in file:
            yield offset, line
            offset += len(line)
    _check_all(part, offset, part.version[0] if part.content is None else len(part.content), "bytes")


def _check_all(part: Part, found: int, planned: int | None, unit: str) -> None:
    """DataError when a part that was read to its end held less, or more, than was planned."""
    if planned is not None and found != planned:
        raise DataError(f"{part.path} changed while it was read ({found:,} {unit}, {planned:,} before): {RESTART}")
