"""Texts that begin alike -> batches in which every shared token stands once.

Multiple-choice tests ask for log p(ending | context) of a few endings to one context. Scored one text at a
time, the context is computed once per ending, padding is computed too, and the output layer, a third of GPT-2
124M's work, runs on tokens that nobody asks about. Here the texts of a batch grow into one tree of tokens, in
which they share their common beginnings. The last token of a text is predicted, not read, and stays out:

    texts      c0 c1 a0 a1     c0 c1 b0 b1 b2        context c, endings a (2 tokens) and b (3 tokens)

    node       0   1      2   3   4                  a token's place in the line of all tokens
    token      c0  c1     a0  b0  b1
    position   0   1      2   2   3                  in its text
    predicts       a0 b0  a1  b1  b2

What a GPT does token by token then runs on that line, without padding. Attention needs padded rows. A row is one
text: its keys are all nodes of the text, its queries those that no earlier row has. Indices into the line say
which nodes these are, so a row is gathered when it is needed. In a GPT's last layer only nodes that predict have
queries, and so does the output layer. Over HellaSwag's validation set that is half of the tokens and a third of
the logits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# A group of attention rows has query and key counts that round up to the same multiples of these. Over HellaSwag
# padding is a quarter of the real work then, in about six groups a batch.
QUERY_STEP, KEY_STEP = 16, 32
KEYS_AT_ONCE = 2**16  # of a group: 400 MB of keys and values in float32 for GPT-2 124M


@dataclass(frozen=True)
class TokenizedExample:
    """A context and the endings it may have, as token ids, at least one token each."""

    context: list[int]
    endings: list[list[int]]

    def __post_init__(self) -> None:
        if not self.context or not all(self.endings):
            raise ValueError(f"a context or an ending without tokens has no likelihood: {self}")

    def __len__(self) -> int:
        """Tokens that are read to score it, the context once."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


@dataclass(frozen=True)
class Attention:
    """G rows of attention of up to Tq queries and Tk keys; ``mask`` and ``Layer.places`` leave the padding out."""

    queries: Tensor  # (G, Tq) which of the layer's queries
    keys: Tensor  # (G, Tk) which nodes
    mask: Tensor  # (G, 1, Tq, Tk), True where a query may look


@dataclass(frozen=True)
class Layer:
    """The attention of one layer."""

    groups: list[Attention]
    places: Tensor  # (queries,) where each query's result lies in those of the groups, row after row


@dataclass(frozen=True)
class Batch:
    """N nodes, R of which predict the P tokens that are scored."""

    tokens: Tensor  # (N,)
    positions: Tensor  # (N,)
    inner: Layer  # every node is a query
    last: Layer  # the R nodes are
    predictors: Tensor  # (R,) indices into the N
    sources: Tensor  # (P,) indices into the R
    targets: Tensor  # (P,) the tokens predicted there
    endings: np.ndarray  # (P,) which ending of the batch they belong to


def fit(context: list[int], ending: list[int], block_size: int) -> tuple[list[int], int]:
    """The text that a model of ``block_size`` positions can score, and how many tokens at its end are scored.

    The last token is predicted, not read, so block_size + 1 tokens fit; longer texts lose their beginning. An
    ending longer than block_size keeps its last block_size tokens, and one in front of them to start from.

    >>> fit([1, 2, 3], [7, 8], 4), fit([1, 2, 3], [7, 8], 3), fit([1, 2, 3], [7, 8], 1)
    (([1, 2, 3, 7, 8], 2), ([2, 3, 7, 8], 2), ([7, 8], 1))
    """
    return (context + ending)[-(block_size + 1) :], min(len(ending), block_size)


