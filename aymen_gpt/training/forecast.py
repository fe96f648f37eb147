"""What a run's last validation loss will be, and the HellaSwag that goes with it, from its validations so far.

The law is L(s) = E + B s^-beta + GAIN r(s) after s updates. The first two terms are those of Hoffmann et al.
(arXiv:2203.15556, equation 2) at one size of model. The last one is what the loss has yet to gain from the fall of
the learning rate, r(s) of its peak (after Tissue et al., arXiv:2408.11029; docs/experiments.md says how their own
law did on our curves). docs/evaluation.md counts how often the interval held the end of a run.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from aymen_gpt.data.shards import read_manifest
from aymen_gpt.training.config import TrainConfig
from aymen_gpt.training.optim import scheduled_rate

ODDS = 0.8  # with which the interval is to hold the last loss
GAIN = 0.15  # nats, and WIDTH: learnt from runs of ours by tests/test_forecast.py
WIDTH = 0.82  # of an interval: what gives these odds
FIRST, FEWEST = 0.25, 5  # no forecast before this share of the run, nor from fewer validations
BETAS = np.linspace(0.1, 1, 10)

# Validation loss on FineWeb-Edu and HellaSwag (acc_norm, completion, all examples) of GPT-2 124M trained on it by
# others, as they state them; docs/evaluation.md says who and where.
PAIRS = ((3.3969, 0.2699), (3.26, 0.28), (3.22, 0.283), (3.0283, 0.3059), (2.9401, 0.3353))
T = 1.638  # 0.9 quantile of Student's t with 3 degrees of freedom: five pairs less a line's two numbers

Validations = list[tuple[int, float]]  # (step, loss in nats per token)


def forecast(validations: Validations, config: TrainConfig) -> dict[str, float]:
    """The loss at the end of a run with its interval, {} while it is too early to say.

    Of the first twentieth, and of the warm-up, nothing is used. Half the interval is WIDTH times this: the scatter
    around the law, plus what the second half of the updates so far gained by it times the updates to come for each
    one done.
    """
    steps, begin = config.steps, max(config.steps / 20, config.warmup_steps)

    def to_gain(step: int) -> float:
        return GAIN * (scheduled_rate(config, step) - scheduled_rate(config, steps)) / config.learning_rate

    used = np.array([(s / steps, loss - to_gain(s)) for s, loss in validations if s > begin])
    if len(used) < FEWEST or not FIRST <= used[-1, 0] < 1:
        return {}
    (x, y), fits = used.T, []
    for beta in BETAS:
        terms = np.stack([np.ones(len(x)), x**-beta - 1], axis=1)  # (n, 2); 1 and 0 at the end of the run
        (end, b), *_ = np.linalg.lstsq(terms, y)
        fits.append((float(((terms @ (end, b) - y) ** 2).sum()), end, b, beta))
    error, end, b, beta = min(fits)
    gained = abs(b) * ((x[-1] / 2) ** -beta - x[-1] ** -beta)
    half = WIDTH * ((error / (len(x) - 3)) ** 0.5 + gained * (1 / x[-1] - 1))
    found = {"loss": end, "low": end - half, "high": end + half, "odds": ODDS}
    return {name: round(float(value), 4) for name, value in found.items()} if np.isfinite(half) else {}


def hellaswag(loss: float, low: float, high: float) -> dict[str, float]:
    """The score that a line through PAIRS gives for a loss with its interval, {} for a loss beyond the pairs.

    The ends are those of the loss's interval, each with the prediction interval of the line there.
    """
    x, y = np.array(PAIRS).T
    if not x.min() <= loss <= x.max():
        return {}
    slope, start = np.polyfit(x, y, 1)
    scatter = float((((slope * x + start - y) ** 2).sum() / (len(x) - 2)) ** 0.5)

    def at(loss: float, side: int) -> float:
        spread = (1 + 1 / len(x) + (loss - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()) ** 0.5
        return round(float(slope * loss + start + side * T * scatter * spread), 4)

    return {"hellaswag": at(loss, 0), "hellaswag_low": at(high, -1), "hellaswag_high": at(low, 1)}


def forecaster(config: TrainConfig) -> Callable[[Validations], dict[str, float]]:
    """What RunLog calls at a validation: the row's ``forecast``, with a score where the text is that of PAIRS."""
    source = (read_manifest(Path(config.data)) or {}).get("source")

    def expected(validations: Validations) -> dict[str, float]:
        try:
            found = forecast(validations, config)
        except np.linalg.LinAlgError:  # no reason to stop training
            return {}
        if not found or "fineweb-edu" not in str(source).lower():
            return found
        return found | hellaswag(found["loss"], found["low"], found["high"])

    return expected
