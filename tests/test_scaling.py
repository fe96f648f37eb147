"""docs/scaling.md says what benchmarks/scaling.py computes, and that what it should."""

import sys

import pytest
from conftest import ROOT

from aymen_gpt.model.gpt import PRESETS

sys.path.append(str(ROOT / "benchmarks"))
import scaling


@pytest.mark.parametrize("preset", ["gpt2", "gpt3-xl", "gpt3-6.7b"])
def test_the_tables_of_the_page_are_the_scripts(preset):
    assert scaling.table(preset, [1, 8, 64, 512], scaling.ANCHOR) in (ROOT / "docs/scaling.md").read_text()


def test_an_all_reduce_moves_twice_the_bytes_less_what_stays():
    assert scaling.all_reduce(1e9, 1) == 0
    assert scaling.all_reduce(1e9, 8) == pytest.approx(2 * 7 / 8 * 1e9 / scaling.NVLINK)
    between = scaling.all_reduce(1e9, 16) - scaling.all_reduce(1e9, 8)
    assert between == pytest.approx(2 * 1 / 2 * 1e9 / 8 / scaling.NETWORK + 2 * scaling.HOP)


def test_the_parts_add_up_and_overlap_hides_no_more_than_there_is():
    one, many = (scaling.predict(PRESETS["gpt2"], 2**19, gpus, 488_000) for gpus in (1, 512))
    assert one.seconds == one.overlapped == pytest.approx(2**19 / 488_000 + 28 * 124_439_808 / 3.9e12)
    assert many.overlapped == pytest.approx(many.seconds - 2 / 3 * many.compute)
    assert many.overlapped > many.compute / 3 + many.last + many.update


def test_other_models_run_at_the_same_share_of_the_peak():
    xl = PRESETS["gpt3-xl"]
    assert scaling.rate_of(xl, 1000) * xl.flops_per_token == pytest.approx(1000 * PRESETS["gpt2"].flops_per_token)
