"""Files that are never half there: replace, sync, hash, read, lock. Every room may import this; no torch."""

import errno
import hashlib
import itertools
import json
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from aymen_gpt.errors import AymenError, CannotWrite, DataError

try:
    import fcntl
except ImportError:  # Windows: folders are not locked there
    fcntl = None  # type: ignore[assignment]


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
IN_THE_WAY = "a file stands where a folder should be"
REASONS = {errno.EEXIST: IN_THE_WAY, errno.ENOTDIR: IN_THE_WAY, errno.EISDIR: "this is a folder"}


@contextmanager
def writing(what: str, choose: str = "choose another path") -> Iterator[None]:
    """Around the writing of something: the system's OSErrors become a CannotWrite with the reason and the way out.

    Errors that speak to the user already, and those of libraries (which have no number), pass.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, AymenError) or error.errno is None:
            raise
        room = "make room or " if error.errno in FULL else ""
        reason = REASONS.get(error.errno, error.strerror)
        raise CannotWrite(f"cannot write {what}: {reason}; {room}{choose}") from error


def place_of(path: Path) -> tuple[Path | int, bool]:
    """Where the bytes of ``path`` belong, links followed, and whether that is a file to be replaced.

    A device, a pipe and what standard output goes to (1) are none: they are written through.
    """
    try:
        status = path.stat()
    except FileNotFoundError:  # nothing there, or a link to nothing
        return Path(os.path.realpath(path)), True
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    with suppress(OSError):  # standard output is closed
        if os.path.samestat(status, os.fstat(1)):
            return 1, False
    return Path(os.path.realpath(path)), stat.S_ISREG(status.st_mode)


def beside(path: Path) -> Path:
    """The name under which a file is written until it is whole."""
    return path.with_name(f".{path.name[-40:]}.{os.getpid()}.tmp")


@contextmanager
def whole_file(path: Path, *, follow: bool = False) -> Iterator[BinaryIO]:
    """A file to write that appears as ``path`` when the block ends well, complete and on the disk, or never.

    CannotWrite when it cannot be written, what was there before stays. A link is replaced, or followed with
    ``follow``; a device or a pipe gets the bytes as they come.
    """
    with writing(str(path), "choose another path, then run the same command again"):
        final, replace = place_of(path) if follow or not path.is_symlink() else (path, True)
        if isinstance(final, int) or not replace:
            sys.stdout.flush()
            with open(final, "wb", closefd=final != 1) as file:
                yield file
            return
        temporary = beside(final)
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, final)
            sync(final.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise now the CannotWrite that ``whole_file`` would raise when the work is done. Leaves nothing behind."""
    with writing(str(path)):
        final, replace = place_of(path)
        if isinstance(final, int) or not replace:
            return
        made = [folder for folder in final.parents if not folder.exists()]
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                final.stat()  # a name may be too long where the one beside it is not
            beside(final).touch()
            beside(final).unlink()
        finally:
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()


def sweep(folder: Path) -> None:
    """Delete what ``whole_file`` left in a folder in processes that are dead now."""
    for path in folder.glob(".*.tmp"):
        if (match := re.fullmatch(r"\..+\.(\d+)\.tmp", path.name)) and not _is_alive(int(match[1])):
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    """Whether another process has this number now; on Windows, which cannot say so cheaply, none has."""
    if pid == os.getpid() or os.name == "nt":
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:  # somebody else's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def write_whole(path: Path, content: bytes, *, follow: bool = False) -> None:
    with whole_file(path, follow=follow) as file:
        file.write(content)


def replace_text(path: Path, text: str, *, follow: bool = False) -> None:
    """Write a text file so that a reader sees the old or the new one, whole."""
    write_whole(path, text.encode(), follow=follow)


def free_name(path: Path) -> Path:
    """The first of PATH-1, PATH-2, ... that nothing has."""
    names = (path.with_name(f"{path.name}-{number}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def set_aside(path: Path) -> Path:
    """Rename what cannot be used, so that it stays for a look at it: NAME.damaged-1, or -2, ...; the new path."""
    return path.rename(free_name(path.with_name(f"{path.name}.damaged")))


def move_to_earlier(folder: Path, paths: Iterable[Path]) -> Path:
    """Move paths of a folder, one after the other, into its subfolder earlier-1, or -2, ..., which is returned."""
    target = free_name(folder / "earlier")
    target.mkdir()
    for path in paths:
        path.rename(target / path.name)
    return target


def sync(path: Path) -> None:
    """Return when a file's or folder's content is on the disk itself."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows syncs what it may write
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
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"cannot read {path}: {error}") from None


def json_object(content: bytes) -> dict[str, Any]:
    """The object that JSON in UTF-8 describes; ValueError, with the reason, for everything else."""
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("JSON nested too deep") from None
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def lock(folder: Path, option: str) -> TextIO:
    """Hold a folder (made if need be) for this process until the returned file is closed.

    Raises CannotWrite, naming the holder, when another process has it, or when nothing can be written there;
    ``option`` is the flag that chooses another folder.
    """
    with writing(f"into {folder}", f"choose another folder with {option}"):
        folder.mkdir(parents=True, exist_ok=True)
        f = (folder / ".lock").open("a+")
        try:
            if fcntl is not None:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            holder = f.read().strip() or "another process"
            raise CannotWrite(f"{folder} is in use by {holder}; stop it or use another {option}") from None
        f.truncate(0)
        f.write(f"pid {os.getpid()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
        f.flush()
        return f
