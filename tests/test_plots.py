"""Curves: what matplotlib was given to draw, and the SVG that a page takes in."""

import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from conftest import ROOT
from run_folders import write_run

from aymen_gpt.reporting import plots
from aymen_gpt.reporting.published_scores import neighbours
from aymen_gpt.reporting.run_folder import read_run
from benchmarks import five_kills

NAN = float("nan")


@pytest.fixture
def write(tmp_path):
    """write(rows, config, name) -> the Run; a step is 100 tokens."""

    def write(rows, config=None, name="run"):
        config = {"run": {"tokens_per_step": 100}} | (config or {})
        return read_run(write_run(tmp_path / name, rows, config=config))

    return write


def texts(figure):
    """All that a figure says beside its axes' numbers."""
    (axes,) = figure.axes
    legend = axes.get_legend()
    return [t.get_text() for t in axes.texts] + ([t.get_text() for t in legend.get_texts()] if legend else [])


def lines(figure):
    return {line.get_label(): line for line in figure.axes[0].lines}


def test_decimation_keeps_spikes_ends_order_and_gaps():
    rng = np.random.default_rng(1)
    x, y = np.arange(76_292.0), rng.normal(3, 0.1, 76_292)
    y[41_234], y[60_001], y[2000:4000] = 99, -99, NAN
    kept, values = plots.decimate(x, y)
    assert len(kept) <= 1000
    assert {41_234, 60_001, 0, 76_291} <= set(kept)
    assert list(kept) == sorted(kept)
    np.testing.assert_array_equal(values, y[kept.astype(int)])
    assert np.isnan(values[(kept >= 2000) & (kept < 4000)]).any()
    assert plots.decimate(x[:1000], y)[0].shape == (1000,)


def test_smooth_is_the_running_median_and_passes_over_gaps():
    y = np.array([1, 2, 90, NAN, 3, 1, 1, 1, 1, 1, 1])  # nine of them are a window
    assert plots.smooth(np.arange(11.0), y)[1][4] == 1
    assert np.isnan(plots.smooth(np.arange(2.0), np.array([NAN, NAN]))[1]).all()
    x, values = plots.smooth(np.arange(10_000.0), np.ones(10_000))
    assert (len(x), x[0], x[-1], set(values)) == (500, 0, 9_999, {1.0})


def test_the_loss_chart_has_what_the_rows_say_by_tokens(write):
    rows = [{"step": s, "tokens": 100 * s, "loss": 9 - s / 10} for s in range(1, 31)]
    rows[9] |= {"val_loss": 8.5, "spike": True}
    rows[14]["loss"] = None
    history = {"history": [{"step": 0}, {"step": 20}]}
    figure = plots.loss(write(rows, history))
    drawn = lines(figure)
    x, y = drawn["training, each step"].get_data()
    assert list(x[:2]) == [100, 200]
    assert y[0] == 8.9
    assert np.isnan(y[14])
    assert [list(a) for a in drawn["validation"].get_data()] == [[1000], [8.5]]
    assert list(drawn["spike (1)"].get_xdata()) == [1000]
    assert list(drawn["not finite (1)"].get_xdata()) == [1500]
    assert texts(figure)[0] == "stopped here and continued"
    assert "GPT-2 124M, validation" not in texts(figure)
    assert figure.axes[0].get_xlim() == (0, 3000)
    on_its_text = plots.loss(write(rows, {"data": {"source": {"repo": "HuggingFaceFW/fineweb-edu"}}}))
    assert list(lines(on_its_text)["GPT-2 124M, validation"].get_ydata()) == [3.2924, 3.2924]


def test_the_start_of_a_long_run_is_left_above_the_frame():
    x = np.arange(2000.0)
    y = 3 + 8 * np.exp(-x / 10)
    lo, hi = plots.loss_limits((x, y), (x[:0], y[:0]))
    assert lo < 3 < hi < 4
    assert plots.loss_limits((x[:500], y[:500]))[1] > 11


@pytest.mark.parametrize(("norms", "scale"), [([1.0, 2.0, 3.0], "linear"), ([0.1, 0.0, 9.0], "log")])
def test_a_norm_that_spreads_is_on_a_log_scale(write, norms, scale):
    figure = plots.small(write([{"step": i, "grad_norm": v} for i, v in enumerate(norms, 1)]), "grad_norm")
    assert figure.axes[0].get_yscale() == scale


