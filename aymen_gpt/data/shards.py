"""Token shards: llm.c's .bin files, and the folder that holds them.

A shard is 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros) and then the tokens
as little-endian uint16. llm.c and modded-nanogpt read and write the same files. nanoGPT's headerless
train.bin and val.bin and .npy shards are read too. docs/data-format.md describes the folder for people.
"""

import functools
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from aymen_gpt import files
from aymen_gpt.data import fetch
from aymen_gpt.data.tokenizer import EOT, VOCAB_BPE_SHA256, VOCAB_SIZE
from aymen_gpt.errors import CannotWrite, DataError
from aymen_gpt.files import json_object, read_json, whole_file, write_whole

MANIFEST = "manifest.json"
FORMAT = "aymen-gpt shards, version 1"
TOKENIZER = {"name": "gpt2", "vocabulary_sha256": VOCAB_BPE_SHA256, "separator": EOT}
MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4
CHECKED = ".checked.json"  # in a folder of shards: which files check_shards has read and found right
CHUNK = 2**22  # tokens of a shard that are looked at together
READERS = 4  # shards that are read at the same time to be checked
_warn_once = functools.cache(warnings.warn)


def shard_name(split: str, index: int, corpus: str = "edufineweb") -> str:
    """The name that llm.c's loader finds by the pattern CORPUS_train_*.bin."""
    return f"{corpus}_{split}_{index:06d}.bin"


def write_shard(path: Path, tokens: np.ndarray | Iterable[np.ndarray]) -> int:
    """Write tokens, given whole or piece by piece, as one shard; it appears complete or not at all.

    Returns the number of tokens. CannotWrite when there is no room.
    """
    n_tokens = 0
    with whole_file(path) as file:
        file.write(bytes(HEADER_BYTES))
        for piece in [tokens] if isinstance(tokens, np.ndarray) else tokens:
            file.write(np.ascontiguousarray(piece, "<u2").data)
            n_tokens += len(piece)
        header = np.zeros(256, "<i4")
        header[:3] = MAGIC, VERSION, n_tokens
        file.seek(0)
        file.write(header.data)
    return n_tokens


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, read-only and memory-mapped: (n_tokens,) uint16.

    DataError names the file, what was found and what was expected.
    """
    with _readable(path):
        return _open_npy(path) if path.suffix == ".npy" else _open_bin(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the system says of a file of the folder into a DataError."""
    try:
        yield
    except FileNotFoundError:
        raise _damaged(path, "is missing") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot read {path}: {error.strerror or error}: make it readable, or move it away")


def _damaged(path: Path, why: str) -> DataError:
    kind = "" if path.suffix == ".parquet" else "shard "
    return DataError(f"{kind}{path} {why}: {way_out(path.parent)}")


def way_out(folder: Path) -> str:
    """What to do when a file of the folder is damaged."""
    with suppress(DataError):
        manifest = read_manifest(folder) or {}
        if "options" in manifest:
            return f"rebuild it with python fineweb.py --out {folder} --repair"
        if manifest:
            return f"get it again, or delete {folder / MANIFEST} if it was changed on purpose"
    return "get it again"


def _open_bin(path: Path) -> np.ndarray:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), "<i4")
    if header[0] == MAGIC:
        if header[1] != VERSION:
            raise DataError(f"shard {path} has version {header[1]}; only version {VERSION} (uint16) can be read")
        offset, n_tokens = HEADER_BYTES, int(header[2])
    elif path.name in ("train.bin", "val.bin"):  # nanoGPT: nothing but tokens
        offset, n_tokens = 0, size // 2
    else:
        raise _damaged(path, f"begins with {header[0]}, not with llm.c's magic number {MAGIC}")
    expected = offset + 2 * n_tokens
    if size != expected or n_tokens <= 0:
        raise _damaged(path, f"has {size:,} bytes; {n_tokens:,} tokens need {expected:,}")
    return np.memmap(path, "<u2", "r", offset=offset, shape=(n_tokens,))


def _open_npy(path: Path) -> np.ndarray:
    """A row of integers of any type; no pickle, no archive.

    numpy reads only the header: asked to map a file itself, it crashes with some headers.
    """
    with path.open("rb") as file:
        try:
            major, minor = np.lib.format.read_magic(file)
            shape, _, dtype = getattr(np.lib.format, f"read_array_header_{major}_{minor}")(file)
        except OSError:
            raise
        except Exception as error:  # ValueError, TypeError, RecursionError, MemoryError, tokenize's own, ...
            reason = fetch.one_line(f"{type(error).__name__}: {error}")
            raise _damaged(path, f"is not a readable .npy array ({reason})") from None
        offset, size = file.tell(), path.stat().st_size
    if len(shape) != 1 or shape[0] < 1 or dtype.kind not in "iu":
        raise DataError(f"shard {path} holds {shape} {dtype}; a shard is a row of uint16")
    if (expected := offset + shape[0] * dtype.itemsize) != size:
        raise _damaged(path, f"is not a readable .npy array ({size:,} bytes, not {expected:,})")
    tokens = np.memmap(path, dtype, "r", offset=offset, shape=shape)
    if dtype == np.dtype("<u2"):
        return tokens
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= 2**16:
        raise DataError(f"shard {path} holds {dtype} ids from {low} to {high}; they do not fit into uint16")
    _warn_once(f"shard {path} holds {dtype}: read into memory as uint16")
    converted = tokens.astype("<u2")
    converted.flags.writeable = False
    return converted


