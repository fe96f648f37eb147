"""The guard: what is not finite never passes, a spike is told from noise, and ranks decide alike."""

import json
import random

import pytest

from aymen_gpt.training.guard import WINDOW, Guard


def settled(**options):
    guard, rng = Guard(**options), random.Random(0)
    for _ in range(WINDOW):
        assert guard.judge(3.0 + rng.gauss(0, 0.05), 1.0 + rng.gauss(0, 0.1)) == (None, False)
    return guard


@pytest.mark.fault(27, 28)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_skipped_and_counted(value):
    guard = Guard()
    assert guard.judge(value, 1.0) == ("non-finite loss", True)
    assert guard.judge(3.0, value) == ("non-finite gradient", True)
    assert guard.skipped == 2
    guard.judge(3.0, 1.0)
    assert guard.skipped == 0
    assert list(guard.losses) == [3.0]  # the window knows finite numbers only


@pytest.mark.fault(29)
def test_a_spike_of_loss_or_gradient_is_told_from_noise_a_low_loss_and_a_new_level():
    for loss, norm in ((3.5, 1.0), (3.0, 2.0)):
        assert settled().judge(loss, norm) == ("spike", False)
        assert settled(skip_spikes=True).judge(loss, norm) == ("spike", True)
    assert settled().judge(2.0, 0.1) == (None, False)
    first, later = Guard(), settled(skip_spikes=True)
    assert [first.judge(loss, 1.0)[0] for loss in (10.8, 10.8, 30.0)] == [None] * 3
    verdicts = [later.judge(4.0, 1.0)[0] for _ in range(WINDOW)]
    assert (verdicts[0], verdicts[-1]) == ("spike", None)


def test_its_state_passes_through_json():
    guard = settled()
    guard.judge(float("nan"), 1.0)
    twin = Guard()
    twin.restore(json.loads(json.dumps(guard.state())))
    assert twin == guard
    assert twin.judge(3.5, 1.0) == guard.judge(3.5, 1.0) == ("spike", False)
