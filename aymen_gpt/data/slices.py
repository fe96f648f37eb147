"""A source is a list of files; they become slices, and slices become documents.

A slice (one row group of a parquet file, 8 MiB of a jsonl file, one txt file) is small to describe, can be sent to
another process, and can be read there alone; what cannot be entered half-way (a compressed file, a very large row
group) is cut up here, and its slices carry their rows with them. Files and slices have one fixed order, so
(file, slice, row) names a document for good; rows are counted in the slice, skipped ones included.
"""

import functools
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aymen_gpt.data import fetch
from aymen_gpt.data.tokenizer import utf8
from aymen_gpt.errors import AymenError, DataError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

SLICE_BYTES = 2**23  # of a jsonl file
LARGE = 2**25  # bytes of a row group that is cut up
COMPRESSED = (".gz", ".zst")
RESTART = "type the same command with --restart to prepare what is there now"


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

    def record(self) -> dict[str, Any]:
        """The source as a manifest keeps it."""
        names = ("name", "bytes", "sha256", "modified_ns")
        listed = [{name: getattr(file, name) for name in names} for file in self.files]
        return {"repo": self.repo, "revision": self.revision, "files": listed}


@dataclass(frozen=True)
class Slice:
    """A piece of a file that is read alone: a row group, or the lines that begin in bytes start to stop."""

    file: int  # number in Source.files
    part: int  # its own number in the file
    path: Path
    start: int
    stop: int
    text_column: str | None
    version: tuple[int, int]  # bytes and modification time (ns) that the file must still have
    fraction: float = 1  # of the file that is read when this slice is
    content: Any = None  # the slice's rows, when they travel with it: bytes, or an arrow RecordBatch


@dataclass(frozen=True)
class Document:
    """One row of a slice; ``skipped`` says why it has no usable text."""

    row: int
    text: str
    id: str | None = None
    url: str | None = None
    skipped: Literal["empty", "null", "not a string", "not UTF-8", "not JSON", "nested too deep"] | None = None


def estimated_bytes(source: Source) -> int:
    """About how many bytes of text the source has: a function of its files, cheap to find out."""
    total = 0
    for file in source.files:
        if file.path is not None and file.name.endswith(".parquet"):
            with _readable(file.path):
                groups = _parquet(file.path).metadata
                total += sum(groups.row_group(i).total_byte_size for i in range(groups.num_row_groups))
        else:
            total += file.bytes * (2 if file.name.endswith((".parquet", *COMPRESSED)) else 1)
    return total


def slices_of(source: Source, number: int, path: Path) -> Iterator[Slice]:
    """The slices of one file, in order. DataError when it is not what its name says, or changes meanwhile."""
    file = source.files[number]
    modified = status_of(path).st_mtime_ns if file.modified_ns is None else file.modified_ns
    whole = Slice(number, 0, path, 0, file.bytes, source.text_column, (file.bytes, modified))
    with _readable(path, whole.version):
        cut = _format(file.name)[0]
        for part, slice in enumerate(cut(whole)):
            yield replace(slice, part=part)


def read(slice: Slice) -> Iterator[Document]:
    """The rows of a slice. DataError when the file is damaged or has changed."""
    with _readable(slice.path, slice.version if slice.content is None else None):
        yield from _format(slice.path.name)[1](slice)


def status_of(path: Path) -> os.stat_result:
    """What the system says of a file. DataError when it says nothing."""
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


@contextmanager
def _readable(path: Path, version: tuple[int, int] | None = None) -> Iterator[None]:
    """DataError when the file cannot be read, or does not have this version before and after it is read."""
    import pyarrow as pa

    def check() -> None:
        status = status_of(path)
        if version not in (None, (status.st_size, status.st_mtime_ns)):
            sizes = f"{status.st_size:,} bytes, {version[0]:,} before"
            raise DataError(f"{path} changed while it was read ({sizes}): {RESTART}")

    try:
        check()
        yield
    except AymenError:
        raise
    except (pa.ArrowException, zlib.error, OSError, EOFError) as error:
        check()
        raise DataError(_why_unreadable(path, error)) from None
    check()


def _why_unreadable(path: Path, error: Exception) -> str:
    if number := getattr(error, "errno", None):
        return f"cannot read {path}: {os.strerror(number)}"
    reason = fetch.one_line(str(error))
    if "too much memory" in reason:
        return f"{path} was compressed with a window of more than 128 MB (zstd --long): compress it again without"
    return f"{path} is damaged or cut off ({reason}): get it again or remove it, then {RESTART}"


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


def _text_names(strings: list[str], wanted: str | None) -> list[str]:
    """Where text may be, best first: under the wanted name, else text, else content, else in the only strings."""
    return [wanted] if wanted else ["text", "content", *(strings if len(strings) == 1 else [])]


def _parquet(path: Path) -> "pq.ParquetFile":
    """The file opened so that it reads no more than it must."""
    import pyarrow.parquet as pq

    metadata = _metadata(path, path.stat().st_mtime_ns)
    return pq.ParquetFile(path, metadata=metadata, buffer_size=2**20, pre_buffer=False)


@functools.lru_cache(maxsize=2)
def _metadata(path: Path, changed_ns: int) -> "pq.FileMetaData":
    """The file's footer, read once: it describes all row groups (6 ms for 730 of them), a slice needs one."""
    import pyarrow.parquet as pq

    return pq.read_metadata(path)


