"""A .pt checkpoint of nanoGPT, build-nanogpt or this project's first version -> our GPT, its weights alone.

Such a file is a pickle, which can carry commands. It is read by torch's weights-only unpickler, which knows
tensors and plain values and refuses all else; the one class let through is the GPTConfig that those trainers
store, and what comes out of it is ours. Layout: linear weights (out, in), names with ``transformer.``, perhaps
behind ``_orig_mod.`` (torch.compile) or ``module.`` (DDP).
"""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from aymen_gpt.errors import DataError
from aymen_gpt.model.gpt import GPT, GPTConfig

WRAPPERS = ("_orig_mod.", "module.", "transformer.")


class StoredConfig:
    """Stands in for the GPTConfig class of the trainer that wrote the file."""


def load_pt(path: Path) -> GPT:
    """The GPT of a .pt file, on the CPU in float32. Raises DataError for what is no such GPT, or not safe."""
    found = _read(path)
    state = found.get("model") if isinstance(found, dict) else None
    shape = _shape(found) if isinstance(state, dict) else {}
    if not isinstance(state, dict) or "n_head" not in shape:
        raise DataError(f"{path} is no checkpoint of nanoGPT or build-nanogpt: no model and n_head in it")
    weights = {_our_name(name): t.float() for name, t in state.items() if _is_weight(name)}
    try:
        rows, n_embd = weights["wte.weight"].shape
        layers = {int(name.split(".")[1]) for name in weights if name.startswith("h.")}
        vocab_size = min(rows, GPTConfig.vocab_size)  # rows past it are padding
        config = GPTConfig(weights["wpe.weight"].size(0), vocab_size, len(layers), shape["n_head"], n_embd)
        padding = config.padded_vocab_size - vocab_size
        weights["wte.weight"] = torch.cat([weights["wte.weight"][:vocab_size], torch.zeros(padding, n_embd)])
        model = GPT(config)
        model.load_state_dict(weights)
    except (KeyError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is no GPT-2 as we compute it (with biases, tied output): {why}") from None
    return model


def _read(path: Path) -> Any:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        refused = [name for name in names if name.rpartition(".")[2] != "GPTConfig"]
        if refused:
            raise DataError(f"{path} asks to import {', '.join(refused)}: refused, for it could run commands")
        with torch.serialization.safe_globals([(StoredConfig, name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, OSError, ValueError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        why = " ".join(str(error).split())[:200]
        raise DataError(f"{path} cannot be read as a checkpoint: {why}") from None


def _shape(found: dict[str, Any]) -> dict[str, Any]:
    """What the file says of the model's shape: nanoGPT keeps a dict, the others their GPTConfig."""
    stored = found.get("model_args", found.get("config"))
    return stored if isinstance(stored, dict) else vars(stored) if isinstance(stored, StoredConfig) else {}


def _is_weight(name: str) -> bool:
    """Not the causal mask, which is no parameter, nor the output layer, which is the embedding."""
    return not name.endswith((".attn.bias", "lm_head.weight"))


def _our_name(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def is_pt(name: str) -> bool:
    return name.endswith((".pt", ".pth")) and Path(name).is_file()
