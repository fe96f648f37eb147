"""Two models on the same HellaSwag examples: do they differ, and by how much? Files of hellaswag.py --json in.

Both answered the same questions, and those that both or neither got right say nothing: the McNemar test
(Psychometrika 12, 1947) asks whether the others are split as evenly between the two as coin tosses would be. It is
exact here, by the binomial distribution. The interval of the difference is a percentile bootstrap over examples
(Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aymen_gpt.errors import DataError
from aymen_gpt.files import read_json
from aymen_gpt.wording import PROTOCOLS

MEASURES = {"acc": "choice", "acc_norm": "choice_norm"}
SHOWN = 0.05  # a smaller p shows a difference
RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """One protocol and measure of two models, a and b, over n examples."""

    protocol: str
    measure: str
    n: int
    right_a: int
    right_b: int
    only_a: int  # examples that a got right and b did not
    only_b: int
    low: float  # 95 % interval of accuracy b - accuracy a
    high: float
    p: float  # of so uneven a split, or more, between equals

    @property
    def difference(self) -> float:
        return (self.right_b - self.right_a) / self.n


@dataclass(frozen=True)
class Report:
    """Two models over the same questions."""

    names: tuple[str, str]
    comparisons: list[Comparison]  # every protocol and measure that both have

    def verdicts(self) -> list[str]:
        """A sentence for each protocol: which model is better by acc_norm, if the examples can tell."""
        found = []
        for c in (c for c in self.comparisons if c.measure == "acc_norm"):
            worse, better = self.names if c.difference > 0 else self.names[::-1]
            if c.p < SHOWN:
                what = (
                    f"{better} is better than {worse}: its acc_norm is {100 * abs(c.difference):.2f} points higher"
                )
                found.append(f"By {c.protocol}, {what} (p = {c.p:.2g}).")
            else:
                what = f"no difference between {' and '.join(self.names)} is shown"
                found.append(f"By {c.protocol}, {what} (acc_norm, p = {c.p:.2g}).")
        return found


def compare_files(a: Path, b: Path) -> Report:
    """DataError unless both files are about the same questions."""
    first, second = read(a), read(b)
    shared = [protocol for protocol in PROTOCOLS if protocol in first and protocol in second]
    if not shared:
        raise DataError(f"{a} and {b} have no protocol in common: score both with the same --protocol")
    check_same(first, second, shared, f"{a} and {b}")
    found = [compare(first, second, protocol, measure) for protocol in shared for measure in MEASURES]
    return Report((name(first), name(second)), found)


def read(path: Path) -> dict[str, Any]:
    """What --json wrote, as far as it is looked at here."""
    if not path.exists():
        raise DataError(f"{path}: no such file; python hellaswag.py -m MODEL --json {path} writes it")
    found = read_json(path)
    try:
        rows, protocols = found["examples"], [protocol for protocol in PROTOCOLS if protocol in found]
        hashes = [found[protocol]["questions_sha256"] for protocol in protocols]
        endings = [row["label"] for row in rows]
        endings += [
            row[protocol][choice] for row in rows for protocol in protocols for choice in MEASURES.values()
        ]
        if not all(type(h) is str for h in hashes) or not all(type(e) is int and 0 <= e < 4 for e in endings):
            raise ValueError("a hash is no text, or a label or choice not 0, 1, 2 or 3")
        if not rows:
            raise ValueError("no examples")
    except (KeyError, TypeError, ValueError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise DataError(
            f"{path} is not what python hellaswag.py --json writes: {why}; score the model again"
        ) from None
    return found


def name(record: dict[str, Any]) -> str:
    """The model as it was typed, and its step if it is a checkpoint of ours."""
    step = record.get("step")
    return f"{record.get('model')}, step {step:,}" if isinstance(step, int) else str(record.get("model"))


def check_same(a: dict[str, Any], b: dict[str, Any], protocols: list[str], names: str) -> None:
    """DataError when the numbers of examples differ, or the questions as the models read them."""
    if len(a["examples"]) != len(b["examples"]):
        counts = f"{len(a['examples']):,} and {len(b['examples']):,}"
        raise DataError(f"{names} do not compare: {counts} examples; score both with the same --limit and --data")
    if any(a[protocol]["questions_sha256"] != b[protocol]["questions_sha256"] for protocol in protocols):
        raise DataError(
            f"{names} do not compare: other questions, or texts made of them in another way; score both with this "
            "version and the same --data and --limit"
        )


def compare(a: dict[str, Any], b: dict[str, Any], protocol: str, measure: str) -> Comparison:
    labels = np.array([row["label"] for row in a["examples"]])
    right_a, right_b = (
        np.array([row[protocol][MEASURES[measure]] for row in record["examples"]]) == labels for record in (a, b)
    )
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    low, high = bootstrap(only_a, only_b, len(labels))
    return Comparison(
        protocol=protocol,
        measure=measure,
        n=len(labels),
        right_a=int(right_a.sum()),
        right_b=int(right_b.sum()),
        only_a=only_a,
        only_b=only_b,
        low=low,
        high=high,
        p=mcnemar(only_a, only_b),
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """The chance that tosses of a fair coin, one for each example on which the models differ, fall so unevenly.

    >>> mcnemar(1, 5), mcnemar(0, 0)
    (0.21875, 1.0)
    """
    n, term, tail = only_a + only_b, 1, 0
    for k in range(min(only_a, only_b) + 1):  # whole numbers, exact: the terms are n over k
        tail += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def bootstrap(only_a: int, only_b: int, n: int, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of accuracy b - accuracy a.

    Drawing n examples anew, with replacement, changes the difference by how many of each kind are drawn, and these
    counts are multinomial: so they are drawn instead.
    """
    shares = np.array([only_a, only_b, n - only_a - only_b]) / n
    draws = np.random.default_rng(seed).multinomial(n, shares, size=RESAMPLES)
    low, high = np.percentile((draws[:, 1] - draws[:, 0]) / n, [2.5, 97.5])
    return float(low), float(high)
