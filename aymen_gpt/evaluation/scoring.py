"""How likely a GPT finds each ending of a context: model and token ids in, log-likelihoods out.

Scored one text at a time, a question's context would run through the model once for each ending, and the output
layer, a third of GPT-2 124M's work, would run on tokens that nobody asks about. Here a context and its endings are
one row, and a mask keeps the endings apart:

    tokens      c0 c1 a0 a1 b0     context c0 c1, endings a0 a1 a2 and b0 b1: the last token is predicted, not read
    positions    0  1  2  3  2
    text         0  0  1  1  2     a token sees those before it that are of text 0, the context, or of its own
    predicts       a0 a1 a2 b1
                   b0

Over HellaSwag's validation set that is half of the tokens and a third of the logits.

Pure: no file is read, nothing is printed, no process group is known, and the model is only read. To share the work
among ranks, give each ``texts[rank::world_size]`` and put together what they find.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from aymen_gpt.errors import DataError
from aymen_gpt.model.gpt import GPT

BATCH_TOKENS = {"cpu": 1024, "mps": 8192, "cuda": 32768}  # of a batch, by device type
SIMILAR = 0.9  # a row shorter than this share of its batch's longest begins the next batch
ROW_TOKENS = 1024  # of a context with many endings, which otherwise are several rows
LOGIT_ROWS = {"cpu": 512, "mps": 1024, "cuda": 4096}  # tokens whose logits exist at once
SOFTMAX_ROWS = {"cpu": 32, "mps": 1024, "cuda": 4096}  # of these at once in the softmax: 6 MB stay in the cache

Text = tuple[list[int], list[int]]  # token ids of a context and of an ending, at least one each


@dataclass(frozen=True)
class Score:
    """What a model says of an ending after its context."""

    log_likelihood: float  # sum over the ending's tokens, in nats
    n_tokens: int  # summed over: all of the ending's, unless it was too long for the model
    greedy: bool  # whether each of them is the likeliest token; False where that was not asked for


@dataclass(frozen=True)
class Row:
    """A context, endings to score after it, and the number of each one."""

    context: list[int]
    endings: list[list[int]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


FILLER = [Row([0], [[0]], [-1])]  # a batch for a rank that has none left while others have


@dataclass(frozen=True)
class Batch:
    """B rows of up to T tokens, R of which predict the P tokens of the endings."""

    tokens: Tensor  # (B, T)
    positions: Tensor  # (B, T), in their texts
    mask: Tensor  # (B, 1, T, T), True where a token (third) may see another (fourth)
    predictors: Tensor  # (R,) indices into the B * T
    sources: Tensor  # (P,) indices into the R
    targets: Tensor  # (P,) the tokens predicted there
    counts: np.ndarray  # tokens of each ending; their sum is P


def fit(context: list[int], ending: list[int], block_size: int) -> tuple[list[int], list[int]]:
    """Context and ending as a model of ``block_size`` positions can score them.

    The last token is predicted, not read, so block_size + 1 tokens fit; longer texts lose their beginning. An
    ending longer than block_size keeps its last block_size tokens, and one in front of them to start from.

    >>> fit([1, 2, 3], [7, 8], 4), fit([1, 2, 3], [7, 8], 3), fit([1, 2, 3], [7, 8], 1)
    (([1, 2, 3], [7, 8]), ([2, 3], [7, 8]), ([7], [8]))
    """
    text, scored = (context + ending)[-(block_size + 1) :], min(len(ending), block_size)
    return text[:-scored], text[-scored:]


def rows_of(texts: Sequence[Text], block_size: int) -> list[Row]:
    """The endings behind their contexts; what has the same context shares a row up to ROW_TOKENS."""
    rows: list[Row] = []
    by_context: dict[tuple[int, ...], Row] = {}
    for number, (context, ending) in enumerate(texts):
        if not context or not ending:
            raise ValueError(f"a context or an ending without tokens has no likelihood: {context}, {ending}")
        context, ending = fit(context, ending, block_size)
        row = by_context.get(tuple(context))
        if row is None or len(row) + len(ending) - 1 > ROW_TOKENS:
            row = by_context[tuple(context)] = Row(context)
            rows.append(row)
        row.endings.append(ending)
        row.numbers.append(number)
    return rows


def batches(rows: list[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Rows of similar lengths, up to ``batch_tokens`` tokens with their padding (a longer one alone).

    The longest come first, so that a device that is too small fails at once.
    """
    batch: list[Row] = []
    for row in sorted(rows, key=len, reverse=True):
        longest = len(batch[0]) if batch else 0
        if batch and ((len(batch) + 1) * longest > batch_tokens or len(row) < SIMILAR * longest):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def collate(rows: list[Row], device: torch.device) -> Batch:
    """The tensors of a batch, of which the module's docstring shows a row."""
    shape = len(rows), max(map(len, rows))
    tokens, positions, text = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -1)
    sources: list[int] = []
    targets: list[int] = []
    for b, row in enumerate(rows):
        n = end = len(row.context)
        tokens[b, :n], positions[b, :n], text[b, :n] = row.context, range(n), 0
        for j, ending in enumerate(row.endings, 1):
            start, end = end, end + len(ending) - 1
            tokens[b, start:end], text[b, start:end] = ending[:-1], j
            positions[b, start:end] = range(n, n + end - start)
            sources += [b * shape[1] + place for place in (n - 1, *range(start, end))]
            targets += ending
    mask = np.tri(shape[1], dtype=bool) & ((text[:, None] == 0) | (text[:, None] == text[:, :, None]))
    predictors, places = np.unique(sources, return_inverse=True)
    arrays = {"tokens": tokens, "positions": positions, "mask": mask[:, None], "targets": np.array(targets)}
    arrays |= {"predictors": predictors, "sources": places}
    counts = np.array([len(ending) for row in rows for ending in row.endings])
    return Batch(**{name: torch.from_numpy(array).to(device) for name, array in arrays.items()}, counts=counts)


