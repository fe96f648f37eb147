"""Files of a source become slices, and slices become documents.

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
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aymen_gpt.data import fetch
from aymen_gpt.data.sources import RESTART, WHOLE, Source, SourceFile, status_of
from aymen_gpt.data.tokenizer import utf8
from aymen_gpt.errors import AymenError, DataError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

SLICE_BYTES = 2**23  # of a jsonl file
LARGE = 2**25  # bytes of a row group that is cut up
COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class Slice:
    """A piece of a file that is read alone: a row group, or the lines that begin in bytes start to stop."""

    file: int  # number in Source.files
    part: int  # its own number in the file
    path: Path
    start: int
    stop: int
    text_column: str | None
    fraction: float  # of the file that is read when this slice is
    version: tuple[int, int] = (0, 0)  # bytes and modification time (ns) that the file must still have
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
    return sum(_estimated_bytes(file) for file in source.files)


def _estimated_bytes(file: SourceFile) -> int:
    if file.path is not None and file.name.endswith(".parquet"):
        with _readable(file.path):
            groups = _parquet(file.path).metadata
            return sum(groups.row_group(i).total_byte_size for i in range(groups.num_row_groups))
    return file.bytes * (2 if file.name.endswith((".parquet", *COMPRESSED)) else 1)


def slices_of(source: Source, number: int, path: Path) -> Iterator[Slice]:
    """The slices of one file, in order. DataError when it is not what its name says, or changes meanwhile."""
    file = source.files[number]
    kind = file.name
    modified = status_of(path).st_mtime_ns if file.modified_ns is None else file.modified_ns
    version = file.bytes, modified
    with _readable(path, version):
        if kind.endswith(".parquet"):
            found = _parquet_slices(path, source.text_column)
        elif kind.endswith(COMPRESSED):
            found = _compressed_slices(path, source.text_column)
        else:
            found = _jsonl_slices(path, source.text_column, file.bytes)
        for part, slice in enumerate(found):
            yield replace(slice, file=number, part=part, version=version)


def _parquet_slices(path: Path, text_column: str | None) -> Iterator[Slice]:
    column = _text_column(path, text_column)
    file = _parquet(path)
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    total = sum(group.num_rows for group in groups)
    done = 0
    for i, group in enumerate(groups):
        done += group.num_rows
        slice = Slice(0, 0, path, i, i + 1, column, done / max(total, 1))
        if group.total_byte_size <= LARGE:
            yield slice
        else:
            rows = max(group.num_rows * SLICE_BYTES // group.total_byte_size, 1)
            for batch in _batches(file, slice, rows):
                yield replace(slice, content=batch)


def _compressed_slices(path: Path, text_column: str | None) -> Iterator[Slice]:
    import pyarrow as pa

    with (
        path.open("rb") as packed,
        gzip.open(packed) if path.suffix == ".gz" else pa.input_stream(packed, compression="zstd") as stream,
    ):
        file = io.BufferedReader(stream, 2**20)
        while lines := file.readlines(SLICE_BYTES):
            content = b"".join(lines)
            yield Slice(
                0, 0, path, 0, len(content), text_column, packed.tell() / path.stat().st_size, content=content
            )


def _jsonl_slices(path: Path, text_column: str | None, size: int) -> Iterator[Slice]:
    step = size if path.suffix in WHOLE else SLICE_BYTES
    for start in range(0, size, step or 1):
        stop = min(start + step, size)
        yield Slice(0, 0, path, start, stop, text_column, stop / size)


def read(slice: Slice) -> Iterator[Document]:
    """The rows of a slice. DataError when the file is damaged or has changed."""
    with _readable(slice.path, slice.version if slice.content is None else None):
        if slice.path.name.endswith(".parquet"):
            yield from _read_parquet(slice)
        elif slice.path.suffix in WHOLE:
            yield from _read_txt(slice)
        else:
            yield from _read_jsonl(slice)


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
    status = status_of(path)
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
    """The file's footer, read once: it describes all row groups (6 ms for 730 of them), a slice needs one."""
    import pyarrow.parquet as pq

    return pq.read_metadata(path)


def _batches(file: "pq.ParquetFile", slice: Slice, rows: int) -> Iterator["pa.RecordBatch"]:
    names = [n for n in ("id", "url") if file.schema_arrow.names.count(n) == 1 and n != slice.text_column]
    columns = [slice.text_column, *names]
    return file.iter_batches(rows, row_groups=[slice.start], columns=columns, use_threads=False)


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


def _read_jsonl(slice: Slice) -> Iterator[Document]:
    for row, line in enumerate(_lines(slice)):
        if line.isspace():
            continue
        try:
            yield _record(row, json.loads(line.decode("utf-8-sig")), slice.text_column)
        except UnicodeDecodeError:
            yield Document(row, "", skipped="not UTF-8")
        except ValueError:
            yield Document(row, "", skipped="not JSON")
        except RecursionError:
            yield Document(row, "", skipped="nested too deep")


def _lines(slice: Slice) -> Iterator[bytes]:
    """The lines that begin in a slice."""
    with slice.path.open("rb") if slice.content is None else io.BytesIO(slice.content) as file:
        if slice.start:
            file.seek(slice.start - 1)
            file.readline()  # the rest of a line that belongs to an earlier slice
        while file.tell() < slice.stop and (line := file.readline()):
            yield line


def _record(row: int, record: object, text_column: str | None) -> Document:
    known = record if isinstance(record, dict) else {}
    return _document(row, _text_of(record, text_column), known.get("id"), known.get("url"))


def _text_of(record: object, key: str | None) -> object:
    if not isinstance(record, dict):
        return record
    strings = [name for name, value in record.items() if isinstance(value, str)]
    names = [key] if key else ["text", "content", *(strings if len(strings) == 1 else [])]
    return next((record[name] for name in names if name in record), None)


def _read_txt(slice: Slice) -> Iterator[Document]:
    yield _document(0, slice.path.read_bytes(), None, slice.path.name)