def batches(examples: Sequence[TokenizedExample], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of examples that make a batch: up to ``batch_tokens`` tokens together (a longer example alone).

    Contexts of similar lengths come together, the longest first, so that a device that is too small fails at
    once; and among them those that begin alike, so that they share tokens too.
    """
    chosen: list[int] = []
    tokens = 0

    def likeness(i: int) -> tuple[int, list[int]]:
        context = examples[i].context
        return -(-len(context) // KEY_STEP), context

    for i in sorted(range(len(examples)), key=likeness, reverse=True):
        if chosen and tokens + len(examples[i]) > batch_tokens:
            yield chosen
            chosen, tokens = [], 0
        chosen.append(i)
        tokens += len(examples[i])
    if chosen:
        yield chosen


def common_beginning(texts: list[list[int]]) -> list[int]:
    """What all texts begin with; whatever the first and the last of them in order share.

    >>> common_beginning([[1, 2, 3], [1, 2], [1, 2, 4]])
    [1, 2]
    """
    first, last = min(texts), max(texts)
    differing = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: next(differing, min(len(first), len(last)))]


class _Tree:
    """Texts as paths of nodes; texts that begin alike share the nodes of their beginning."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.rows: list[tuple[np.ndarray, int]] = []  # a text's nodes, and how many of them it shares
        self._children: dict[tuple[int, int], int] = {}  # (node, token) -> node

    def add(self, path: list[int], text: Sequence[int]) -> list[int]:
        """The nodes of a text that goes on with ``text`` after the nodes ``path``."""
        path, known = list(path), len(self.tokens)
        for token in text:
            node = self._children.setdefault((path[-1] if path else -1, token), len(self.tokens))
            if node == len(self.tokens):
                self.tokens.append(token)
                self.positions.append(len(path))
            path.append(node)
        if len(self.tokens) > known:
            self.rows.append((np.array(path), len(path) - len(self.tokens) + known))
        return path


def collate(examples: Sequence[TokenizedExample], block_size: int, device: torch.device) -> Batch:
    """The batch of these examples for a model of ``block_size`` positions."""
    tree = _Tree()
    sources: list[int] = []
    targets: list[int] = []
    counts: list[int] = []
    for example in examples:
        texts = [fit(example.context, ending, block_size) for ending in example.endings]
        shared = common_beginning([text[:-1] for text, _ in texts])
        beginning = tree.add([], shared)
        for text, scored in texts:
            sources += tree.add(beginning, text[len(shared) : -1])[-scored:]
            targets += text[-scored:]
            counts.append(scored)
    everything = np.ones(len(tree.tokens), dtype=bool)
    predicts = np.zeros_like(everything)
    predicts[sources] = True
    return Batch(
        tokens=torch.tensor(tree.tokens, device=device),
        positions=torch.tensor(tree.positions, device=device),
        inner=_layer(tree.rows, everything, device),
        last=_layer(tree.rows, predicts, device),
        predictors=torch.from_numpy(predicts.nonzero()[0]).to(device),
        sources=torch.from_numpy((predicts.cumsum() - 1)[sources]).to(device),
        targets=torch.tensor(targets, device=device),
        endings=np.repeat(np.arange(len(counts)), counts),
    )


def _layer(rows: list[tuple[np.ndarray, int]], wanted: np.ndarray, device: torch.device) -> Layer:
    """The attention of a layer whose queries are the ``wanted`` (N,) nodes, in their order."""
    number = wanted.cumsum() - 1  # a node's among the queries
    groups, computed = [], []
    for group in _groups(rows, wanted):
        queries = _padded([number[path[own]] for path, own in group], -1)
        positions = _padded([own for _, own in group], 0)
        keys = _padded([path for path, _ in group], 0)
        mask = np.arange(keys.shape[1]) <= positions[..., None]
        arrays = (queries.clip(0), keys, mask[:, None])
        groups.append(Attention(*(torch.from_numpy(array).to(device) for array in arrays)))
        computed.append(queries.ravel())
    line = np.concatenate(computed)
    places = np.empty(number[-1] + 1, dtype=np.int64)
    places[line[line >= 0]] = (line >= 0).nonzero()[0]
    return Layer(groups, torch.from_numpy(places).to(device))


def _groups(
    rows: list[tuple[np.ndarray, int]], wanted: np.ndarray
) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Rows of similar sizes, as their nodes and the positions of those that are queries."""
    groups: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = {}
    for path, shared in rows:
        own = shared + wanted[path[shared:]].nonzero()[0]
        if len(own):
            groups.setdefault((-(-len(own) // QUERY_STEP), -(-len(path) // KEY_STEP)), []).append((path, own))
    for (_, steps), group in groups.items():
        at_once = max(1, KEYS_AT_ONCE // (steps * KEY_STEP))
        yield from (group[i : i + at_once] for i in range(0, len(group), at_once))


def _padded(lists: list[np.ndarray], padding: int) -> np.ndarray:
    """
    >>> _padded([np.array([1, 2]), np.array([3])], 0)
    array([[1, 2],
           [3, 0]])
    """
    array = np.full((len(lists), max(map(len, lists))), padding, dtype=np.int64)
    for row, values in zip(array, lists, strict=True):
        row[: len(values)] = values
    return array
