"""Numbers in words."""

import pytest

from aymen_gpt.wording import duration, human, percent, shape


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0006, "6e-4"),
        (2.5e-4, "2.5e-4"),
        (0.25, "0.25"),
        (3.14159, "3.14"),
        (2600, "2,600"),
        (9994, "9,994"),
        (9999, "10K"),
        (204_800, "205K"),
        (1_228_800, "1.23M"),
        (999_600, "1M"),
        (16_080_896, "16.1M"),
        (124_439_808, "124M"),
        (39_998_980_096, "40B"),
        (3.15e12, "3.15T"),
    ],
)
def test_human_numbers(value, text):
    assert human(value) == text


def test_a_share_is_a_per_cent_with_its_error():
    assert percent(0.2955) == "29.55 %"
    assert percent(0.261, 0.0139) == "26.10 % ± 1.39"
    assert percent(0.2, digits=1) == "20.0 %"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(42, "42 s"), (59.7, "1 min 00 s"), (500, "8 min 20 s"), (11_100, "3 h 05 min"), (187_200, "2 d 4 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_shape_leaves_out_what_is_not_known():
    model = {"n_layer": 4, "n_head": None, "n_embd": 256, "block_size": "x"}
    assert shape(model, 16_080_896) == "16.1M parameters, 4 layers, 256 wide"
    assert shape({}, None) == ""
