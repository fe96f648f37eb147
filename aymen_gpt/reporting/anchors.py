"""Published HellaSwag scores to set a run beside, each with the protocol it was measured by.

The protocols differ by more than a model's size class is worth (GPT-2 124M: 29.55 by completion, 31.14 by
harness), so a score is compared only with anchors of its own protocol. GPT-3's are by a third one, the
paper's own (activity label in front, likelihood per token, section 2.4 and appendix G): they may be shown
for orientation and are labelled so.
"""

from dataclasses import dataclass
from typing import Literal

Protocol = Literal["completion", "harness", "gpt3-paper"]
Metric = Literal["acc", "acc_norm"]

CHANCE = 0.25  # four endings, one is right
GPT2_FINEWEB_EDU = (
    3.2924  # nats per token of GPT-2 124M on FineWeb-Edu's held-out shard: build-nanogpt, play.ipynb
)

_DOCSTRING = "build-nanogpt, hellaswag.py docstring (10,042 examples)"
_NOTEBOOK = "build-nanogpt, play.ipynb"
_GPT3 = "arXiv:2005.14165, Table H.1, zero-shot, dev set"


@dataclass(frozen=True)
class Anchor:
    """One published number, value in 0..1."""

    model: str
    protocol: Protocol
    metric: Metric
    value: float
    source: str


ANCHORS: tuple[Anchor, ...] = (
    Anchor("GPT-2 124M", "completion", "acc", 0.2859, _DOCSTRING),
    Anchor("GPT-2 124M", "completion", "acc_norm", 0.2955, _DOCSTRING),
    Anchor("GPT-2 355M", "completion", "acc_norm", 0.3752, _NOTEBOOK),
    Anchor("GPT-2 774M", "completion", "acc_norm", 0.4320, _NOTEBOOK),
    Anchor("GPT-2 1558M", "completion", "acc", 0.3842, _DOCSTRING),
    Anchor("GPT-2 1558M", "completion", "acc_norm", 0.4893, _DOCSTRING),
    Anchor("GPT-2 124M", "harness", "acc", 0.2892, _DOCSTRING),
    Anchor("GPT-2 124M", "harness", "acc_norm", 0.3114, _DOCSTRING),
    Anchor("GPT-2 1558M", "harness", "acc", 0.4004, _DOCSTRING),
    Anchor("GPT-2 1558M", "harness", "acc_norm", 0.5089, _DOCSTRING),
    Anchor("GPT-3 Small", "gpt3-paper", "acc_norm", 0.337, _GPT3),
    Anchor("GPT-3 Medium", "gpt3-paper", "acc_norm", 0.436, _GPT3),
    Anchor("GPT-3 Large", "gpt3-paper", "acc_norm", 0.510, _GPT3),
    Anchor("GPT-3 XL", "gpt3-paper", "acc_norm", 0.547, _GPT3),
    Anchor("GPT-3 2.7B", "gpt3-paper", "acc_norm", 0.628, _GPT3),
    Anchor("GPT-3 6.7B", "gpt3-paper", "acc_norm", 0.674, _GPT3),
    Anchor("GPT-3 13B", "gpt3-paper", "acc_norm", 0.709, _GPT3),
    Anchor("GPT-3 175B", "gpt3-paper", "acc_norm", 0.789, _GPT3),
)


def neighbours(protocol: str, metric: str, value: float) -> list[Anchor]:
    """The anchors just below and just above ``value`` (at most two), of this protocol and metric only."""
    row = sorted((a for a in ANCHORS if (a.protocol, a.metric) == (protocol, metric)), key=lambda a: a.value)
    below = [a for a in row if a.value <= value]
    above = [a for a in row if a.value > value]
    return below[-1:] + above[:1]
