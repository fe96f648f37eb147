"""Files that are never half there: replace, sync, hash and lock. Every room may import this; it needs no torch."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from aymen_gpt.errors import CannotWrite, DataError

try:
    import fcntl
except ImportError:  # Windows: folders are not locked there
    fcntl = None  # type: ignore[assignment]


CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears as ``path`` when the block ends well, complete and on the disk, or never.

    CannotWrite when the disk is full or read-only; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        reason = f"cannot write {path}: {error.strerror}; make room or choose another folder"
        raise CannotWrite(f"{reason}, then run the same command again") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    with whole_file(path) as file:
        file.write(content)


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new one, whole."""
    write_whole(path, text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. DataError, naming it, when it cannot be read or holds anything else."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number of 5,000 digits; nested too deep
        raise DataError(f"{path} is damaged ({error})") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} is damaged (it holds {type(found).__name__}, no JSON object)")
    return found


def sync(path: Path) -> None:
    """Return when a file's or folder's content is on the disk itself."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def lock(folder: Path, option: str) -> TextIO:
    """Hold a folder (made if need be) for this process until the returned file is closed.

    Raises CannotWrite, naming the holder, when another process has it, or when nothing can be written there;
    ``option`` is the flag that chooses another folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        f = (folder / ".lock").open("a+")
        if fcntl is not None:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        f.truncate(0)
        f.write(f"pid {os.getpid()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
        f.flush()
    except BlockingIOError:
        f.seek(0)
        raise CannotWrite(f"{folder} is in use by {f.read().strip()}; stop it or use another {option}") from None
    except OSError as error:
        room = "make room or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        why = f"cannot write into {folder}: {error.strerror}; {room}choose another folder with {option}"
        raise CannotWrite(why) from error
    return f
