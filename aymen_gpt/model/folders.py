"""Where the checkpoints of a run are, and which of them can be trusted. Needs no torch."""

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from aymen_gpt.errors import DataError
from aymen_gpt.files import read_json, sha256

MODEL = ("config.json", "model.safetensors")  # the files that a model is read from
TRAINING = (*MODEL, "state.json", "optimizer.safetensors")  # and those that its training goes on from
NAME = re.compile(r"step-([0-9]{9})")
_hashes: dict[tuple[int, ...], str] = {}  # what this process has read, by device, inode, size and time of change


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:09d}"


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first, damaged ones included; DataError when they cannot be listed."""
    folder = run / "checkpoints"
    try:
        return sorted((p for p in folder.iterdir() if NAME.fullmatch(p.name)), reverse=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}; move it away, or name another run") from None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def problem(checkpoint: Path, needed: tuple[str, ...] = TRAINING, *, remember: bool = False) -> str | None:
    """Why a checkpoint cannot be trusted, in words; None when each needed file is as the manifest says.

    With ``remember`` a file that this process has read before is not read again, unless its size, inode or time of
    change is another.
    """
    try:
        manifest = read_json(checkpoint / "manifest.json")
    except DataError:
        return "manifest.json is missing or unreadable"
    step, files = manifest.get("step"), manifest.get("files")
    if NAME.fullmatch(checkpoint.name) and step != step_of(checkpoint):
        return f"manifest.json is that of step {step}"
    files = files if isinstance(files, dict) else {}
    names = [part for each in needed for part in parts(each, files)]
    with ThreadPoolExecutor(8) as pool:  # a large model has hundreds of files
        problems = pool.map(lambda name: _problem_of(checkpoint / name, files.get(name), remember), names)
        first = next(filter(None, problems), None)
        pool.shutdown(cancel_futures=True)
    return first


def _problem_of(file: Path, entry: Any, remember: bool) -> str | None:
    """Why a file is not what its ``entry`` in the manifest says."""
    name = file.name
    size, hashed = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if not isinstance(size, int) or not isinstance(hashed, str):
        return f"manifest.json does not have the size and sha256 of {name}"
    try:
        status = file.stat()
        if status.st_size != size:
            return f"{name} is {status.st_size:,} bytes, its manifest says {size:,}"
        version = _version(status)
        if not (remember and version in _hashes):
            _hashes[version] = sha256(file)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None if _hashes[version] == hashed else f"{name} has another sha256 than its manifest says"


def _version(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def trust(checkpoint: Path) -> None:
    """Remember the hashes of a manifest as if this process had read the files: other ranks just have."""
    with suppress(OSError):  # on a network's disk not all may be there for us yet
        for name, entry in read_json(checkpoint / "manifest.json")["files"].items():
            _hashes[_version((checkpoint / name).stat())] = entry["sha256"]


def parts(name: str, files: dict[str, Any]) -> list[str]:
    """The files of a manifest that hold what ``name`` does: itself, or those of large tensors and their index."""
    stem, _, kind = name.partition(".")
    found = [file for file in files if file.startswith((f"{stem}-", f"{name}.index"))]
    return found if kind == "safetensors" and name not in files and found else [name]


def model_problem(checkpoint: Path) -> str | None:
    """Why the model of a checkpoint cannot be trusted; its training state may be damaged or gone."""
    return problem(checkpoint, MODEL)


def latest_valid(run: Path, why: Callable[[Path], str | None] = problem) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that ``why`` has nothing against, and one line for each newer one."""
    problems: list[str] = []
    for folder in checkpoints(run):
        reason = why(folder)
        if reason is None:
            return folder, problems
        problems.append(f"{folder}: {reason}")
    return None, problems
