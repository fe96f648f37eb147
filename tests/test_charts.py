"""Charts: ticks one can check by hand, decimation that keeps extremes, marks where the numbers say."""

import random
import re
import xml.etree.ElementTree as ET

import pytest

from aymen_gpt.reporting.charts import (
    Dots,
    Level,
    Line,
    Rug,
    chart,
    decimate,
    human,
    legend,
    linear_axis,
    log_axis,
    log_ticks,
    nice_ticks,
    percent,
    smooth,
    tick_labels,
    value_axis,
)


@pytest.mark.parametrize(
    ("lo", "hi", "count", "ticks"),
    [
        (0, 10, 5, [0, 2, 4, 6, 8, 10]),
        (2.7, 4.3, 5, [3.0, 3.5, 4.0]),
        (0, 6e-4, 3, [0, 2e-4, 4e-4, 6e-4]),
        (0, 40e9, 5, [0, 10e9, 20e9, 30e9, 40e9]),
        (-1, 1, 4, [-1, -0.5, 0, 0.5, 1]),
        (3, 3, 5, [3]),
    ],
)
def test_ticks_are_round_numbers_inside_the_range(lo, hi, count, ticks):
    assert nice_ticks(lo, hi, count) == pytest.approx(ticks, rel=1e-12)


def test_ticks_law_holds_for_any_range():
    rng = random.Random(0)
    for _ in range(300):
        lo = rng.uniform(-1, 1) * 10 ** rng.randint(-6, 12)
        hi = lo + rng.uniform(0.1, 9) * 10 ** rng.randint(-3, 12)
        ticks = nice_ticks(lo, hi, 5)
        assert 2 <= len(ticks) <= 7
        assert all(lo - 1e-6 * (hi - lo) <= t <= hi + 1e-6 * (hi - lo) for t in ticks)
        assert len(set(tick_labels(ticks))) == len(ticks) or abs(lo) > 100 * (hi - lo)


@pytest.mark.parametrize(
    ("lo", "hi", "ticks"),
    [(0.1, 2, [0.1, 0.2, 0.5, 1, 2]), (0.01, 100, [0.01, 0.1, 1, 10, 100]), (1, 1e9, [1, 100, 1e4, 1e6, 1e8])],
)
def test_log_ticks_are_1_2_5_or_powers_of_ten(lo, hi, ticks):
    assert log_ticks(lo, hi) == pytest.approx(ticks)


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


def test_tick_labels_have_the_digits_that_tell_them_apart():
    assert tick_labels([3.0, 3.5, 4.0]) == ["3.0", "3.5", "4.0"]
    assert tick_labels([0, 2e-4, 4e-4]) == ["0", "2e-4", "4e-4"]
    assert tick_labels([0, 1000, 2000]) == ["0", "1,000", "2,000"]
    assert tick_labels([0, 2500, 5000, 7500, 10_000]) == ["0", "2.5K", "5K", "7.5K", "10K"]
    assert tick_labels([0, 500_000, 1_000_000]) == ["0", "500K", "1M"]


def test_percent_keeps_published_digits():
    assert [percent(v) for v in (0.2955, 0.337, 0.25)] == ["29.55\u00a0%", "33.7\u00a0%", "25\u00a0%"]


def test_decimation_keeps_spikes_ends_and_order():
    rng = random.Random(1)
    points = [(i, rng.gauss(3, 0.1)) for i in range(76_292)]
    points[41_234] = (41_234, 99.0)
    points[60_001] = (60_001, -99.0)
    kept = decimate(points)
    assert len(kept) <= 1000
    assert {(41_234, 99.0), (60_001, -99.0), points[0], points[-1]} <= set(kept)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert set(kept) <= set(points)


def test_decimation_leaves_short_series_alone_and_long_gaps_open():
    short = [(i, float(i)) for i in range(1000)]
    assert decimate(short) == short
    gap = [(i, None if 2000 <= i < 4000 else 1.0) for i in range(6000)]
    kept = decimate(gap)
    assert any(y is None and 2000 <= x < 4000 for x, y in kept)
    assert len(kept) <= 1000


