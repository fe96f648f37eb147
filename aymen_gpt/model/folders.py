"""Where the checkpoints of a run are, and which of them can be trusted. Needs no torch."""

import json
from pathlib import Path

from aymen_gpt.files import sha256


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:09d}"


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first, damaged ones included."""
    return sorted((run / "checkpoints").glob("step-?????????"), reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def problem(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be trusted, in words; None when every file is as its manifest says."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    except (OSError, ValueError, KeyError):
        return "manifest.json is missing or unreadable"
    for name, expected in files.items():
        path = checkpoint / name
        if Path(name).name != name:
            return f"manifest.json names a file outside the folder: {name}"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} is {path.stat().st_size:,} bytes, its manifest says {expected['bytes']:,}"
        if sha256(path) != expected["sha256"]:
            return f"{name} has another sha256 than its manifest says"
    return None


def strangers(checkpoint: Path) -> list[str]:
    """Names in a checkpoint's folder that its manifest does not know."""
    known = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return sorted(p.name for p in checkpoint.iterdir() if p.name not in known and p.name != "manifest.json")


def latest_valid(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and one line for each newer one that does not."""
    problems: list[str] = []
    for folder in checkpoints(run):
        why = problem(folder)
        if why is None:
            return folder, problems
        problems.append(f"{folder}: {why}")
    return None, problems
