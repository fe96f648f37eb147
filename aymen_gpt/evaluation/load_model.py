"""The name of a model, as people type it -> the GPT, from safetensors, without transformers.

gpt2, gpt2-medium, gpt2-large, gpt2-xl    OpenAI's weights, from the Hub
OWNER/NAME                                any GPT-2-shaped model of the Hub
runs/NAME                                 a run: its newest checkpoint that verifies
PATH                                      a checkpoint, or any folder with config.json and model.safetensors
FILE.pt                                   a checkpoint of nanoGPT or build-nanogpt, see model/legacy.py
"""

import hashlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aymen_gpt import wording
from aymen_gpt.data import fetch
from aymen_gpt.errors import DataError, NetworkError, UsageError
from aymen_gpt.files import read_json
from aymen_gpt.model import folders
from aymen_gpt.model.gpt import GPT, PRESETS, GPTConfig
from aymen_gpt.model.huggingface import MOST_ROWS, VOCAB_SIZE, load_pretrained, read_config, weight_files
from aymen_gpt.model.legacy import load_pt

HUB_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
EXPECTED = f"expected {', '.join(HUB_NAMES)}, OWNER/NAME of the Hub, a run folder or a checkpoint folder"


class Loaded(NamedTuple):
    """A model and where it comes from."""

    model: GPT
    description: str
    path: Path  # of the folder, or of a .pt file
    step: int | None  # of a checkpoint of ours


def load_model(
    name: str,
    device: torch.device,
    *,
    shape: GPTConfig | None = None,
    first: Callable[[Callable[[], Any]], Any] | None = None,
) -> Loaded:
    """The model in float32 on ``device``, ready to score or to be trained further.

    With ``shape`` another shape is a UsageError, before weights are read or downloaded. Several ranks pass their
    ``Ranks.first``: one of them downloads before the others look. Raises DataError when there is no such model, it
    is damaged, no GPT-2, of another tokenizer or holds a weight that is not finite; NetworkError when the Hub
    cannot give it. Checkpoints of ours are verified against their manifest first.
    """
    step = None
    if name.endswith((".pt", ".pth")) and os.path.isfile(name):
        path, description, model = Path(name), name, load_pt(Path(name))
        check(name, model.config, shape)
    else:
        if first is not None:
            first(lambda: find_model(name, shape))
        path, description = find_model(name, shape)
        model = load_pretrained(path)
        if (path / "manifest.json").is_file():
            step = read_json(path / "manifest.json").get("step")
    bad = next((weight for weight, p in model.named_parameters() if not p.isfinite().all()), None)
    if bad:
        raise DataError(f"{description}: {bad} holds NaN or infinity; use another checkpoint")
    description += f", {model.config.n_params:,} parameters"
    return Loaded(model.to(device).eval(), description, path, step if isinstance(step, int) else None)


def weights_sha256(model: GPT) -> str:
    """The identity of a model's weights, whatever file they came in."""
    h = hashlib.sha256(repr(model.config).encode())
    for name, t in model.state_dict().items():
        h.update(name.encode())
        h.update(t.float().cpu().contiguous().numpy())
    return h.hexdigest()


def check(name: str, found: GPTConfig, shape: GPTConfig | None) -> None:
    """DataError for a model of another tokenizer than GPT-2's, UsageError for one that is not of the ``shape``."""
    if not VOCAB_SIZE <= found.vocab_size <= MOST_ROWS:
        raise DataError(
            f"{name} knows {found.vocab_size:,} tokens; Aymen-GPT reads and writes GPT-2's {VOCAB_SIZE:,}"
        )
    if shape is not None and replace(found, vocab_size=VOCAB_SIZE) != shape:
        theirs, ours = (wording.shape(vars(config), None) for config in (found, shape))
        sizes = ((size, getattr(found, size)) for size in ("n_layer", "n_head", "n_embd", "block_size"))
        flags = [f"--{size.replace('_', '-')} {n}" for size, n in sizes if n != getattr(shape, size)]
        raise UsageError(f"--init-from {name} has {theirs}; this run has {ours}: add {' '.join(flags)}")


def find_model(name: str, shape: GPTConfig | None = None) -> tuple[Path, str]:
    """The folder that holds the weights, downloaded if need be, and where they come from in words."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    path = Path(name)
    if name in HUB_NAMES:
        check(name, PRESETS[name], shape)  # known without the network
        return download(HUB_NAMES[name], shape), f"{name} of the Hub"
    if os.path.isdir(path / "checkpoints"):
        path = newest_checkpoint(path)
    elif os.path.isfile(path / "config.json"):
        # A folder without a manifest is the reader's own, and taken as it is.
        if os.path.isfile(path / "manifest.json") and (why := folders.model_problem(path)):
            raise DataError(f"{path} is damaged: {why}; use another checkpoint of the run")
    elif os.path.exists(path):
        raise DataError(f"no model in {name}: neither config.json nor checkpoints/ there; {EXPECTED}")
    else:
        with suppress(HFValidationError):
            validate_repo_id(name)
            if "/" in name and not os.path.isdir(path.parent) and path.parent.name != "runs":
                return download(name, shape), f"{name} of the Hub"
        raise DataError(f"no model at {name[:200]}: no such folder; {EXPECTED}")
    check(str(path), read_config(path), shape)
    return path, str(path)


def newest_checkpoint(run: Path, why: Callable[[Path], str | None] = folders.model_problem) -> Path:
    """The newest checkpoint of a run that ``why`` has nothing against; DataError when there is none."""
    folder, problems = folders.latest_valid(run, why)
    if folder is None and not problems:
        raise DataError(f"no checkpoint yet in {run}: let its training get to one, or name another model")
    if folder is None:
        raise DataError(f"no usable checkpoint in {run}: {'; '.join(problems)}")
    if problems:
        print(f"warning: skipped as damaged: {'; '.join(problems)}", file=sys.stderr)
    return folder


def download(repo: str, shape: GPTConfig | None = None) -> Path:
    """config.json and then the safetensors of a Hub model, in the Hub's own cache; their folder."""
    folder = fetch.hub_file(repo, "config.json").parent
    check(repo, read_config(folder), shape)
    try:
        fetch.hub_file(repo, "model.safetensors")
    except NetworkError as error:
        try:
            index = fetch.hub_file(repo, "model.safetensors.index.json")
        except NetworkError:
            raise error from None
        for file in weight_files(index):
            fetch.hub_file(repo, file)
    return folder
