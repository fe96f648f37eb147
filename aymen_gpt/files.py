"""Files that are never half there: replace, sync, hash, read, lock. Every room may import this; no torch."""

import errno
import hashlib
import itertools
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


def free_name(path: Path) -> Path:
    """The first of PATH-1, PATH-2, ... that nothing has."""
    names = (path.with_name(f"{path.name}-{number}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def set_aside(path: Path) -> Path:
    """Rename what cannot be used, so that it stays for a look at it: NAME.damaged-1, or -2, ...; the new path."""
    return path.rename(free_name(path.with_name(f"{path.name}.damaged")))


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


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; DataError, naming the file and the reason, when there is none to read."""
    try:
        return json_object(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot read {path}: {reason}") from None


def json_object(content: bytes) -> dict[str, Any]:
    """The object that JSON in UTF-8 describes; ValueError, with the reason, for everything else."""
    try:
        value = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 at byte {error.start:,}") from None
    except RecursionError:
        raise ValueError("JSON nested too deep") from None
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"JSON of a {type(value).__name__}, not of an object")
    return value


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
