"""Logits -> text: greedy, temperature, top-k and top-p sampling, one token at a time with a key/value cache."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from aymen_gpt.errors import DataError
from aymen_gpt.model.gpt import GPT

COLD = 1e-6  # logits divided by less would overflow


def choose(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """One token id drawn from logits (V,).

    ``temperature`` divides the logits, 0 (or less than COLD) takes the likeliest token; ``top_k`` keeps the k
    likeliest; ``top_p`` keeps the smallest set of likeliest tokens with at least that probability (nucleus
    sampling, arXiv:1904.09751). The order is temperature, top_k, top_p, as in transformers.
    """
    if temperature < COLD:
        return int(logits.argmax())
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        dropped = ordered.cumsum(-1) - ordered >= top_p  # the mass before a token already suffices
        dropped[0] = False  # whatever top_p is rounded to
        probabilities = torch.zeros_like(ordered).scatter(0, order, ordered.masked_fill(dropped, 0.0))
    return int(torch.multinomial(probabilities, 1, generator=generator))


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError, naming the option, where sampling would make no sense."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top-k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top-p must be above 0 and at most 1, got {top_p}")


def generate(model: GPT, prompt: list[int], max_tokens: int, **sampling: Any) -> Iterator[int]:
    """The token ids of ``draw``, without the logits; ``sampling`` as it takes them."""
    for token, _ in draw(model, prompt, max_tokens, **sampling):
        yield token


@torch.inference_mode()
def draw(
    model: GPT,
    prompt: list[int],
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: int | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield up to ``max_tokens`` (token id, logits (V,) it was drawn from), ending before the token ``stop``.

    The same seed gives the same tokens on the same device. A text longer than the model's context goes on
    from its later half (positions are absolute, so cached keys cannot slide). Raises DataError when the
    logits are not finite.
    """
    check_sampling(temperature, top_k, top_p)
    if not prompt:
        raise ValueError("the prompt is empty: start from at least one token, such as <|endoftext|>")
    device, limit = model.wte.weight.device, model.config.block_size
    generator = torch.Generator(device).manual_seed(seed)
    tokens, fresh, caches = list(prompt[-limit:]), len(prompt[-limit:]), model.new_caches(1)
    for _ in range(max_tokens):
        if caches[0].used + fresh > limit:
            tokens = tokens[-max(limit // 2, 1) :]
            fresh, caches = len(tokens), model.new_caches(1)
        logits = model(
            torch.tensor([tokens[-fresh:]], device=device),
            caches,
            head=lambda hidden, _: model.logits(hidden[0, -1]),
        )  # (V,)
        if not logits.max().isfinite():  # NaN is the largest
            raise DataError("the model gives logits that are not finite: there is no text to draw from them")
        token = choose(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        if token == stop:
            return
        yield token, logits
        tokens.append(token)
        fresh = 1
