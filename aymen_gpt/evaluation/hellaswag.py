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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from aymen_gpt.data import tokenizer
from aymen_gpt.errors import DataError
from aymen_gpt.evaluation.examples import Example
from aymen_gpt.evaluation.examples import evenly_spaced as evenly_spaced
from aymen_gpt.evaluation.examples import load_examples as load_examples
from aymen_gpt.evaluation.partial import PartialScores
from aymen_gpt.evaluation.rendering import PROTOCOLS, RENDER, Protocol, render_harness, tokenize_all
from aymen_gpt.evaluation.scoring import EndingScores, score_batches
from aymen_gpt.model.gpt import GPT

Progress = Callable[[int, int], None]  # examples scored so far and in all, over all protocols


@dataclass(frozen=True)
class Answer:
    """What a model said to one example: log-likelihoods and token counts per ending, and its two choices."""

    log_likelihoods: list[float]
    token_counts: list[int]
    choice: int
    choice_norm: int


@dataclass(frozen=True)
class Tally:
    """Counts over examples. Ranks that share the work add theirs up."""

    n: int
    correct: int
    correct_norm: int

    def as_dict(self) -> dict[str, float | None]:
        acc, norm = self.correct / self.n, self.correct_norm / self.n
        return {
            "acc": acc,
            "acc_stderr": stderr(acc, self.n),
            "acc_norm": norm,
            "acc_norm_stderr": stderr(norm, self.n),
        }


def stderr(p: float, n: int) -> float | None:
    """Standard error of a share p of n examples, by the sample variance as the harness has it; None for n = 1.

    33.4% of 10,042 examples is ± 0.47%: two models must differ by about 1.3% to differ at all.
    """
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None


@dataclass(frozen=True)
class Result:
    """The answers to some examples, in their order, by protocol."""

    examples: list[Example]
    answers: dict[Protocol, list[Answer]]

    def tally(self, protocol: Protocol) -> Tally:
        pairs = list(zip(self.examples, self.answers[protocol], strict=True))
        return Tally(
            n=len(pairs),
            correct=sum(example.label == answer.choice for example, answer in pairs),
            correct_norm=sum(example.label == answer.choice_norm for example, answer in pairs),
        )

    def as_dict(self) -> dict[str, Any]:
        """The scores for --json: the numbers of each protocol, and every answer for paired comparisons."""
        record: dict[str, Any] = {"n": len(self.examples)}
        for protocol in self.answers:
            asked = {"questions_sha256": questions_sha256(self.examples, protocol)}
            record[protocol] = self.tally(protocol).as_dict() | asked
        record["examples"] = [
            {"ind": example.ind, "label": example.label}
            | {protocol: asdict(answers[i]) for protocol, answers in self.answers.items()}
            for i, example in enumerate(self.examples)
        ]
        return record


def questions_sha256(examples: Sequence[Example], protocol: Protocol) -> str:
    """What tells sets of questions apart: their texts as the protocol renders them, and the right answers."""
    lines = (json.dumps([*RENDER[protocol](example), example.label]) + "\n" for example in examples)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def evaluate(
    model: GPT,
    examples: Sequence[Example],
    *,
    protocols: Sequence[Protocol] = PROTOCOLS,
    dtype: torch.dtype = torch.float32,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
    partial: PartialScores | None = None,
) -> Result:
    """Score ``examples`` on the model's device. Scores that ``partial`` has are not made again, others it gets.

    Ranks that share the work call it with ``examples[rank::world_size]`` and add up their tallies, or ``merge``
    their results. Raises DataError when the model's vocabulary is too small to be GPT-2's.
    """
    if model.config.vocab_size < tokenizer.VOCAB_SIZE:
        raise DataError(
            f"the model knows {model.config.vocab_size:,} tokens and HellaSwag is scored in GPT-2's "
            f"{tokenizer.VOCAB_SIZE:,}"
        )
    partial = PartialScores() if partial is None else partial
    answers: dict[Protocol, list[Answer]] = {}
    for protocol in protocols:
        scores = dict(partial.known(protocol))

        def tell(done: int, before: int = len(answers) * len(examples)) -> None:
            if progress is not None:
                progress(before + done, len(protocols) * len(examples))

        tell(len(scores))
        for found in score_batches(
            model,
            tokenize_all(examples, protocol),
            dtype=dtype,
            vocab_size=tokenizer.VOCAB_SIZE,
            batch_tokens=batch_tokens,
            known=scores.keys(),
        ):
            partial.add(protocol, found)
            scores |= found
            tell(len(scores))
        answers[protocol] = [answer(example, scores[i], protocol) for i, example in enumerate(examples)]
    return Result(list(examples), answers)


def merge(results: Sequence[Result]) -> Result:
    """The result over all examples from those of ranks that had ``examples[rank::world_size]`` each."""
    n = sum(len(result.examples) for result in results)
    owners = [results[i % len(results)] for i in range(n)]
    rows = [i // len(results) for i in range(n)]
    return Result(
        [owner.examples[row] for owner, row in zip(owners, rows, strict=True)],
        {
            protocol: [owner.answers[protocol][row] for owner, row in zip(owners, rows, strict=True)]
            for protocol in results[0].answers
        },
    )


def answer(example: Example, scores: EndingScores, protocol: Protocol) -> Answer:
    """The most likely ending, and the most likely per token (completion) or per character (harness)."""
    likely = np.array(scores.log_likelihoods)
    lengths = scores.token_counts
    if protocol == "harness":
        lengths = [max(1, len(ending)) for ending in render_harness(example)[1]]
    return Answer(
        scores.log_likelihoods,
        scores.token_counts,
        choice=int(likely.argmax()),
        choice_norm=int((likely / lengths).argmax()),
    )
