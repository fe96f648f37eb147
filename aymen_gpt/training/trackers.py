"""Send a run's numbers to TensorBoard, Weights & Biases or Trackio too; none of them can hurt the run."""

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

Send = Callable[[dict[str, float], int], object]  # numbers by name, and their step


def tensorboard(folder: Path) -> Send:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard")

    def send(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send


def wandb(name: str, folder: Path, config: dict[str, Any]) -> Send:
    """Weights & Biases, or Trackio, which has the same API but knows a run by its name alone."""
    own = {"id": folder.name, "dir": folder} if name == "wandb" else {}
    module = importlib.import_module(name)
    run = module.init(project="aymen-gpt", name=folder.name, config=config, resume="allow", **own)
    return lambda numbers, step: run.log(numbers, step=step)


def tracker(name: str | None, folder: Path, config: dict[str, Any]) -> Callable[[dict[str, Any]], None] | None:
    """Something to call with each row of metrics.jsonl, None without a name (one of config.TRACKERS).

    Whatever fails in it is said once, then it stays silent: a run never depends on a tracker.
    """
    if not name:
        return None
    send: Send | None = None
    broken = False

    def track(row: dict[str, Any]) -> None:
        nonlocal send, broken
        if broken:
            return
        try:
            send = send or (tensorboard(folder) if name == "tensorboard" else wandb(name, folder, config))
            send(numbers(row), row["step"])
        except Exception as error:
            broken = True
            why = f"pip install {name}" if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
            warnings.warn(f"--track {name} does not work ({why}); training goes on without it", stacklevel=2)

    return track


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row by flat names.

    >>> numbers({"step": 5, "loss": 3.5, "mfu": None, "hellaswag": {"completion": {"acc_norm": 0.25}}})
    {'loss': 3.5, 'hellaswag/completion/acc_norm': 0.25}
    """
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{name}": v for name, v in numbers(value).items()}
        elif isinstance(value, int | float) and key != "step":
            flat[key] = float(value)
    return flat
