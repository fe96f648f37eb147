"""Two models on the same HellaSwag examples: do they differ, and by how much? Files of hellaswag.py --json in.

Both answered the same questions, and those that both or neither got right say nothing: the McNemar test
(Psychometrika 12, 1947) asks whether the others are split as evenly between the two as coin tosses would be. It is
exact here, by the binomial distribution. The interval of the difference is a percentile bootstrap over examples
(Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13).
"""

from dataclasses import dataclass
from pathlib import Path

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
            points = f"{100 * abs(c.difference):.2f} points higher"
            if c.p < SHOWN:
                what = f"{better} is better than {worse}: its acc_norm is {points} (p = {c.p:.2g})"
            else:
                what = f"no difference between {' and '.join(self.names)} is shown (acc_norm, p = {c.p:.2g})"
            found.append(f"By {c.protocol}, {what}.")
        return found


@dataclass(frozen=True)
class Answers:
    """What hellaswag.py --json wrote of a model, as far as it is looked at here."""

    name: str
    n: int
    questions: dict[str, str]  # protocol -> the hash of the questions as it renders them
    right: dict[tuple[str, str], np.ndarray]  # (protocol, measure) -> whether the model got each example right


def read(path: Path) -> Answers:
    """DataError unless ``path`` has a label and the choices of a model, each 0 to 3, for every example."""
    if not path.exists():
        raise DataError(f"{path}: no such file; python hellaswag.py -m MODEL --json {path} writes it")
    found = read_json(path)
    try:
        rows, questions = found["examples"], {p: found[p]["questions_sha256"] for p in PROTOCOLS if p in found}
        labels = np.array([row["label"] for row in rows])
        chosen = {
            (protocol, measure): np.array([row[protocol][choice] for row in rows])
            for protocol in questions
            for measure, choice in MEASURES.items()
        }
        if not all(
            endings.dtype == int and set(endings) <= {0, 1, 2, 3} for endings in (labels, *chosen.values())
        ):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path} is not what python hellaswag.py --json writes; score the model again") from None
    step = f", step {found['step']:,}" if isinstance(found.get("step"), int) else ""
    right = {what: endings == labels for what, endings in chosen.items()}
    return Answers(f"{found.get('model')}{step}", len(labels), questions, right)


def compare_files(path_a: Path, path_b: Path) -> Report:
    """DataError unless both files are about the same questions."""
    a, b = read(path_a), read(path_b)
    shared = [protocol for protocol in a.questions if protocol in b.questions]
    if not shared:
        raise DataError(f"{path_a} and {path_b} have no protocol in common: score both with the same --protocol")
    if a.n != b.n or any(a.questions[protocol] != b.questions[protocol] for protocol in shared):
        raise DataError(
            f"{path_a} ({a.n:,} examples) and {path_b} ({b.n:,}) do not compare: other questions, or texts made "
            "of them in another way; score both with this version and the same --data and --limit"
        )
    return Report((a.name, b.name), [compare(a, b, protocol, m) for protocol in shared for m in MEASURES])


def compare(a: Answers, b: Answers, protocol: str, measure: str) -> Comparison:
    right_a, right_b = a.right[protocol, measure], b.right[protocol, measure]
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    interval, p = bootstrap(only_a, only_b, a.n), mcnemar(only_a, only_b)
    return Comparison(protocol, measure, a.n, int(right_a.sum()), int(right_b.sum()), only_a, only_b, *interval, p)


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
