"""No result without its artefact: README, docs/ and the paper are held against docs/results (tests/claims.py)."""

import json
import shutil

import pytest
from claims import DEMO, problems, unlabelled, unmarked, wrong_marks
from conftest import ROOT


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the check reads."""
    for name in ("docs", "aymen_gpt"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "images"))
    for name in ("README.md", "research-report.tex"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_every_stated_result_has_its_artefact(checkout):
    assert problems(checkout) == []


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "hellaswag.json", "status.json"])
def test_deleting_an_artefact_is_found(checkout, name):
    (checkout / DEMO / name).unlink()
    found = problems(checkout)  # without hellaswag.json the score of training counts, and README says another one
    assert any("no artefact shows it" in line or line.startswith("README.md says") for line in found)


def test_deleting_all_artefacts_is_found(checkout):
    shutil.rmtree(checkout / DEMO)
    assert problems(checkout)


def test_another_result_than_the_artefacts_is_found(checkout):
    metrics = checkout / DEMO / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 99999, "tokens": 1, "loss": 1.0, "val_loss": 1.0}\n')
    assert any("run.val-loss" in line and line.startswith("README.md says") for line in problems(checkout))


def test_a_typed_number_in_the_paper_is_found():
    def paper(text):
        return r"\begin{document}" + text + r"\begin{thebibliography}"

    fine = r"\R{run.val-loss} of GPT-2 124M, \cited{33.4\,\%}{original}, \fixed{16} bits, $6N + 12LCT$ % 7"
    assert unlabelled(paper(fine)) == []
    for wrong in ("we got 33.4", r"we got $33.4\,\%$", r"in $7$ hours", r"50\% more", "a loss of 3"):
        assert unlabelled(paper(wrong)) == [wrong.replace("$", "")]


def test_a_typed_number_in_readme_is_found():
    assert (
        unmarked("loss 5.335<!--run.val-loss--> in `0.5` s\n29.55 % of others <!--cited-->\n```\n1.5\n```") == []
    )
    for wrong in ("a loss of 5.335", "in 7 minutes", "3,618 tokens/s", "23 % of the examples"):
        assert unmarked(wrong) == [wrong]


def test_a_mark_must_agree_with_its_fact():
    known = {"run.val-loss": "5.335", "run.training-time": "5.2 minutes"}
    assert wrong_marks("fell to 5.335<!--run.val-loss--> in 5.2 minutes<!--run.training-time-->", known) == []
    assert "is '5.335'" in wrong_marks("fell to 5.2<!--run.val-loss-->", known)[0]
    assert "no artefact" in wrong_marks("took 3<!--run.hours-->", known)[0]


def test_a_benchmark_is_stated_only_while_its_file_is_there(checkout):
    speed = {"shape": "small", "variant": "ours", "tokens_per_second": 1234.4}
    file = checkout / "docs/results/benchmarks/mine.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"machine": "CPU", "results": [speed]}))
    with (checkout / "README.md").open("a") as readme:
        readme.write("1,234<!--benchmark.mine.small.ours.tokens-per-second--> tokens/s\n")
    assert problems(checkout) == []
    file.unlink()
    (found,) = problems(checkout)
    assert found == "README.md states benchmark.mine.small.ours.tokens-per-second: no artefact shows it"
