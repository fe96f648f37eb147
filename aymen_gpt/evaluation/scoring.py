"""How likely a GPT finds each ending of a context: model and token ids in, log-likelihoods out.

Endings are scored in batches of packed texts (packing.py) by a forward pass made for them (forward.py).
Log-likelihoods are in nats, in float32 or finer whatever the precision of the products.

Pure: no file is read, nothing is printed, no process group is known, and the model is only read. To share the work
among ranks, give each ``examples[rank::world_size]`` and put together what they find.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aymen_gpt.errors import DataError
from aymen_gpt.evaluation.forward import PackedForward
from aymen_gpt.evaluation.packing import TokenizedExample, batches, collate
from aymen_gpt.model.gpt import GPT

BATCH_TOKENS = {"cpu": 2048, "mps": 8192, "cuda": 32768}  # of a batch, by device type


@dataclass(frozen=True)
class EndingScores:
    """One value per ending, in the example's order."""

    log_likelihoods: list[float]  # sum over the ending's tokens, in nats
    token_counts: list[int]  # tokens summed over: all of the ending's, unless it was too long for the model
    greedy: list[bool] | None = None  # whether each of them is the likeliest token, where that was asked for


def score(model: GPT, examples: Sequence[TokenizedExample], **options: Any) -> list[EndingScores]:
    """The scores of all examples, in their order. ``options`` are those of score_batches."""
    scores = {i: s for found in score_batches(model, examples, **options) for i, s in found.items()}
    return [scores[i] for i in range(len(examples))]


@torch.no_grad()
def score_batches(
    model: GPT,
    examples: Sequence[TokenizedExample],
    *,
    dtype: torch.dtype = torch.float32,
    vocab_size: int | None = None,
    batch_tokens: int | None = None,
    known: Collection[int] = (),
    greedy: bool = False,
) -> Iterator[dict[int, EndingScores]]:
    """Yield the scores of some examples at a time, by index, computed on the model's device.

    ``dtype`` is what matrix products run in; with bfloat16 the scores keep about three digits. ``vocab_size``
    (default: the model's) is the number of tokens that exist; columns past it, which some checkpoints carry to
    fill up their embedding, get no probability. Texts longer than the model's context lose their beginning, see
    ``packing.fit``. Memory is bounded by ``batch_tokens``. Batches of ``known`` examples alone are left out; the
    others are what they would be without them, to the last bit.
    """
    device = model.wte.weight.device
    forward: PackedForward | None = None
    for chosen in batches(examples, batch_tokens or BATCH_TOKENS[device.type]):
        if all(i in known for i in chosen):
            continue
        forward = forward or PackedForward(model, dtype, vocab_size or model.config.vocab_size)
        batch = collate([examples[i] for i in chosen], model.config.block_size, device)
        hidden = forward.hidden(batch)
        log_p = forward.log_probabilities(hidden, batch).cpu().numpy()
        if not np.isfinite(log_p).all():
            name = str(dtype).removeprefix("torch.")
            raise DataError(f"the model gives likelihoods that are not finite in {name}: no score")
        sums, counts = np.bincount(batch.endings, log_p), np.bincount(batch.endings)
        hits = counts * 0
        if greedy:
            right = forward.likeliest(hidden)[batch.sources] == batch.targets
            hits = np.bincount(batch.endings, right.cpu().numpy())
        ends = np.cumsum([len(examples[i].endings) for i in chosen])[:-1]
        lists = [[part.tolist() for part in np.split(a, ends)] for a in (sums, counts, hits == counts)]
        yield {
            i: EndingScores(likely, n, all_hit if greedy else None)
            for i, likely, n, all_hit in zip(chosen, *lists, strict=True)
        }
