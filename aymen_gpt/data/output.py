"""The folder that a preparation fills: one process holds it, and --restart sets aside what is there."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aymen_gpt import files
from aymen_gpt.data import shards

# What a preparation writes: the manifest, the shards, the tables beside them.
OURS = re.compile(
    rf"{re.escape(shards.MANIFEST)}|{re.escape(shards.CHECKED)}"
    r"|(\w[\w.-]*_(train|val)|tokens)_\d{6}\.(bin|documents\.parquet|rows\.parquet)"
)


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Keep a folder, made if need be, from other processes; one that stays empty is removed again."""
    new = [folder for folder in (out, *out.parents) if not os.path.lexists(folder)]
    with files.lock(out, "--out"):
        try:
            yield
        finally:
            with suppress(OSError):
                if os.listdir(out) == [".lock"]:
                    (out / ".lock").unlink()
                    for folder in new:
                        folder.rmdir()


def set_aside(out: Path, report: Callable[[str], None]) -> None:
    """Move all that a preparation left in a folder into ``out``/earlier-1, or -2, ...; nothing is deleted."""
    ours = [path for path in out.iterdir() if OURS.fullmatch(path.name)]
    if not ours:
        return
    ours.sort(key=lambda path: path.name == shards.MANIFEST)  # last: it knows of the others
    target = files.move_to_earlier(out, ours)
    report(f"{target} holds what was there. If this is interrupted, type the command again without --restart")
