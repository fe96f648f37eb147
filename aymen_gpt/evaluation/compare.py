"""Two models on the same HellaSwag examples: do they differ, and by how much? Files of hellaswag.py --json in.

Both answered the same questions, and those that both or neither got right say nothing: the McNemar test
(Psychometrika 12, 1947) asks whether the others are split as evenly between the two as coin tosses would be. It is
exact here, by the binomial distribution. The interval of the difference is a percentile bootstrap over examples
(Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aymen_gpt.errors import DataError

PROTOCOLS = ("completion", "harness")
MEASURES = {"acc": "choice", "acc_norm": "choice_norm"}
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


def compare_files(a: Path, b: Path) -> list[Comparison]:
    """Every protocol and measure that both files have. DataError unless they are about the same examples."""
    first, second = read(a), read(b)
    check_same(first, second, f"{a} and {b}")
    shared = [protocol for protocol in PROTOCOLS if protocol in first and protocol in second]
    if not shared:
        raise DataError(f"{a} and {b} have no protocol in common: score both with the same --protocol")
    return [compare(first, second, protocol, measure) for protocol in shared for measure in MEASURES]


def read(path: Path) -> dict[str, Any]:
    """What --json wrote, as far as it is looked at here."""
    try:
        found = json.loads(path.read_text())
        for row in found["examples"]:
            _ = row["label"], row["ind"]
            for protocol in PROTOCOLS:
                if protocol in found:
                    _ = [row[protocol][key] for key in ("token_counts", *MEASURES.values())]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; python hellaswag.py --json {path} writes one") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__} {error}"
        raise DataError(f"{path} is not what python hellaswag.py --json writes: {why}") from None
    return found


def check_same(a: dict[str, Any], b: dict[str, Any], names: str) -> None:
    """DataError at the first difference: numbers of examples, which they are, or how their endings tokenize."""
    if len(a["examples"]) != len(b["examples"]):
        counts = f"{len(a['examples']):,} and {len(b['examples']):,}"
        raise DataError(f"{names} do not compare: {counts} examples; score both with the same --limit and --data")
    for i, (x, y) in enumerate(zip(a["examples"], b["examples"], strict=True), 1):
        if (x["ind"], x["label"]) != (y["ind"], y["label"]):
            raise DataError(f"{names} do not compare: example {i} is another one; score both with the same --data")
        for protocol in PROTOCOLS:
            if protocol in a and protocol in b and x[protocol]["token_counts"] != y[protocol]["token_counts"]:
                raise DataError(
                    f"{names} do not compare: the endings of example {i} have other lengths; it is another "
                    "one, or too long for one of the models"
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
