"""Files that are never half there: replace, sync, hash and lock. Every room may import this; it needs no torch."""

import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from aymen_gpt.errors import CannotWrite

try:
    import fcntl
except ImportError:  # Windows: folders are not locked there
    fcntl = None  # type: ignore[assignment]


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new one, whole."""
    partial = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


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
    except OSError as error:
        why = f"cannot write into {folder}: {error.strerror}; choose another folder with {option}"
        raise CannotWrite(why) from error
    try:
        if fcntl is not None:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.seek(0)
        raise CannotWrite(f"{folder} is in use by {f.read().strip()}; stop it or use another {option}") from None
    f.truncate(0)
    f.write(f"pid {os.getpid()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
    f.flush()
    return f
