"""aymen-gpt export: a model -> one file for other programs, with a certificate of what they compute from it."""

import argparse
import json
import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import aymen_gpt
from aymen_gpt.commands import console
from aymen_gpt.data import tokenizer
from aymen_gpt.errors import DataError, UsageError
from aymen_gpt.evaluation.gguf_check import certify
from aymen_gpt.evaluation.load_model import Loaded, load_model
from aymen_gpt.files import check_writable, replace_text, sha256, whole_file
from aymen_gpt.model import gguf_file

NEEDED = ("gguf", "transformers", "accelerate")


def main(options: argparse.Namespace) -> None:
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UsageError(f"{missing[0]} is not installed: type pip install {' '.join(NEEDED)} cyllama")
    check_writable(options.out)
    loaded = load_model(options.model, torch.device("cpu"))
    gguf_file.check(loaded.model, options.type)
    tokens, merges = tokenizer.written()
    name = Path(os.path.abspath(options.model)).name
    console.show(f"{loaded.description} -> {options.out}, {options.type}")
    with whole_file(options.out) as file:
        written = Path(file.name)
        gguf_file.write_gguf(written, loaded.model, options.type, name=name, tokens=tokens, merges=merges)
        try:
            found = certify(written, loaded.model, options.type, console.show)
        except DataError as error:
            raise DataError(f"{options.out} was not written, it would be no copy of the model: {error}") from error
    certificate = about(options.out, options.type, loaded) | found
    replace_text(options.out.with_name(f"{options.out.name}.json"), json.dumps(certificate, indent=2) + "\n")
    instructions = options.out.with_name("Modelfile")
    replace_text(instructions, gguf_file.modelfile(options.out.name, loaded.model.config.block_size))
    console.show(
        f"certificate: {options.out}.json; for Ollama: ollama create {name} -f {console.below(instructions)}"
    )


def about(file: Path, type: str, loaded: Loaded) -> dict[str, Any]:
    """Which file of which model it is, and what wrote it."""
    weights = [loaded.path] if loaded.path.is_file() else sorted(loaded.path.glob("model*.safetensors"))
    return {
        "file": file.name,
        "bytes": file.stat().st_size,
        "sha256": sha256(file),
        "type": type,
        "model": loaded.description,
        "step": loaded.step,
        "weights": {path.name: sha256(path) for path in weights},
        "versions": {"aymen-gpt": aymen_gpt.__version__, "gguf": version("gguf"), "torch": torch.__version__},
    }
