"""How likely a GPT finds each ending of a context: model and token ids in, log-likelihoods out.

Multiple-choice tests ask for log p(ending | context) of a few endings to one context. Scored one text at a
time, the context is computed once per ending, and the output layer, a third of GPT-2 124M's work, on tokens
that nobody asks about. Here an example is one row, the context and behind it its endings without their last
tokens, which predict nothing:

    tokens     c0 c1 c2 | a0 a1 | b0 b1 b2        context c, endings a (3 tokens) and b (4 tokens)
    positions   0  1  2 |  3  4 |  3  4  5        each ending continues the context
    segments    0  0  0 |  1  1 |  2  2  2        a token sees, up to itself, segment 0 and its own
    predicts         a0   a1 a2   b1 b2 b3        the head runs from the last context token on
                     b0

Over HellaSwag's validation set that halves the tokens and takes a third of the logits. Rows of similar length
make a batch. Lengths are rounded up to a multiple of 16 and batches filled to a token budget, so that few
shapes exist, whatever the data. Log-likelihoods are in nats, from logits and sums in float32 or finer.

Pure: no file is read, nothing is printed, no process group is known. To share the work among ranks, give each
``examples[rank::world_size]`` and add up what is counted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aymen_gpt.model.gpt import GPT

LENGTH_STEP = 16  # row lengths are padded to a multiple of this many tokens
# Padded tokens of a batch, and rows of logits that exist at once, by device type. On a CPU no tensor of GPT-2
# 124M may pass 32 MiB (128 rows x 50,257 x 4 bytes = 26 MB): larger blocks go back to the system after each
# use, and getting them anew, page by page, would cost a third of the time.
BATCH_TOKENS = {"cpu": 2048, "mps": 8192, "cuda": 32768}
HEAD_ROWS = {"cpu": 128, "mps": 1024, "cuda": 2048}

Progress = Callable[[int, int], None]  # endings scored so far, endings in all


@dataclass(frozen=True)
class TokenizedExample:
    """A context and the endings it may have, as token ids, at least one token each."""

    context: list[int]
    endings: list[list[int]]

    def __post_init__(self) -> None:
        if not self.context or not all(self.endings):
            raise ValueError(f"a context or an ending without tokens has no likelihood: {self}")


@dataclass(frozen=True)
class EndingScores:
    """One value per ending, in the example's order."""

    log_likelihoods: list[float]  # sum over the ending's tokens, in nats
    token_counts: list[int]  # tokens summed over: all of the ending's, unless it was too long for the model


@dataclass
class PackedRow:
    """One context and some endings to it; ``slots`` numbers the endings over all examples."""

    context: list[int]
    endings: list[list[int]] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


@dataclass(frozen=True)
class Batch:
    """B rows padded to T tokens, and the R positions of them that predict; K is the most endings of a row."""

    tokens: Tensor  # (B, T)
    positions: Tensor  # (B, T)
    segments: Tensor  # (B, T), 0 for context and padding
    predictors: Tensor  # (R,) indices into the B * T tokens
    targets: Tensor  # (R, K) what is predicted there
    slots: np.ndarray  # (R, K) the ending that a target belongs to, -1 for none