def list_shards(folder: Path, split: str) -> list[Path]:
    """The shards of a split ("train" or "val") in the order of their numbers; temporary files never match.

    A folder without numbered shards may hold one without a number: nanoGPT's train.bin, llm.c's NAME_train.bin.
    """
    pattern = re.compile(rf"(?:\w[\w.-]*_)?{split}(?:_(\d{{6}}))?\.(?:bin|npy)")
    found: dict[int, Path] = {}
    with _readable(folder):
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in inside:
        if match := pattern.fullmatch(path.name):
            index = int(match[1] or -1)
            if index in found:
                number = f"have number {index}" if match[1] else "have no number"
                raise DataError(f"two {split} shards {number}: {found[index]} and {path.name}")
            found[index] = path
    numbered = [found[index] for index in sorted(found) if index >= 0]
    return numbered or list(found.values())


def sources_path(shard: Path) -> Path:
    """Beside a shard lies a parquet file with the id and url of each of its documents, in their order."""
    return shard.with_suffix(".documents.parquet")


def write_document_sources(shard: Path, ids: list[str | None], urls: list[str | None]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"id": pa.array(ids, pa.string()), "url": pa.array(urls, pa.string())})
    with whole_file(sources_path(shard)) as file:
        pq.write_table(table, file, compression="zstd")


