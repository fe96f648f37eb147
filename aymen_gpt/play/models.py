"""The models that the page and the API serve: a run's checkpoints, what they write, and what they see in a text.

Nothing here knows of HTTP. What computes is plain and blocking; server.py runs it in a thread of its own.
"""

import codecs
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from aymen_gpt.data import tokenizer
from aymen_gpt.errors import DataError
from aymen_gpt.evaluation.load_model import load_model
from aymen_gpt.model import folders
from aymen_gpt.model.generation import draw
from aymen_gpt.model.gpt import GPT, Block

KEPT = 4  # models that stay in memory: what one looks at side by side
ROWS = 128  # positions whose logits are in memory together


@dataclass(frozen=True)
class Token:
    """A token of a text, how likely the model found it there, and what it found likeliest."""

    id: int
    logprob: float | None  # natural logarithm of its probability; None for the first, which nothing came before
    top: list[tuple[int, float]] = field(default_factory=list)  # (id, logprob), the likeliest first


@dataclass(frozen=True)
class Delta:
    """The next piece of an answer: whole characters, the tokens that ended in it, and why it ended."""

    text: str
    tokens: list[Token]
    finish: str | None = None  # "length" or "stop" in the last one


class Models:
    """One model, or a run's checkpoints: ``demo`` is the newest that verifies, ``demo:100`` that of step 100."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.where, self.device = name, device
        self.run = Path(name) if (Path(name) / "checkpoints").is_dir() else None
        self.name = Path(name).resolve().name if Path(name).exists() else name
        self._loaded: OrderedDict[str, GPT] = OrderedDict()
        self.config = self.load(self.name).config  # of all its checkpoints

    def steps(self) -> list[int]:
        """Of the checkpoints there are now, the earliest first; none of a model that is no run."""
        return sorted(map(folders.step_of, folders.checkpoints(self.run))) if self.run else []

    def names(self) -> list[str]:
        return [self.name, *(f"{self.name}:{step}" for step in self.steps())]

    def find(self, name: str) -> str:
        """The place of a model for load_model. DataError when there is none of that name."""
        if name == self.name:
            return self.where
        step = name.removeprefix(f"{self.name}:")
        if self.run and step.isdecimal() and int(step) in self.steps():
            return str(folders.checkpoint_folder(self.run, int(step)))
        raise DataError(f"there is no model {name[:200]!r}: /v1/models lists those there are")

    def load(self, name: str) -> GPT:
        """The model in memory; DataError when there is none of that name, or its files are damaged or gone.

        A run's newest checkpoint is looked for each time, so that a page follows a training.
        """
        place = self.find(name)
        if place == self.where and self.run and (steps := self.steps()):
            newest = str(folders.checkpoint_folder(self.run, steps[-1]))
            place = newest if newest in self._loaded else place
        if place not in self._loaded:
            found = load_model(place, self.device)
            place = str(found.path)
            self._loaded[place] = found.model
        self._loaded.move_to_end(place)
        while len(self._loaded) > KEPT:
            self._loaded.popitem(last=False)
        return self._loaded[place]


def piece(token: int) -> str:
    """The text of one token. Bytes that make no whole character are spelled OpenAI's way: ``bytes:\\xe2\\x80``."""
    raw = tokenizer.gpt2().decode_single_token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def seen(token: int, logits: Tensor, top: int) -> Token:
    """A token and the logits (V,) of its place, as probabilities at temperature 1."""
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(top) if top else (logprobs[:0], logprobs[:0].long())
    return Token(token, float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True)))


@torch.inference_mode()
def read(model: GPT, ids: list[int], top: int) -> list[Token]:
    """What the model makes of each token of a text of at most block_size tokens, in one forward pass."""
    hidden = model.hidden(torch.tensor([ids], device=model.wte.weight.device))[0]  # (T, C)
    tokens = [Token(ids[0], None)]
    for start in range(0, len(ids) - 1, ROWS):
        logits = model.logits(hidden[start : start + ROWS])  # (at most ROWS, V)
        tokens += [seen(id, row, top) for id, row in zip(ids[start + 1 : start + 1 + ROWS], logits, strict=False)]
    return tokens


@torch.inference_mode()
def attention(model: GPT, ids: list[int], layer: int, head: int) -> list[list[float]]:
    """(T, T) how much each token of a text (first) attends to those up to it (second); rows sum to 1."""
    idx = torch.tensor([ids], device=model.wte.weight.device)
    x = model.wte(idx) + model.wpe.weight[: len(ids)]
    *before, block = cast(list[Block], list(model.h)[: layer + 1])
    for earlier in before:
        x = earlier(x)
    q, k, _ = block.attn.c_attn(block.ln_1(x))[0].split(model.config.n_embd, dim=1)  # (T, C) each
    size = model.config.n_embd // model.config.n_head
    q, k = (part[:, head * size : (head + 1) * size] for part in (q, k))
    scores = q @ k.T / size**0.5
    unseen = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(unseen, -torch.inf).softmax(-1).tolist()


def answer(
    model: GPT,
    ids: list[int],
    max_tokens: int,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stop: list[str],
    top: int,
) -> Iterator[Delta]:
    """Continue a text of at most block_size tokens until a ``stop`` text, <|endoftext|> or ``max_tokens``.

    A stop text is never part of the answer: what may become one is held back until it is clear.
    """
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text, shown, waiting = "", 0, list[Token]()
    drawn = draw(
        model, ids, max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=tokenizer.EOT
    )
    n = 0
    for token, logits in drawn:
        n += 1
        waiting.append(seen(token, logits, top))
        text += characters.decode(tokenizer.gpt2().decode_single_token_bytes(token))
        if ends := [at for word in stop if (at := text.find(word, max(shown - len(word), 0))) >= 0]:
            yield Delta(text[shown : max(min(ends), shown)], waiting, "stop")
            return
        safe = len(text) - max((held(text, word) for word in stop), default=0)
        if safe > shown or not stop:
            yield Delta(text[shown:safe], waiting)
            shown, waiting = max(safe, shown), []
    text += characters.decode(b"", final=True)
    yield Delta(text[shown:], waiting, "length" if n == max_tokens else "stop")


def held(text: str, word: str) -> int:
    """How many characters at the end of a text may be the beginning of a word.

    >>> held("a b", "bc"), held("a", "bc")
    (1, 0)
    """
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)
