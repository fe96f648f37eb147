"""Published HellaSwag scores to set a run beside, each with the protocol it was measured by.

The protocols differ by more than a model's size class is worth (GPT-2 124M: 29.55 by completion, 31.14 by
harness), so a score is compared only with anchors of its own protocol. GPT-3's are by a third one, the
paper's own (activity label in front, likelihood per token, section 2.4 and appendix G): they may be shown
for orientation and are labelled so.
"""

from dataclasses import dataclass

CHANCE = 0.25  # four endings, one is right
# Nats per token of GPT-2 124M on FineWeb-Edu's held-out shard: build-nanogpt, play.ipynb.
GPT2_FINEWEB_EDU = 3.2924

_DOCSTRING = "build-nanogpt, hellaswag.py docstring (10,042 examples)"
_NOTEBOOK = "build-nanogpt, play.ipynb"
_GPT3 = "arXiv:2005.14165, Table H.1, zero-shot, dev set"
_GPT3_SCORES = {
    "GPT-3 Small": 0.337, "GPT-3 Medium": 0.436, "GPT-3 Large": 0.510, "GPT-3 XL": 0.547,
    "GPT-3 2.7B": 0.628, "GPT-3 6.7B": 0.674, "GPT-3 13B": 0.709, "GPT-3 175B": 0.789,
}  # fmt: skip


@dataclass(frozen=True)
class Anchor:
    """One published number, value in 0..1."""

    model: str
    protocol: str  # completion, harness or gpt3-paper
    metric: str  # acc or acc_norm
    value: float
    source: str


ANCHORS = tuple(
    Anchor(model, protocol, metric, value, source)
    for protocol, source, models in (
        ("completion", _DOCSTRING, {"GPT-2 124M": (0.2859, 0.2955)}),
        ("completion", _NOTEBOOK, {"GPT-2 355M": (None, 0.3752), "GPT-2 774M": (None, 0.4320)}),
        ("completion", _DOCSTRING, {"GPT-2 1558M": (0.3842, 0.4893)}),
        ("harness", _DOCSTRING, {"GPT-2 124M": (0.2892, 0.3114), "GPT-2 1558M": (0.4004, 0.5089)}),
        ("gpt3-paper", _GPT3, {model: (None, acc_norm) for model, acc_norm in _GPT3_SCORES.items()}),
    )
    for model, values in models.items()
    for metric, value in zip(("acc", "acc_norm"), values, strict=True)
    if value is not None
)


def neighbours(protocol: str, metric: str, value: float) -> list[Anchor]:
    """The anchors just below and just above ``value`` (at most two), of this protocol and metric only."""
    row = sorted((a for a in ANCHORS if (a.protocol, a.metric) == (protocol, metric)), key=lambda a: a.value)
    below = [a for a in row if a.value <= value]
    above = [a for a in row if a.value > value]
    return below[-1:] + above[:1]
