"""HellaSwag: which of four endings does a model find most likely? arXiv:1905.07830, 10,042 validation examples.

The test is scored in two ways that differ by more than a doubling of training data, so every number carries
the name of its protocol:

    completion   the context as it stands, " " and the ending, tokenized apart. acc takes the ending with the
                 least summed loss, acc_norm the one with the least loss per token. As llm.c and
                 build-nanogpt do; the curves of GPT-2 reproductions are drawn so.
    harness      EleutherAI's lm-evaluation-harness, task ``hellaswag``, zero-shot: activity label in front,
                 WikiHow's [header] [title] [step] marks cleaned away, context and ending tokenized together.
                 acc takes the greatest log-likelihood, acc_norm the greatest per character of the ending.

Of endings that tie, the first is chosen. Texts longer than the model's context lose their beginning, each
ending for itself, as the harness has it.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, zip_longest
from typing import Any, Literal

import numpy as np
import torch

from aymen_gpt.data import tokenizer
from aymen_gpt.evaluation.hellaswag_data import N_ENDINGS, Example
from aymen_gpt.evaluation.scoring import Score, Text, score
from aymen_gpt.model.gpt import GPT

Protocol = Literal["completion", "harness"]
PROTOCOLS: tuple[Protocol, ...] = ("completion", "harness")


def render(example: Example, protocol: Protocol) -> tuple[str, list[str]]:
    """Context and endings as they stand, or after the harness's cleaning.

    ``capitalize`` also lowers the rest of ctx_b; that is what the published harness scores are made with.

    >>> render(Example(0, "Tea", "[header] A [title] B.", "he Pours", "", ["a [step] b", "c"], 0), "harness")
    ('Tea: A. B. He pours', ['a b', 'c'])
    """
    if protocol == "completion":
        return example.ctx, example.endings
    context = f"{example.activity_label}: {example.ctx_a} {example.ctx_b.capitalize()}"
    return _clean(context), [_clean(ending) for ending in example.endings]


def _clean(text: str) -> str:
    """Strip, end a sentence at each title, drop what is in brackets, halve double spaces (once, as written)."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def tokenize(example: Example, protocol: Protocol) -> list[Text]:
    """The token ids of the context and of each ending. The harness's endings are what the whole text has after the
    context's tokens; blanks that end a context count to the ending there."""
    encode = tokenizer.gpt2().encode_ordinary
    context, endings = render(example, protocol)
    if protocol == "completion":
        return [(encode(context), encode(f" {ending}")) for ending in endings]
    ids = encode(context.rstrip())
    return [(ids, encode(f"{context} {ending}")[len(ids) :]) for ending in endings]


@dataclass(frozen=True)
class Answer:
    """What a model said to one example: log-likelihoods and token counts per ending, and its two choices."""

    log_likelihoods: list[float]
    token_counts: list[int]
    choice: int
    choice_norm: int


@dataclass(frozen=True)
class Result:
    """The answers to some examples, in their order, by protocol."""

    examples: list[Example]
    answers: dict[Protocol, list[Answer]]

    def scores(self, protocol: Protocol) -> dict[str, Any]:
        """acc, acc_norm, and their standard errors as acc_stderr and acc_norm_stderr (None for one example).

        The error is by the sample variance, as the harness has it. 33.4% of 10,042 examples is ± 0.47%: two models
        must differ by about 1.3% to differ at all.
        """
        n = len(self.examples)
        found: dict[str, Any] = {}
        for metric, choice in (("acc", "choice"), ("acc_norm", "choice_norm")):
            pairs = zip(self.examples, self.answers[protocol], strict=True)
            p = sum(getattr(answer, choice) == example.label for example, answer in pairs) / n
            found |= {metric: p, f"{metric}_stderr": math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None}
        return found

    def as_dict(self) -> dict[str, Any]:
        """The scores for --json: the numbers of each protocol, and every answer for paired comparisons."""
        record: dict[str, Any] = {"n": len(self.examples)}
        for protocol in self.answers:
            asked = {"questions_sha256": questions_sha256(self.examples, protocol)}
            record[protocol] = self.scores(protocol) | asked
        record["examples"] = [
            {"ind": example.ind, "label": example.label}
            | {protocol: asdict(answers[i]) for protocol, answers in self.answers.items()}
            for i, example in enumerate(self.examples)
        ]
        return record


def questions_sha256(examples: Sequence[Example], protocol: Protocol) -> str:
    """What tells sets of questions apart: their texts as the protocol renders them, and the right answers."""
    lines = (json.dumps([*render(example, protocol), example.label]) + "\n" for example in examples)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def evaluate(
    model: GPT,
    examples: Sequence[Example],
    *,
    protocols: Sequence[Protocol] = PROTOCOLS,
    dtype: torch.dtype = torch.float32,
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    most: Callable[[int], int] | None = None,
) -> Result:
    """Score ``examples`` on the model's device; its tokens must be GPT-2's. See scoring.score for the options.

    Ranks that share the work call it with ``examples[rank::world_size]`` and ``merge`` their results. ``progress``
    is called with the number of examples scored so far, and that of all.
    """
    done = 0

    def count(endings: int) -> None:
        nonlocal done
        done += endings
        if progress is not None:
            progress(done // (N_ENDINGS * len(protocols)), len(examples))

    count(0)
    texts = [text for protocol in protocols for example in examples for text in tokenize(example, protocol)]
    found = score(model, texts, dtype=dtype, batch_tokens=batch_tokens, progress=count, most=most)
    scores = iter(found)
    answers = {p: [answer(e, list(islice(scores, N_ENDINGS)), p) for e in examples] for p in protocols}
    return Result(list(examples), answers)


def merge(results: Sequence[Result]) -> Result:
    """The result over all examples from those of ranks that had ``examples[rank::world_size]`` each."""

    def dealt_back(parts: Sequence[list[Any]]) -> list[Any]:
        return [one for row in zip_longest(*parts) for one in row if one is not None]

    return Result(
        dealt_back([result.examples for result in results]),
        {p: dealt_back([result.answers[p] for result in results]) for p in results[0].answers},
    )


def answer(example: Example, scores: list[Score], protocol: Protocol) -> Answer:
    """The most likely ending, and the most likely per token (completion) or per character (harness)."""
    likely, counts = [s.log_likelihood for s in scores], [s.n_tokens for s in scores]
    lengths = counts
    if protocol == "harness":
        lengths = [max(1, len(ending)) for ending in render(example, protocol)[1]]
    return Answer(likely, counts, int(np.argmax(likely)), int(np.argmax(np.divide(likely, lengths))))