@torch.no_grad()
def score(
    model: GPT,
    examples: Sequence[TokenizedExample],
    *,
    dtype: torch.dtype = torch.float32,
    vocab_size: int | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> list[EndingScores]:
    """The log-likelihoods of all endings, in the order of ``examples``, computed on the model's device.

    ``dtype`` is what matrix products run in; with bfloat16 the sums stay float32 (autocast) and the scores keep
    about three digits. ``vocab_size`` (default: the model's) is the number of tokens that exist; columns past
    it, which some checkpoints carry to fill up their embedding, get no probability. Texts longer than the
    model's context lose their beginning, see ``fit``. Memory is bounded by ``batch_tokens``.
    """
    device = model.wte.weight.device
    rows = pack(examples, model.config.block_size)
    budget = batch_tokens or BATCH_TOKENS.get(device.type, 4096)
    n_endings = sum(len(example.endings) for example in examples)
    sums, counts, done = np.zeros(n_endings), np.zeros(n_endings, dtype=np.int64), 0
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        head = centred_head(model, vocab_size or model.config.vocab_size, dtype)
        for chosen, length in batches(rows, budget):
            batch = collate(chosen, length, device)
            log_p = log_probabilities(model, head, batch).cpu().numpy()  # (R, K)
            real = batch.slots >= 0
            np.add.at(sums, batch.slots[real], log_p[real])
            np.add.at(counts, batch.slots[real], 1)
            done += sum(len(row.endings) for row in chosen)
            if progress is not None:
                progress(done, n_endings)
    return split_by_example(examples, sums, counts)


def fit(context: list[int], ending: list[int], block_size: int) -> tuple[list[int], list[int]]:
    """Drop tokens on the left until a model of ``block_size`` positions can score the ending.

    The last token is predicted, not read, so block_size + 1 tokens fit. An ending that is longer than
    block_size keeps its last block_size tokens, and one token in front of them to start from.

    >>> fit([1, 2, 3], [7, 8], 4), fit([1, 2, 3], [7, 8], 3), fit([1, 2, 3], [7, 8], 1)
    (([1, 2, 3], [7, 8]), ([2, 3], [7, 8]), ([7], [8]))
    """
    kept = (context + ending)[-(block_size + 1) :]
    scored = min(len(ending), block_size)
    return kept[:-scored], kept[-scored:]


def pack(examples: Sequence[TokenizedExample], block_size: int) -> list[PackedRow]:
    """One row per example; endings whose context had to be cut to another length get a row of their own."""
    rows: list[PackedRow] = []
    slot = 0
    for example in examples:
        by_context: dict[tuple[int, ...], PackedRow] = {}
        for ending in example.endings:
            context, ending = fit(example.context, ending, block_size)
            row = by_context.setdefault(tuple(context), PackedRow(context))
            row.endings.append(ending)
            row.slots.append(slot)
            slot += 1
        rows.extend(by_context.values())
    return rows


def batches(rows: list[PackedRow], batch_tokens: int) -> Iterator[tuple[list[PackedRow], int]]:
    """Rows and their padded length, longest first: a device that is too small fails at once.

    A batch ends at ``batch_tokens``, or at a row that is shorter by a fifth than its longest.
    """
    rows = sorted(rows, key=len, reverse=True)
    start = 0
    while start < len(rows):
        longest = len(rows[start])
        length = -(-longest // LENGTH_STEP) * LENGTH_STEP
        size = max(1, batch_tokens // length)
        chosen = [row for row in rows[start : start + size] if len(row) >= 0.8 * longest]
        yield chosen, length
        start += len(chosen)


def collate(rows: list[PackedRow], length: int, device: torch.device) -> Batch:
    """Lay the rows out as in the table at the top of this file."""
    ids, positions, segments = np.zeros((3, len(rows), length), dtype=np.int64)
    width = max(len(row.endings) for row in rows)
    predictors, targets, slots = [], [], []
    for b, row in enumerate(rows):
        end = start = len(row.context)
        ids[b, :start], positions[b, :start] = row.context, range(start)
        shared = [ending[0] for ending in row.endings]
        targets.append(shared + [0] * (width - len(shared)))
        slots.append(row.slots + [-1] * (width - len(shared)))
        for segment, (ending, slot) in enumerate(zip(row.endings, row.slots, strict=True), 1):
            here, end = end, end + len(ending) - 1
            ids[b, here:end], segments[b, here:end] = ending[:-1], segment
            positions[b, here:end] = range(start, start + end - here)
            targets.extend([token] + [0] * (width - 1) for token in ending[1:])
            slots.extend([slot] + [-1] * (width - 1) for _ in ending[1:])
        predictors.append(np.arange(start - 1, end) + b * length)
    return Batch(
        tokens=torch.from_numpy(ids).to(device),
        positions=torch.from_numpy(positions).to(device),
        segments=torch.from_numpy(segments).to(device),
        predictors=torch.from_numpy(np.concatenate(predictors)).to(device),
        targets=torch.tensor(targets, device=device),
        slots=np.array(slots),
    )


def tree_mask(segments: Tensor) -> Tensor:
    """(B, T) -> (B, 1, T, T), True where a token may look: back, at the context and at its own ending.

    Padding counts as context. It stands behind all tokens, so none of them sees it; what it sees is dropped.
    """
    T = segments.size(1)
    back = torch.ones(T, T, dtype=torch.bool, device=segments.device).tril()
    looking, at = segments[:, :, None], segments[:, None, :]
    return (back & ((at == 0) | (at == looking))).unsqueeze(1)


def centred_head(model: GPT, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """The output layer (V, C) in ``dtype``, less its mean row.

    A softmax ignores what all logits have in common, and low precision does not: the logits of a trained
    GPT-2 lie around -100, where bfloat16 has steps of 0.5, but spread over a few tens.
    """
    weight = model.wte.weight[:vocab_size].float()
    return (weight - weight.mean(dim=0)).to(dtype)


def log_probabilities(model: GPT, head: Tensor, batch: Batch) -> Tensor:
    """Of every target, float32 (R, K)."""
    hidden = model.hidden(batch.tokens, positions=batch.positions, mask=tree_mask(batch.segments))
    hidden = hidden.flatten(0, 1)[batch.predictors]  # (R, C)
    at_once = HEAD_ROWS.get(hidden.device.type, 1024)
    parts = []
    for h, targets in zip(hidden.split(at_once), batch.targets.split(at_once), strict=True):
        logits = F.linear(h, head)  # (r, V)
        parts.append(F.log_softmax(logits, dim=-1, dtype=torch.float32).gather(1, targets))
    return torch.cat(parts)


def split_by_example(
    examples: Sequence[TokenizedExample], sums: np.ndarray, counts: np.ndarray
) -> list[EndingScores]:
    scores, end = [], 0
    for example in examples:
        start, end = end, end + len(example.endings)
        scores.append(EndingScores(sums[start:end].tolist(), counts[start:end].tolist()))
    return scores
