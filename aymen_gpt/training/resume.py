"""Which checkpoint a start continues from, and what may have changed since it was taken."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aymen_gpt.errors import DataError, UsageError
from aymen_gpt.files import move_to_earlier, read_json
from aymen_gpt.model.folders import checkpoints, latest_valid
from aymen_gpt.training import checkpoint
from aymen_gpt.training.config import OVERRIDABLE, TrainConfig, flag
from aymen_gpt.training.runlog import FILES

FIXED = ("block_size", "n_layer", "n_head", "n_embd", "seed", "tokens_per_step", "optimizer")
RECORDS = ["checkpoints", "tensorboard", "wandb", "hellaswag.json", *FILES]


def find_checkpoint(run: Path, mode: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from (None: start at step 0), and what the user should know of others.

    Raises DataError when there are checkpoints and none can be used, UsageError when there must be one.
    """
    left = checkpoint.remove_partial(run)
    notices = [f"warning: removed {left} checkpoint{'s'[: left > 1]} of a save that was cut short"][: bool(left)]
    if mode == "none":
        set_aside(run)
    newest, problems = latest_valid(run, checkpoint.unusable)
    if newest is None and problems:
        raise DataError(
            f"no checkpoint can be used: {'; '.join(problems)}. To start at step 0 with these files set aside: "
            "--resume none"
        )
    if newest is None and mode == "must":
        raise UsageError(f"--resume must: {run} has no checkpoint to continue from")
    if newest is not None:
        notices += [f"warning: {line}; using {newest.name}" for line in problems]
    return newest, notices


def is_finished(run: Path, step: int) -> bool:
    """Whether the run ended well at ``step``, with all its records written."""
    try:
        status = read_json(run / "status.json")
    except DataError:
        return False
    return status.get("state") == "done" and status.get("step") == step


def set_aside(run: Path) -> None:
    """Move the records of an earlier attempt into ``run``/earlier-1, or -2, ...; nothing is deleted.

    What is no record of a run stays where it is. UsageError for a folder that holds such things and no run.
    """
    found = sorted(p for p in run.glob("*") if not p.name.startswith((".", "earlier-")))
    records = [p for record in RECORDS for p in found if p.name.split(".damaged-")[0] == record]
    if found and not any(p.name in FILES[-2:] for p in records) and not checkpoints(run):
        some = ", ".join(p.name for p in found[:3]) + f" and {len(found) - 3} more" * (len(found) > 3)
        raise UsageError(
            f"{run} is no run, it holds {some}: --resume none moves nothing there; choose another {flag('run')}"
        )
    if records:
        move_to_earlier(run, records)


def identity(config: TrainConfig, data_sha256: str) -> dict[str, Any]:
    """What makes a run this run: contract C1. ``data`` is the sha256 of the shards' manifest."""
    return {key: getattr(config, key) for key in FIXED} | {"data": data_sha256}


def options(config: TrainConfig) -> dict[str, Any]:
    """The options that may change between the parts of a run."""
    found = {key: value for key, value in asdict(config).items() if key not in (*FIXED, "run", "preset", "data")}
    return found | {"data_folder": config.data}


def changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """{key: [before, now]} of all that differs; what JSON cannot tell apart does not."""
    now = json.loads(json.dumps(now))
    return {key: [before.get(key), value] for key, value in now.items() if before.get(key) != value}


def check_identity(
    saved: dict[str, Any], now: dict[str, Any], run: Path, override: Sequence[str]
) -> dict[str, list[Any]]:
    """What differs and was overridden; UsageError with the difference when any of it was not."""
    changed = changes({"optimizer": "adamw"} | saved, now)  # the only one until November 2026
    refused = {key: values for key, values in changed.items() if key not in override}
    if refused:
        words = ", ".join(f"{key} {before!s:.12} -> {now!s:.12}" for key, (before, now) in refused.items())
        way_out = ""
        if refused.keys() <= set(OVERRIDABLE):
            way_out = f", or go on all the same with --override-resume {' '.join(refused)}"
        raise UsageError(f"{run} holds another run ({words}): choose a new {flag('run')}{way_out}")
    return changed
