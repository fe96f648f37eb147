"""The certificate of a GGUF file: what independent readers compute from it, beside what our GPT computes.

transformers reads the file with the package that wrote it and its own GPT-2; llama.cpp shares nothing with us.
Both get the same fixed text as long as the context, and their logits are compared with ours.
"""

import hashlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aymen_gpt.data import tokenizer
from aymen_gpt.errors import DataError
from aymen_gpt.evaluation import llama_cpp
from aymen_gpt.model.generation import generate
from aymen_gpt.model.gpt import GPT
from aymen_gpt.model.huggingface import one_line

TEXT = """\
The mill stood where the river turns, and for two hundred years it ground the valley's corn. In 1893 the wheel
broke; nobody had the 4,500 francs to mend it. "We'll see," said the miller's daughter, who'd read every book.

def mean(values):
    return sum(values) / len(values)  # ZeroDivisionError if there are none

Crème brûlée, naïve, Straße, Москва, 東京, 🚲 -- e = 2.71828...\t(see p. 17)
"""  # words, contractions, numbers, code, runs of blanks, letters of several bytes
POSITIONS = 256  # at which logits are compared, the last of the context among them
GREEDY = 32  # tokens that llama.cpp continues a text by

# The largest difference of a logit that is accepted, in standard deviations of our logits over the vocabulary.
# llama.cpp computes GELU from a table of half precision, and q8_0 rounds activations too: docs/take-away.md has
# what was measured.
LIMITS = {
    "transformers": {"f32": 1e-3, "f16": 0.05, "q8_0": 0.5},
    "llama.cpp": {"f32": 0.05, "f16": 0.05, "q8_0": 0.5},
}


@torch.inference_mode()
def certify(path: Path, model: GPT, type: str, say: Callable[[str], None]) -> dict[str, Any]:
    """The certificate of the file that ``write_gguf`` wrote of this model, in float32 on a CPU.

    Raises DataError when a reader cannot open the file, reads another text than we do, or has a logit farther from
    ours than LIMITS. Without cyllama llama.cpp is left out, and the certificate says so.
    """
    config = model.config
    ids = tokenizer.encode(TEXT * (1 + config.block_size // 100))[: config.block_size].astype(int).tolist()
    positions = sorted({round(i) for i in np.linspace(0, len(ids) - 1, min(POSITIONS, len(ids)))})
    ours = model.logits(model.hidden(torch.tensor([ids]))[0, positions])  # (P, V)
    spread = float(ours.std(-1).mean())
    readers: dict[str, Any] = {}

    def compare(reader: str, theirs: Tensor, **more: Any) -> None:
        largest, limit = float((theirs - ours).abs().max()), LIMITS[reader][type] * spread
        same = float((theirs.argmax(-1) == ours.argmax(-1)).float().mean())
        if not largest <= limit:  # NaN is none of either
            raise DataError(
                f"a logit that {reader} computes from it is {largest:.3g} off, the limit of {type} is {limit:.3g}"
            )
        readers[reader] = {**more, "largest_logit_difference": largest, "limit": limit, "top1_agreement": same}
        say(
            f"{reader}: largest logit difference {largest:.2g}, limit {limit:.2g}; same likeliest token {same:.1%}"
        )

    theirs, found = by_llama_cpp(path, config.vocab_size, ids, positions)
    if theirs is not None:
        if found["tokens"] != tokenizer.encode(TEXT).tolist():
            raise DataError("llama.cpp makes other tokens of a text with it than we do")
        continued = list(generate(model, ids[: found["prompt"]], len(found["greedy"]), temperature=0.0))
        same = next((i for i, (a, b) in enumerate(zip(continued, found["greedy"], strict=True)) if a != b), None)
        greedy = len(continued) if same is None else same
        versions = {"version": found["version"], "cyllama": found["cyllama"], "tokens_equal": True}
        compare("llama.cpp", theirs, **versions, greedy_tokens=len(continued), greedy_tokens_equal=greedy)
    else:
        readers["llama.cpp"] = None
        say("llama.cpp was not asked: pip install cyllama, which has it, and export again")
    compare(
        "transformers", by_transformers(path, config.block_size, ids, positions), version=version("transformers")
    )
    return {
        "text": {
            "sha256": hashlib.sha256(TEXT.encode()).hexdigest(),
            "tokens": len(ids),
            "compared": len(positions),
        },
        "logit_spread": spread,
        "readers": readers,
    }


def by_transformers(path: Path, block_size: int, ids: list[int], positions: list[int]) -> Tensor:
    """Logits (P, V) that transformers computes from the file."""
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        link = (
            Path(folder) / "model.gguf"
        )  # transformers knows the format by the ending, and looks where we are first
        link.symlink_to(path.absolute())
        try:  # GGUF's context length becomes n_ctx, which GPT2Config does not use: n_positions says it again
            how: dict[str, Any] = {"gguf_file": str(link), "n_positions": block_size, "dtype": torch.float32}
            with redirect_stderr(io.StringIO()):  # bars
                model = AutoModelForCausalLM.from_pretrained(folder, **how)
            return model.eval()(torch.tensor([ids])).logits[0, positions]
        except Exception as error:  # whatever a damaged file leads to
            raise DataError(f"transformers cannot read it: {one_line(error)}") from error


def by_llama_cpp(
    path: Path, vocab_size: int, ids: list[int], positions: list[int]
) -> tuple[Tensor | None, dict[str, Any]]:
    """Logits (P, V) that llama.cpp computes from the file, or None without it, and what else it said."""
    if find_spec("cyllama") is None:
        return None, {}
    prompt = max(1, min(16, len(ids) // 2))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits.npy"
        asked = {"file": str(path), "out": str(out), "text": TEXT, "vocab_size": vocab_size, "ids": ids}
        asked |= {"positions": positions, "prompt": prompt, "n": min(GREEDY, len(ids) - prompt)}
        command = [sys.executable, "-P", llama_cpp.__file__]
        done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise DataError(f"llama.cpp cannot read it: {last[:200]}")
        return torch.from_numpy(np.load(out)), json.loads(done.stdout) | {"prompt": prompt}
