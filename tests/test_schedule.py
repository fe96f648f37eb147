"""The learning rate of the published run, at the steps where its law changes."""

import math

import pytest

from aymen_gpt.training.optim import learning_rate

PUBLISHED = {"peak": 6e-4, "warmup_steps": 715, "steps": 76_292, "min_ratio": 0.1}


def test_the_published_schedule():
    quarter = 715 + (76_292 - 715) // 4
    expected = {
        0: 6e-4 / 715,
        356: 6e-4 * 357 / 715,
        714: 6e-4,
        715: 6e-4,
        76_291: 6e-5,
        76_292: 6e-5,
        100_000: 6e-5,
    }
    expected[(715 + 76_292) // 2] = 6e-4 * 0.55  # half way down: the mean of peak and floor
    expected[quarter] = 6e-5 + 0.5 * (6e-4 - 6e-5) * (1 + math.cos(math.pi / 4))
    for step, rate in expected.items():
        assert learning_rate(step, **PUBLISHED) == pytest.approx(rate, rel=1e-4), step
    assert learning_rate(0, peak=1.0, warmup_steps=0, steps=1, min_ratio=0.0) == 1.0


def test_the_linear_schedule_stays_at_its_peak_and_falls_over_the_last_60_percent():
    law = {"peak": 1.0, "warmup_steps": 2, "steps": 100, "min_ratio": 0.1, "schedule": "linear"}
    rates = [learning_rate(step, **law) for step in (0, 1, 2, 40, 70, 99, 100, 200)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 0.55, 0.1 + 0.9 / 60, 0.1, 0.1])