def test_a_value_between_gaps_is_a_dot(write):
    figure = plots.small(write([{"step": 1, "lr": None}, {"step": 2, "lr": 0.1}, {"step": 3, "lr": None}]), "lr")
    assert [list(line.get_xdata()) for line in figure.axes[0].lines if line.get_marker() == "o"] == [[200]]


def part(value):
    return {"acc_norm": value, "acc_norm_stderr": 0.01}


def test_scores_are_set_beside_anchors_of_their_own_protocol_only(write):
    run = write([{"step": 1, "hellaswag": {"n": 10042, "harness": part(0.30)}}])
    said = texts(plots.scores(run))
    assert "30.00 ± 1.00" in said
    assert "31.14" in said
    assert "29.55" not in said
    assert {"harness protocol, acc_norm", "the GPT-3 paper's own, acc_norm", "GPT-3 Small", "chance"} <= set(said)


def test_neighbours_are_the_nearest_anchors_of_one_protocol():
    assert [a.model for a in neighbours("completion", "acc_norm", 0.26)] == ["GPT-2 124M"]
    assert [a.model for a in neighbours("completion", "acc_norm", 0.30)] == ["GPT-2 124M", "GPT-2 355M"]
    assert [a.model for a in neighbours("harness", "acc_norm", 0.99)] == ["GPT-2 1558M"]


def test_labels_of_close_levels_do_not_touch(write):
    rows = [{"step": s, "hellaswag": {"n": 10, "completion": part(0.437)}} for s in (1, 2)]
    figure = plots.hellaswag(write(rows))
    (axes,) = figure.axes
    places = sorted(axes.transData.transform((0, text.xy[1]))[1] for text in axes.texts)
    assert len(places) == 4  # GPT-2 774M has 43.20 %, GPT-3 Medium 43.6 %
    assert min(np.diff(places)) >= 16 * 0.99 * figure.dpi / 72


def test_runs_are_compared_by_tokens(write):
    runs = [
        write([{"step": s, "loss": 9.0, "val_loss": 8.0} for s in steps], name=f"{steps}")
        for steps in ((1, 2), (1,))
    ]
    drawn = plots.losses(runs).axes[0].lines
    assert [list(line.get_xdata()) for line in drawn if line.get_label() == "validation"] == [[100, 200], [100]]
    assert {line.get_color() for line in drawn} == {plots.COLOURS["train"], plots.COLOURS["val"]}


def test_an_svg_has_the_pages_colours_its_own_ids_and_real_text(write):
    run = write([{"step": s, "loss": 9.0, "val_loss": 8.0} for s in range(1, 30)])
    svg = plots.svg(plots.loss(run), "mine", 'a "<b>')
    root = ET.fromstring(svg.replace("xlink:", ""))
    assert svg == plots.svg(plots.loss(run), "mine", 'a "<b>')
    assert (root.get("role"), root.get("aria-label")) == ("img", 'a "<b>')
    assert "training, each step" in [e.text for e in root.iter("text")]
    assert not re.search(r"#[0-9a-f]{6}\b|http|\burl\((?!#mine-)", svg)
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert ids
    assert all(name.startswith("mine-") for name in ids)
    assert set(re.findall(r"#(mine-[\w-]+)", svg)) == set(ids)


def test_the_dark_page_has_every_colour_of_the_light_one():
    css = (ROOT / "aymen_gpt/reporting/page.css").read_text()
    dark = set(re.findall(r"--(\w+):#", css.split("prefers-color-scheme:dark")[1].split("}")[0]))
    assert plots.COLOURS.keys() == dark


def test_the_picture_of_five_kills_shows_them_and_one_curve():
    found = json.loads(five_kills.FOUND.read_text())
    curves, zoom = five_kills.draw(found).axes
    marks = [line.get_xdata()[0] for line in curves.lines if line.get_color() == plots.BAD]
    assert marks == found["killed_after_step"]
    alone, killed = (line for line in zoom.lines if line.get_label() in ("left alone", "killed five times"))
    assert list(alone.get_ydata()) == list(killed.get_ydata())
    with pytest.raises(AssertionError):
        five_kills.draw(found | {"steps_that_differ": [7]})


def test_five_kills_compares_what_each_run_logged():
    whole = [{"step": 0, "val_loss": 9.0}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    killed = [*whole[:2], {"step": 2, "loss": 2.5}]
    found = five_kills.record(whole, killed, [1])
    assert found["steps_that_differ"] == [2]
    assert (found["loss"], found["loss_of_the_killed"]) == ([None, 3.0, 2.0], [None, 3.0, 2.5])