class Predictor:
    """What a model says of the tokens that a batch predicts, with its output layer in the precision asked for.

    The embedding is taken less its mean row. A softmax ignores what all logits have in common, and rounding does
    not: the logits of a trained GPT-2 lie around -100, where bfloat16 has steps of 0.5, and differ by a few tens.
    The logit of the predicted token itself, and all sums, are float32.
    """

    def __init__(self, model: GPT, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.embedding: Tensor | None = None  # (V, C), from the first batch on

    def __call__(self, batch: Batch, *, greedy: bool) -> tuple[np.ndarray, np.ndarray]:
        """The log-likelihood of each target (P,), and with ``greedy`` whether it is the likeliest token (P,)."""
        of_hidden = partial(self.predictions, batch, greedy=greedy)
        found = self.model(batch.tokens, positions=batch.positions, mask=batch.mask, head=of_hidden)
        log_p, hits = found.cpu().numpy()
        return log_p, hits > 0

    def predictions(self, batch: Batch, hidden: Tensor, weight: Tensor, *, greedy: bool) -> Tensor:
        """What __call__ says, as numbers (2, P), by hidden states (B, T, C) and the output layer's weight."""
        if self.embedding is None:
            wte = weight[: self.model.config.vocab_size].float()
            self.embedding = wte - wte.mean(dim=0)
            self.head = self.embedding.to(self.dtype)
        place = weight.device.type
        h = hidden.flatten(0, 1)[batch.predictors]  # (R, C)
        totals, likeliest = [], []
        for some in h.split(LOGIT_ROWS[place]):
            logits = F.linear(some.to(self.dtype), self.head)  # (rows, V)
            totals += [log_total(part) for part in logits.split(SOFTMAX_ROWS[place])]
            likeliest.append(logits.argmax(dim=1) if greedy else torch.full_like(some[:, 0], -1))
        logit = (h[batch.sources].float() * self.embedding[batch.targets]).sum(dim=1)
        log_p = logit - torch.cat(totals)[batch.sources]
        return torch.stack((log_p, (torch.cat(likeliest)[batch.sources] == batch.targets).float()))


def log_total(logits: Tensor) -> Tensor:
    """log of the sum of exp(logits) over the columns, float32: what log_softmax subtracts, and in one pass."""
    return logits[:, 0].float() - F.log_softmax(logits, dim=1, dtype=torch.float32)[:, 0]


@torch.no_grad()
def score(
    model: GPT,
    texts: Sequence[Text],
    *,
    dtype: torch.dtype = torch.float32,
    batch_tokens: int | None = None,
    greedy: bool = False,
    progress: Callable[[int], object] | None = None,
    most: Callable[[int], int] | None = None,
) -> list[Score]:
    """The score of each text's ending, in their order, computed on the model's device.

    ``dtype`` is what matrix products run in; with bfloat16 the scores keep about three digits. Texts longer than
    the model's context lose their beginning, see ``fit``. Memory is bounded by ``batch_tokens``. ``progress`` is
    called with the number of endings of each batch. A batch that overflows in ``dtype`` is scored in float32;
    DataError when a likelihood is not finite there either.

    Ranks that share the model must make as many passes through it: ``most`` gives the greatest of their numbers.
    """
    device = model.wte.weight.device
    predict = Predictor(model, dtype)
    found: dict[int, Score] = {}
    # cuDNN, first choice on an H100, would build a plan for each of the hundreds of shapes there are
    kernels = (
        sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if device.type == "cuda" else nullcontext()
    )
    in_dtype: Any = {"dtype": dtype, "enabled": dtype != torch.float32, "cache_enabled": most is None}
    with kernels, torch.autocast(device.type, **in_dtype):
        every_row = rows_of(texts, model.config.block_size)
        todo = list(batches(every_row, batch_tokens or BATCH_TOKENS[device.type]))
        todo += [FILLER] * (most(len(todo)) - len(todo) if most else 0)
        for rows in todo:
            batch = collate(rows, device)
            log_p, hits = predict(batch, greedy=greedy)
            overflow = int(not np.isfinite(log_p).all() and dtype != torch.float32)
            if most(overflow) if most else overflow:
                with torch.autocast(device.type, enabled=False):
                    again = Predictor(model, torch.float32)(batch, greedy=greedy)
                log_p, hits = again if overflow else (log_p, hits)
            if rows is FILLER:
                continue
            if not np.isfinite(log_p).all():
                raise DataError("the model gives likelihoods that are not finite: there is no score of it")
            ending = np.repeat(np.arange(len(batch.counts)), batch.counts)  # of each target
            sums, all_hit = np.bincount(ending, log_p), np.bincount(ending, hits) == batch.counts
            scores = map(Score, sums.tolist(), batch.counts.tolist(), all_hit.tolist())
            found |= zip((number for row in rows for number in row.numbers), scores, strict=True)
            if progress is not None:
                progress(len(batch.counts))
    return [found[number] for number in range(len(texts))]
