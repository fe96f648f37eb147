"""The name of a model, as people type it -> the GPT, from safetensors, without transformers.

gpt2, gpt2-medium, gpt2-large, gpt2-xl    OpenAI's weights, from the Hub
OWNER/NAME                                any GPT-2-shaped model of the Hub
runs/NAME                                 a run: its newest checkpoint that verifies
PATH                                      a checkpoint, or any folder with config.json and model.safetensors
FILE.pt                                   a checkpoint of nanoGPT or build-nanogpt, see model/legacy.py
"""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError

from aymen_gpt.data import fetch
from aymen_gpt.errors import DataError, NetworkError
from aymen_gpt.model import folders
from aymen_gpt.model.gpt import GPT
from aymen_gpt.model.huggingface import load_pretrained
from aymen_gpt.model.legacy import is_pt, load_pt

HUB_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
EXPECTED = f"expected {', '.join(HUB_NAMES)}, OWNER/NAME of the Hub, a run folder or a checkpoint folder"


def load_model(name: str, device: torch.device) -> tuple[GPT, str]:
    """The model in float32 on ``device``, ready to score, and a line that says which one it is.

    Raises DataError when there is no such model, it is damaged or no GPT-2, NetworkError when the Hub cannot
    give it. Checkpoints of ours are verified against their manifest first.
    """
    if is_pt(name):
        model = load_pt(Path(name))
        return model.to(device).eval(), f"{name}, {model.config.n_params:,} parameters"
    folder, description = find_model(name)
    try:
        model = load_pretrained(folder)
    except FileNotFoundError:
        raise DataError(f"no model in {folder}: model.safetensors, or a part of it, is missing") from None
    except (ValueError, RuntimeError, SafetensorError, OSError) as error:
        why = " ".join(str(error).split())[:200]
        raise DataError(f"cannot use the model in {folder}: {why}") from None
    return model.to(device).eval(), f"{description}, {model.config.n_params:,} parameters"


def find_model(name: str) -> tuple[Path, str]:
    """The folder that holds the weights, downloaded if need be, and where they come from in words."""
    path = Path(name)
    if name in HUB_NAMES:
        return download(HUB_NAMES[name]), f"{name} of the Hub"
    if (path / "checkpoints").is_dir():
        return newest_checkpoint(path)
    if (path / "config.json").is_file():
        verify(path)
        return path, str(path)
    if path.exists():
        raise DataError(f"no model in {name}: neither config.json nor checkpoints/ there; {EXPECTED}")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not path.parent.is_dir() and path.parent.name != "runs":
        return download(name), f"{name} of the Hub"
    raise DataError(f"no model at {name}: no such folder; {EXPECTED}")


def newest_checkpoint(run: Path) -> tuple[Path, str]:
    folder, problems = folders.latest_valid(run, folders.model_problem)
    if folder is None:
        if not problems:
            raise DataError(f"no checkpoint yet in {run}: let its training get to one, or name another model")
        raise DataError(f"no usable checkpoint in {run}: {'; '.join(problems)}")
    skipped = f" (skipped as damaged: {'; '.join(problems)})" if problems else ""
    return folder, f"{folder}{skipped}"


def verify(folder: Path) -> None:
    """A model whose folder has a manifest must match it; others are the reader's own and taken as they are."""
    why = folders.model_problem(folder) if (folder / "manifest.json").is_file() else None
    if why:
        raise DataError(f"{folder} is damaged: {why}; use another checkpoint of the run")


def download(repo: str) -> Path:
    """config.json and the safetensors of a Hub model, in the Hub's own cache; their folder."""
    folder = fetch.hub_file(repo, "config.json").parent
    try:
        fetch.hub_file(repo, "model.safetensors")
    except NetworkError as error:
        try:
            index = fetch.hub_file(repo, "model.safetensors.index.json")
        except NetworkError:
            raise error from None
        for file in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            fetch.hub_file(repo, file)
    return folder