def _cut_parquet(whole: Slice) -> Iterator[Slice]:
    file = _parquet(whole.path)
    column = _text_column(whole.path, file.schema_arrow, whole.text_column)
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    done, total = 0, sum(group.num_rows for group in groups)
    for i, group in enumerate(groups):
        done += group.num_rows
        slice = replace(whole, start=i, stop=i + 1, text_column=column, fraction=done / max(total, 1))
        if group.total_byte_size <= LARGE:
            yield slice
        else:
            rows = max(group.num_rows * SLICE_BYTES // group.total_byte_size, 1)
            for batch in _batches(file, slice, rows):
                yield replace(slice, content=batch)


def _text_column(path: Path, schema: "pa.Schema", wanted: str | None) -> str:
    """The column that holds the text. UsageError, with all columns, when there is none or it is there twice."""
    kinds = re.compile(r"(dictionary<values=)?(large_)?(string|binary)(_view)?\b")
    strings = [field.name for field in schema if kinds.match(str(field.type))]
    found = next((name for name in _text_names(strings, wanted) if name in strings), None)
    if found and schema.names.count(found) == 1:
        return found
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    lack = f"{schema.names.count(found)} columns {found}" if found else f"no text column {wanted or 'text'}"
    raise UsageError(f"{path} has {lack}; its columns: {columns}; use --text-column NAME")


def _batches(file: "pq.ParquetFile", slice: Slice, rows: int) -> Iterator["pa.RecordBatch"]:
    names = [n for n in ("id", "url") if file.schema_arrow.names.count(n) == 1 and n != slice.text_column]
    columns = [slice.text_column, *names]
    return file.iter_batches(rows, row_groups=[slice.start], columns=columns, use_threads=False)


def _read_parquet(slice: Slice) -> Iterator[Document]:
    row = 0
    for batch in _batches(_parquet(slice.path), slice, 256) if slice.content is None else [slice.content]:
        nothing = [None] * len(batch)
        known = [_values(batch.column(n)) if n in batch.schema.names else nothing for n in ("id", "url")]
        for text, id, url in zip(_values(batch.column(slice.text_column)), *known, strict=True):
            yield _document(row, text, id, url)
            row += 1


def _values(column: "pa.Array") -> list[Any]:
    """The values as Python objects; a string that is not UTF-8 stays bytes, a date beyond Python's is a string."""
    import pyarrow as pa

    for kind in (None, pa.large_binary(), pa.string()):
        try:
            return (column if kind is None else column.cast(kind)).to_pylist()
        except (ValueError, OverflowError, pa.ArrowException):
            pass
    return [None] * len(column)


def _cut_jsonl(whole: Slice) -> Iterator[Slice]:
    for start in range(0, whole.stop, SLICE_BYTES):
        stop = min(start + SLICE_BYTES, whole.stop)
        yield replace(whole, start=start, stop=stop, fraction=stop / whole.stop)


def _cut_compressed(whole: Slice) -> Iterator[Slice]:
    import pyarrow as pa

    with whole.path.open("rb") as packed:
        unzipped = gzip.GzipFile(fileobj=packed) if whole.path.suffix == ".gz" else pa.input_stream(packed, "zstd")
        file = io.BufferedReader(unzipped, 2**20)
        while lines := file.readlines(SLICE_BYTES):
            content = b"".join(lines)
            yield replace(whole, stop=len(content), fraction=packed.tell() / whole.stop, content=content)


def _read_jsonl(slice: Slice) -> Iterator[Document]:
    for row, line in enumerate(_lines(slice)):
        if line.isspace():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            yield Document(row, "", skipped="not UTF-8")
        except ValueError:
            yield Document(row, "", skipped="not JSON")
        except RecursionError:
            yield Document(row, "", skipped="nested too deep")
        else:
            known = record if isinstance(record, dict) else {"text": record}
            strings = [name for name, value in known.items() if isinstance(value, str)]
            names = _text_names(strings, slice.text_column if known is record else None)
            text = next((known[name] for name in names if name in known), None)
            yield _document(row, text, known.get("id"), known.get("url"))


def _lines(slice: Slice) -> Iterator[bytes]:
    """The lines that begin in a slice."""
    with slice.path.open("rb") if slice.content is None else io.BytesIO(slice.content) as file:
        if slice.start:
            file.seek(slice.start - 1)
            file.readline()  # the rest of a line that belongs to an earlier slice
        while file.tell() < slice.stop and (line := file.readline()):
            yield line


def _cut_text(whole: Slice) -> Iterator[Slice]:
    if whole.stop:
        yield whole


def _read_text(slice: Slice) -> Iterator[Document]:
    yield _document(0, slice.path.read_bytes(), None, slice.path.name)


# How files are cut into slices and how these are read, by the ends of their names.
FORMATS = {
    ".parquet": (_cut_parquet, _read_parquet),
    ".jsonl": (_cut_jsonl, _read_jsonl),
    ".jsonl.gz": (_cut_compressed, _read_jsonl),
    ".jsonl.zst": (_cut_compressed, _read_jsonl),
    ".txt": (_cut_text, _read_text),
    ".md": (_cut_text, _read_text),
}


def _format(name: str) -> tuple[Callable[[Slice], Iterator[Slice]], Callable[[Slice], Iterator[Document]]]:
    return next(FORMATS[ending] for ending in FORMATS if name.endswith(ending))
