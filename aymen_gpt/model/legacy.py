"""A .pt checkpoint of nanoGPT, build-nanogpt or this project's first version -> our GPT, its weights alone.

Such a file is a pickle, which can carry commands. It is read by torch's weights-only unpickler, which knows
tensors and plain values and refuses all else; the one class let through is the GPTConfig that those trainers
store, and what comes out of it is ours. Layout: linear weights (out, in), names with ``transformer.``, perhaps
behind ``_orig_mod.`` (torch.compile) or ``module.`` (DDP). nanoGPT's bias=False is biases of zero; its exact GELU
differs by at most 0.0005 from the tanh form that GPT-2 and we compute.
"""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from aymen_gpt.errors import DataError
from aymen_gpt.model.gpt import GPT, GPTConfig
from aymen_gpt.model.huggingface import VOCAB_SIZE, from_huggingface, gpt, one_line

WRAPPERS = r"^(_orig_mod\.)?(module\.)?(transformer\.)?"


class StoredConfig:
    """Stands in for the GPTConfig class of the trainer that wrote the file."""


def load_pt(path: Path) -> GPT:
    """The GPT of a .pt file, on the CPU in float32. Raises DataError for what is no such GPT, or not safe."""
    found = _read(path)
    found = found if isinstance(found, dict) else {}
    stored = found.get("model_args", found.get("config"))  # nanoGPT keeps a dict, the others their GPTConfig
    shapes = vars(stored) if isinstance(stored, StoredConfig) else stored
    state, n_head = found.get("model"), shapes.get("n_head") if isinstance(shapes, dict) else None
    if not isinstance(state, dict) or type(n_head) is not int:
        raise DataError(f"{path} is no checkpoint of nanoGPT or build-nanogpt: no model and n_head in it")
    try:
        return _gpt(state, n_head)
    except (ValueError, RuntimeError) as error:
        raise DataError(f"{path} is no GPT-2 as we compute it: {one_line(error)}") from None


def _gpt(state: dict[Any, Any], n_head: int) -> GPT:
    weights = {re.sub(WRAPPERS, "", str(name)): t for name, t in state.items()}
    no_weights = [name for name, t in weights.items() if not isinstance(t, torch.Tensor)]
    if no_weights or not {"wte.weight", "wpe.weight"} <= weights.keys():
        raise ValueError(f"{no_weights[0]} is no tensor" if no_weights else "no wte.weight and wpe.weight")
    wte, wpe = weights["wte.weight"], weights["wpe.weight"]
    if wte.dim() != 2 or wpe.dim() != 2:
        raise ValueError("wte.weight and wpe.weight are not two matrices")
    layers = {name.split(".")[1] for name in weights if name.startswith("h.")}
    config = GPTConfig(wpe.size(0), min(wte.size(0), VOCAB_SIZE), max(len(layers), 1), n_head, wte.size(1))
    weights = from_huggingface(weights, config, transposed=())
    if not any(name.endswith(".bias") for name in weights):  # nanoGPT's bias=False: the same as biases of zero
        weights |= {
            f"{name.removesuffix('weight')}bias": t.new_zeros(t.shape[:1])
            for name, t in weights.items()
            if name not in ("wte.weight", "wpe.weight")
        }
    return gpt(config, weights)


def _read(path: Path) -> Any:
    """What torch.save wrote, its checksums verified."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        refused = [name for name in names if name.rpartition(".")[2] != "GPTConfig"]
        if refused:
            raise DataError(f"{path} asks to import {', '.join(refused)}: refused, for it could run commands")
        with torch.serialization.safe_globals([(StoredConfig, name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except Exception as error:  # zipfile and the unpickler have no common error for damage
        raise DataError(f"{path} cannot be read as a checkpoint: {one_line(error)}") from None