def test_smooth_is_the_running_median_and_passes_over_gaps():
    points = list(enumerate([1.0, 2.0, 90.0, None, 3.0]))
    assert smooth(points, 3) == [(0, 1.5), (1, 2.0), (2, 46.0), (3, 46.5), (4, 3.0)]
    assert smooth([(0, None), (1, None)], 3) == [(0, None), (1, None)]
    long = smooth([(i, 1.0) for i in range(10_000)], 101)
    assert len(long) == 500
    assert (long[0], long[-1]) == ((0, 1.0), (9_999, 1.0))


def test_axes_place_values():
    assert linear_axis(0, 10).place(2.5) == 0.25
    assert log_axis(0.1, 10).place(1) == pytest.approx(0.5)
    assert 0 < linear_axis(3, 3).place(3) < 1
    assert value_axis([1.0, 2.0]).log is False
    assert value_axis([0.01, 2.0]).log is True
    assert value_axis([]).hi == 1.0


def draw(marks, x=None, y=None):
    svg = chart("t", "A <title>", "what & why", x or linear_axis(0, 10, "tokens"), y or linear_axis(0, 10), marks)
    return ET.fromstring(svg)


def found(root, name, css):
    return [e for e in root.iter(name) if css in e.get("class", "").split()]


def test_a_chart_is_named_described_and_escaped():
    root = draw([Line('a "quoted" <name>', [(0, 0), (10, 10)], "train")])
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == "t-t t-d"
    assert [root.find("title").text, root.find("desc").text] == ["A <title>", "what & why"]
    assert found(root, "path", "curve")[0].get("data-name") == 'a "quoted" <name>'


def test_a_line_runs_through_its_points_with_gaps_where_nothing_was_measured():
    root = draw([Line("a", [(0, 0), (5, 10), (6, None), (8, 5), (9, None), (10, 2)], "train")])
    d = found(root, "path", "curve")[0].get("d")
    assert d == "M0 10000L5000 0M8000 5000L8000 5000M10000 8000L10000 8000"


def test_a_line_of_one_value_is_a_dot():
    root = draw([Line("a", [(5, 2.5), (6, None)], "train")])
    assert [(c.get("cx"), c.get("cy")) for c in root.iter("circle")] == [("50%", "75%")]


def test_dots_carry_their_error_bars_and_stay_in_the_frame():
    root = draw([Dots("a", [(5, 5), (6, 11), (7, None), (8, 2)], "val", [1.0, 1.0, None, None])])
    assert [(c.get("cx"), c.get("cy")) for c in root.iter("circle")] == [("50%", "50%"), ("80%", "80%")]
    bars = [e for g in found(root, "g", "dots") for e in g.iter("line")]
    assert [(b.get("x1"), b.get("y1"), b.get("y2")) for b in bars] == [("50%", "40%", "60%")]


def test_a_thousand_dots_are_enough():
    root = draw([Dots("a", [(i / 500, 5.0) for i in range(5000)], "val")])
    assert 500 <= len(list(root.iter("circle"))) <= 1000


def test_labels_of_close_levels_do_not_overlap():
    root = draw([Level("low", 5.0, "5", "same"), Level("high", 5.1, "5.1", "same")])
    y = {e.text: float(e.get("y")) for e in found(root, "text", "name")}
    assert y["low"] - y["high"] >= 28
    lines = [e.get("y1") for g in found(root, "g", "level") for e in g.iter("line")]
    assert lines == ["49%", "50%"]


def test_a_rug_marks_each_place_once():
    root = draw([Rug("not finite", [2.0, 2.0, 4.0], "bad")])
    assert [e.get("x1") for g in found(root, "g", "rug") for e in g.iter("line")] == ["20%", "40%"]


def test_zeros_on_a_log_axis_are_gaps():
    root = draw([Line("a", [(0, 1), (5, 0.0), (10, 10)], "train")], y=log_axis(1, 100))
    assert found(root, "path", "curve")[0].get("d").count("M") == 2


def test_a_legend_names_curves_but_not_references():
    marks = [Line("<one>", [], "raw"), Dots("two", [], "val"), Level("chance", 0.25, "25 %", "chance")]
    assert re.findall(r"</span>([^<]*)</li>", legend(marks)) == ["&lt;one&gt;", "two"]
    assert legend(marks[:1]) == ""