def read_document_sources(shard: Path, n_documents: int) -> list[tuple[str | None, str | None]] | None:
    """(id, url) of each document of a shard, None when nobody recorded them. DataError for a damaged table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = sources_path(shard)
    if not path.exists():
        return None
    try:  # from the path: Arrow's threads must hold no Python object when the process ends (they abort it)
        table = pq.read_table(path, columns=["id", "url"])
        rows = list(zip(table["id"].to_pylist(), table["url"].to_pylist(), strict=True))
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        raise _damaged(path, f"is damaged ({fetch.one_line(str(error))})") from None
    if len(rows) != n_documents or {field.type for field in table.schema} != {pa.string()}:
        raise _damaged(path, f"is damaged (it does not name {n_documents:,} documents)")
    return rows


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    content = manifest | {"checksum": _hash(manifest)}
    write_whole(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder of shards, None when it has none; DataError when it cannot be used.

    Its checksum finds damage. One without (as after an edit by hand) must have what every folder needs.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        manifest = json_object(content)
        if manifest.get("format", FORMAT) != FORMAT:
            raise ValueError(f"it says {manifest['format']!r}; this version reads {FORMAT!r}")
        checksum = manifest.pop("checksum", None)
        if checksum not in (None, _hash(manifest)):
            raise ValueError("its checksum is another")
        if not _has(manifest, format=str, complete=bool, tokenizer=dict, shards=list):
            raise ValueError("format, complete, tokenizer or shards is not as it should be")
        for shard in manifest["shards"]:
            if not _has(shard, file=str, tokens=int, sha256=str):
                raise ValueError("file, tokens or sha256 of a shard is not as it should be")
            if not re.fullmatch(r"\w[\w.-]*\.(bin|npy|arrow)", shard["file"]):
                raise ValueError(f"unsafe path {shard['file']!r}")
    except ValueError as error:
        again = "fineweb.py with the same options prepares the text anew, pretrain.py takes the shards as they are"
        raise DataError(f"{path} is damaged ({error}): delete it, then {again}") from None
    return manifest


def _has(record: Any, **kinds: type) -> bool:
    """Whether this is an object with at least these keys, each of its kind."""
    return isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in kinds.items())


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def finished_manifest(folder: Path) -> dict[str, Any] | None:
    """``read_manifest``, and DataError when a preparation of the folder was interrupted."""
    manifest = read_manifest(folder)
    if manifest and not manifest["complete"]:
        raise DataError(f"{folder} is not finished: run the same fineweb.py command again")
    return manifest


def check_shards(folder: Path) -> str:
    """What training asks when it starts: is every shard what the manifest says, and every id one of GPT-2's?

    Returns the identity of the tokens: a hash of the tokenizer's record, and of each shard's name and hash.
    All bytes are read, a GB a second and core, but only once: CHECKED remembers the files that were right by
    their size, time of change and inode. A folder without a manifest, as other programs make it, gets one.
    DataError names the first file that is wrong.
    """
    paths = list_shards(folder, "val") + list_shards(folder, "train")
    if manifest := finished_manifest(folder):
        _check_folder(folder, manifest, {path.name for path in paths})
    recorded = {shard["file"]: shard["sha256"] for shard in manifest["shards"]} if manifest else {}
    checked, versions = {}, {path.name: _version(path) for path in paths}
    with suppress(DataError):
        checked = read_json(folder / CHECKED)
    new = [path for path in paths if checked.get(path.name) != [*versions[path.name], recorded.get(path.name, "")]]
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda path: _read_through(path, recorded.get(path.name)), new))
    if manifest is None:
        manifest = {"format": FORMAT, "complete": True, "tokenizer": TOKENIZER, "shards": found}
        warnings.warn(f"{folder} has no {MANIFEST}: {_take_in(folder, manifest)}", stacklevel=2)
    if new:
        right = {shard["file"]: [*versions[shard["file"]], shard["sha256"]] for shard in manifest["shards"]}
        with suppress(CannotWrite):  # then they are read again the next time
            write_whole(folder / CHECKED, json.dumps(right, indent=1).encode())
    shards = [[shard["file"], shard["tokens"], shard["sha256"]] for shard in manifest["shards"]]
    return _hash([manifest["tokenizer"], shards])


def _take_in(folder: Path, manifest: dict[str, Any]) -> str:
    """Write the manifest of shards that another program made; returns what they are, in words."""
    tokens, documents = (sum(shard[key] for shard in manifest["shards"]) for key in ("tokens", "documents"))
    what = f"its {len(manifest['shards'])} shards hold {tokens:,} tokens in {documents:,} documents"
    if not documents:
        what = f"its shards hold {tokens:,} tokens and no separator (id {EOT}); are they GPT-2's?"
    try:
        write_manifest(folder, manifest)
    except CannotWrite:
        return f"{what}; they are read at every start, because nothing can be written there"
    return f"{what}; it is written now, with their sha256"


def _version(path: Path) -> tuple[int, int, int]:
    with _readable(path):
        status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _read_through(path: Path, sha256: str | None) -> dict[str, Any]:
    """The record of a shard for a manifest, of all its bytes. DataError for another sha256 or a wrong id."""
    tokens, documents = open_shard(path), 0
    if sha256 is None:
        with _readable(path):
            sha256 = files.sha256(path)
    elif why := _difference(path, sha256):
        raise _damaged(path, f"has {why}")
    for start in range(0, len(tokens), CHUNK):
        piece = tokens[start : start + CHUNK]
        documents += int(np.count_nonzero(piece == EOT))
        if piece.max() >= VOCAB_SIZE:
            at = int(np.argmax(piece >= VOCAB_SIZE))
            place = f"id {piece[at]} at position {start + at:,}"
            raise DataError(f"shard {path} has {place} (vocabulary {VOCAB_SIZE})")
    return {"file": path.name, "tokens": len(tokens), "documents": documents, "sha256": sha256}


def _difference(path: Path, sha256: str) -> str:
    """How a file differs from what the manifest says of it, in words; "" when it does not."""
    if not path.exists():
        return "missing"
    with _readable(path):
        found = files.sha256(path)
    return "" if found == sha256 else f"sha256 {found[:12]}…, not {sha256[:12]}…"


def _check_folder(folder: Path, manifest: dict[str, Any], present: set[str]) -> None:
    made_with = manifest["tokenizer"]
    if (made_with.get("vocabulary_sha256"), made_with.get("separator")) != (VOCAB_BPE_SHA256, EOT):
        name = f"{made_with.get('name')}, separator {made_with.get('separator')}"
        raise DataError(
            f"{folder} was made with another tokenizer ({name}) than GPT-2's (separator {EOT}): "
            "prepare its text with python fineweb.py"
        )
    listed = {shard["file"]: shard["tokens"] for shard in manifest["shards"]}
    if extra := sorted(present - set(listed)):
        or_take_it = "" if "options" in manifest else f", or delete {MANIFEST} to have all files read anew"
        raise DataError(f"{folder} holds {extra[0]}, which its {MANIFEST} does not list: move it away{or_take_it}")
    for name, n_tokens in listed.items():
        found = len(open_shard(folder / name))
        if found != n_tokens:
            raise _damaged(folder / name, f"has {found:,} tokens, {MANIFEST} says {n_tokens:,}")


def verify(folder: Path) -> dict[str, str]:
    """Read every byte of every file in the manifest; what is damaged, and why, by file name."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(f"{folder} has no {MANIFEST}, so there is nothing to compare its shards with")
    recorded = {shard["file"]: shard["sha256"] for shard in manifest["shards"]}
    for shard in manifest["shards"]:
        if "documents_sha256" in shard:
            recorded[sources_path(Path(shard["file"])).name] = shard["documents_sha256"]
    return {name: why for name, sha256 in recorded.items() if (why := _difference(folder / name, sha256))}
