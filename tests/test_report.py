"""make report: a run's files become numbers, curves, tables and, where LaTeX is installed, a PDF."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from aymen_gpt.commands import report
from aymen_gpt.errors import AymenError, DataError
from aymen_gpt.reporting import facts, latex, paper
from aymen_gpt.reporting.facts import UNKNOWN
from aymen_gpt.reporting.runs import read_run

HOSTILE = r"\input{/etc/passwd} 50% #1 $x_1$ & ~^ {}"


@pytest.fixture
def run(tmp_path):
    """A finished run of 40 steps of 100 tokens whose numbers can be computed by hand."""
    folder = tmp_path / "runs" / "small_1"
    folder.mkdir(parents=True)
    config = {
        "run": {
            "run": "runs/small_1",
            "preset": "tiny",
            "steps": 40,
            "tokens_per_step": 100,
            "learning_rate": 3e-3,
        },
        "command": ["python", "pretrain.py", "--run", HOSTILE],
        "n_params": 1_234_567,
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64},
        "data": {"folder": HOSTILE, "train_tokens": 8000, "manifest_sha256": "a" * 64},
        "host": {"cores": 2},
        "device": {"name": "CPU"},
        "git_commit": "0123456789abcdef",
        "history": [{}, {}],
    }
    rows = [{"step": 0, "tokens": 0, "val_loss": 10.0}]
    for step in range(1, 41):
        rows.append({"step": step, "tokens": 100 * step, "loss": 8.0, "lr": 1e-3, "step_seconds": 3.0})
        rows[-1] |= {"tokens_per_second": 1000.0 + step, "grad_norm": 1.0}
    rows[-1]["val_loss"] = 5.0
    score = {"model": "runs/small_1", "n": 1000, "examples": [1, 2]}
    score["completion"] = {"acc": 0.26, "acc_stderr": 0.0139, "acc_norm": 0.238, "acc_norm_stderr": 0.01347}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "status.json").write_text(json.dumps({"state": "done", "step": 40, "steps": 40}))
    (folder / "hellaswag.json").write_text(json.dumps(score))
    sample = {"step": 40, "prompt": HOSTILE, "text": f"{HOSTILE} und schön ש"}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return folder


def shown(run):
    return {fact.name: fact.shown for fact in facts.run_facts(read_run(run))}


def test_the_facts_are_what_the_files_say(run):
    found = shown(run)
    expected = {
        "params": "1,234,567",
        "val-loss": "5.000",
        "first-val-loss": "10.00",
        "perplexity": "148",
        "train-loss": "8.000",
        "tokens": "4,000",
        "epochs": "0.50",
        "training-time": "2.0 minutes",
        "speed": "1,020",
        "starts": "2",
        "commit": "0123456789ab",
        "completion-acc-norm": "23.8 %",
        "completion-acc-norm-stderr": "1.3",
        "state": "done",
    }
    assert {name: found[f"run.{name}"] for name in expected} == expected


def test_what_is_not_there_is_not_measured(run):
    assert shown(run)["run.harness-acc-norm"] == UNKNOWN
    (run / "metrics.jsonl").unlink()
    found = shown(run)
    assert {found[f"run.{name}"] for name in ("val-loss", "steps", "speed", "skipped", "training-time")} == {
        UNKNOWN
    }


def test_a_log_that_lacks_steps_gives_no_training_time(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:5] + lines[6:]) + "\n")
    assert shown(run)["run.training-time"] == UNKNOWN


def test_nothing_from_a_file_reaches_latex_unescaped():
    text = latex.escape(HOSTILE)
    assert text.startswith(r"\textbackslash{}input\{/etc/passwd\} 50\% \#1 \$x\_1\$ \& ")
    left = re.sub(r"\\text\w+\{\}|\\[%#$_&{}]", "", text)
    assert not set(left) & set("\\%#$&~^_")
    assert latex.escape("schön\nש") == "schon [U+05E9]"


def test_tables_of_a_page_keep_section_command_and_cells():
    rows = "| way | MB/s |\n|---|---|\n| ours & co | 1.5 |\n| theirs | 1 |\n"
    page = f"# T\n\n## Speed\n\n`python b.py --n 2`, today\n\n{rows}"
    (found,) = latex.tables(page)
    assert (found.section, found.command, found.header) == ("Speed", "python b.py --n 2", ["way", "MB/s"])
    assert found.rows == [["ours & co", "1.5"], ["theirs", "1"]]
    assert r"ours \& co & 1.5 \\" in latex.table(found)


def test_the_parts_of_the_paper(run):
    text = (ROOT / "research-report.tex").read_text()
    read = read_run(run)
    parts = paper.parts(read, report.all_facts(read, ROOT), text, ROOT)
    assert r"\result{run.val-loss}{5.000}" in parts["results.tex"]
    assert parts["loss.dat"].startswith("x y\n100 8\n200 8\n")
    assert r"config.\allowbreak{}json" in parts["artefacts.tex"]
    files = set(re.findall(r"\\input\{([^}]*)\}|\\IfFileExists\{([^}]*)\}", text))
    assert {a or b for a, b in files} - {"gpt2.dat"} <= parts.keys()
    assert not {name for name in parts if name.endswith(".dat") or "labels" in name} - paper.OPTIONAL
    assert paper.stated(text) <= {fact.name for fact in report.all_facts(read, ROOT)}


def test_a_run_on_fineweb_edu_is_drawn_beside_gpt2(run):
    config = json.loads((run / "config.json").read_text())
    config["data"]["source"] = {"repo": "HuggingFaceFW/fineweb-edu"}
    (run / "config.json").write_text(json.dumps(config))
    assert paper.curves(read_run(run))["gpt2.dat"] == "x y\n0 3.2924\n4000 3.2924\n"


def test_a_curve_of_another_run_is_not_left_for_this_one(run, tmp_path, monkeypatch):
    """Figures are drawn from whatever file is there."""
    monkeypatch.setattr(report, "compile_paper", lambda out: None)
    assert report.main([str(run), "--out", str(tmp_path / "out")]) == 0
    (tmp_path / "out/mine.tex").write_text("kept")
    (run / "hellaswag.json").unlink()
    assert report.main([str(run), "--out", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "mine.tex" in names
    assert not {"hellaswag.dat", "hellaswag-labels.tex"} & names


def test_a_digest_gives_the_same_facts_from_less(run, tmp_path):
    print(report.digest(read_run(run), tmp_path / "digest"))
    assert shown(tmp_path / "digest") == shown(run)
    assert "examples" not in json.loads((tmp_path / "digest/hellaswag.json").read_text())
    assert len(json.loads((tmp_path / "digest/digest.json").read_text())["sha256"]["metrics.jsonl"]) == 64


def test_a_digest_is_made_of_finished_runs_only(run, tmp_path):
    (run / "status.json").write_text('{"state": "running"}')
    with pytest.raises(DataError, match="is running: a digest is made of a finished run"):
        report.digest(read_run(run), tmp_path / "digest")
    (run / "hellaswag.json").unlink()
    with pytest.raises(DataError, match=r"has no hellaswag\.json"):
        report.digest(read_run(run), tmp_path / "digest")


def test_pages_follow_a_new_digest(tmp_path):
    page, other = tmp_path / "a.md", tmp_path / "b.md"
    page.write_text("fell to 5.335<!--run.val-loss-->, not 5.335, in 5.335<!--run.other-->")
    other.write_text("5.335")
    old, new = {"run.val-loss": "5.335", "run.other": "5.335"}, {"run.val-loss": "4.100", "run.other": "5.335"}
    assert report.restate([page, other], old, new) == [page]
    assert page.read_text() == "fell to 4.100<!--run.val-loss-->, not 5.335, in 5.335<!--run.other-->"


def test_a_long_log_is_thinned_but_keeps_its_measurements():
    lines = [json.dumps({"step": i} | ({"val_loss": 1.0} if i % 1000 == 7 else {})) for i in range(10_000)]
    n, kept = report.thinned(lines)
    steps = [json.loads(line)["step"] for line in kept]
    assert n == 10_000
    assert len(steps) < 1600
    assert {*range(7, 10_000, 1000), 0, 9999} <= set(steps)
    assert steps == sorted(steps)
    assert report.thinned(lines[:30]) == (30, lines[:30])


def test_without_latexmk_the_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        AymenError, match="latexmk is missing.*apt-get install --no-install-recommends latexmk texlive"
    ):
        report.compile_paper(tmp_path)


needs_latex = pytest.mark.skipif(not shutil.which("latexmk"), reason="latexmk is not installed")


@needs_latex
@pytest.mark.slow
def test_the_paper_of_a_run_compiles_cleanly(run, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "aymen_gpt.commands.report", str(run), "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "out/research-report.log").read_text(errors="replace")
    assert not re.findall(r"LaTeX Warning: (?:Reference|Citation|There were undefined)", log)
    wide = [float(points) for points in re.findall(r"Overfull \\hbox \(([\d.]+)pt", log)]
    assert max(wide, default=0) < 20
    assert (tmp_path / "out/research-report.pdf").stat().st_size > 50_000
