"""make report: any run's files become numbers, figures and, where LaTeX is installed, a PDF that is true of it."""

import json
import re
import shutil

import pytest
from claims import chosen
from conftest import ROOT
from run_folders import write_run

from aymen_gpt.errors import AymenError
from aymen_gpt.reporting.run_folder import read_run
from paper import build
from paper.facts import all_facts, known, run_facts

HOSTILE = r"\input{/etc/passwd} 50% #1 $x_1$ & ~^ {}"
TEX = (ROOT / "research-report.tex").read_text()
SCORE = {"acc": 0.26, "acc_stderr": 0.0139, "acc_norm": 0.338, "acc_norm_stderr": 0.01}


@pytest.fixture
def run(tmp_path):
    """A finished run on own text, not scored: 40 steps of 100 tokens, with numbers to compute by hand."""
    options = json.loads((ROOT / "docs/results/demo/config.json").read_text())["run"]
    config = {
        "run": options | {"run": "runs/small_1", "steps": 40, "tokens_per_step": 100},
        "command": ["python", "pretrain.py", "--run-dir", HOSTILE],
        "n_params": 1_234_567,
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64},
        "data": {"folder": HOSTILE, "train_tokens": 8000, "val_tokens": 700, "manifest_sha256": "a" * 64}
        | {"source": {"repo": None, "files": [{"name": "my_notes.txt"}]}},
        "host": {"cores": 2},
        "device": {"name": "CPU"},
        "flops_per_token": 12,
        "world_size": 1,
        "versions": {"torch": "2.13.0"},
        "started": "2026-11-22T15:00:00+00:00",
        "git_commit": "0123456789abcdef",
        "history": [{"step": 0}],
    }
    each = {"loss": 8.0, "lr": 1e-3, "step_seconds": 3.0, "grad_norm": 1.0}
    rows = [{"step": s, "tokens": 100 * s, "tokens_per_second": 1000.0 + s} | each for s in range(1, 41)]
    rows[-1]["val_loss"] = 5.0
    status = {"state": "done", "step": 40, "steps": 40}
    samples = [{"step": 40, "prompt": HOSTILE, "text": f"{HOSTILE} und schön ש"}]
    rows = [{"step": 0, "tokens": 0, "val_loss": 10.0}, *rows]
    return write_run(tmp_path / "runs" / "small_1", rows, config=config, status=status, samples=samples)


def change(folder, **parts):
    config = json.loads((folder / "config.json").read_text())
    for key, value in parts.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))


def shown(run):
    return {fact.name: fact.shown for fact in run_facts(read_run(run))}


def words(run):
    """What the paper says of a run, each \\R replaced by its value, on one line."""
    values = known(all_facts(read_run(run), ROOT))
    text = chosen(TEX, values)
    return " ".join(re.sub(r"\\R\{([^}]*)\}", lambda m: values.get(m[1], f"[{m[1]}?]"), text).split())


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
        "training-time": "2 min 00 s",
        "speed": "1,020",
        "continued-at": None,
        "commit": "0123456789ab",
        "data-files": "my_notes.txt",
        "completion-acc-norm": None,
        "state": "done",
    }
    assert {name: found[f"run.{name}"] for name in expected} == expected


def test_what_is_not_there_is_not_known(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:5] + lines[6:]) + "\n")
    assert shown(run)["run.training-time"] is None  # a step is missing
    (run / "metrics.jsonl").unlink()
    found = shown(run)
    assert {found[f"run.{name}"] for name in ("val-loss", "steps", "speed", "skipped", "training-time")} == {None}


OWN = "It was not scored on HellaSwag"
SCORED = r"accuracy by the completion protocol is 33.8 % $\pm$ 1.0"


@pytest.mark.parametrize(
    ("config", "training", "file", "said"),
    [
        (
            {},
            None,
            None,
            [
                OWN,
                "own: \\code{my_notes.txt}",
                "It ran in one piece.",
                "HellaSwag was not scored.",
                "half a cosine",
            ],
        ),
        (
            {"run": {"optimizer": "muon", "matrix_rate": 0.02, "schedule": "linear"}},
            None,
            None,
            [
                r"Muon \cite{muon} for the matrices of the blocks, at a peak",
                "then stays, before it falls in a straight",
            ],
        ),
        ({}, {"n": 250, "completion": SCORE}, None, [SCORED, "on 250 of 10,042", "completion & 40 & 250 &"]),
        ({}, None, {"n": 9, "step": 20, "harness": SCORE}, ["by the harness protocol is", "harness & 20 & 9 &"]),
        (
            {},
            None,
            {"n": 9, "completion": SCORE},
            [SCORED, "lies 8.8 standard errors above chance", "completion & 40 & 9 &"],
        ),
        ({"data": {"source": {"repo": "a/b"}}}, None, None, ["Its text is \\code{a/b}."]),
        ({"data": {"source": {"files": [{"name": "builtin-1.parquet"}]}}}, None, None, ["It is the English"]),
        ({"history": [{"step": 0}, {"step": 7}]}, None, None, ["stopped and continued after step 7."]),
        ({"run": {"init_from": "gpt2"}}, None, None, ["but with those of \\code{gpt2}"]),
    ],
)
def test_the_paper_is_true_of_any_run(run, config, training, file, said):
    change(run, **config)
    if training:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        lines[-1] = json.dumps(json.loads(lines[-1]) | {"hellaswag": training})
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if file:
        (run / "hellaswag.json").write_text(json.dumps({"model": "runs/small_1"} | file))
    text = words(run)
    for sentence in ["fell from 10.00 to 5.000", "We have not repeated that run", *said]:
        assert sentence in text, sentence
    assert not re.findall(r"demonstration|SIGTERM|\[[\w.-]*\?\]", text)
    if training or file:
        assert OWN not in text


def test_the_run_that_was_claimed_is_said_to_be_repeated(run):
    change(run, n_params=124_439_808)
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"step": 41, "tokens": 39998980096, "loss": 3.0}\n')
    assert "have not repeated" not in words(run)
    assert "has the same size and as many tokens" in words(run)


def test_nothing_from_a_file_reaches_latex_unescaped():
    text = build.escape(HOSTILE)
    assert text.startswith(r"\textbackslash{}input\{/etc/passwd\} 50\% \#1 \$x\_1\$ \& ")
    left = re.sub(r"\\text\w+\{\}|\\[%#$_&{}]", "", text)
    assert not set(left) & set("\\%#$&~^_")
    assert build.escape("schön\nש") == "schon [U+05E9]"


def test_the_parts_of_the_paper(run):
    read = read_run(run)
    parts = build.parts(read, all_facts(read, ROOT))
    assert r"\result{run.val-loss}{5.000}" in parts["results.tex"]
    assert "run.completion-acc" not in parts["results.tex"] + parts["facts.tex"]
    assert r"\result{run.data}{\textbackslash{}input" in parts["results.tex"]
    assert r"config.\allowbreak{}json" in parts["artefacts.tex"]
    assert set(re.findall(r"\\input\{([^}]*)\}", TEX)) == parts.keys()


def test_a_figure_of_another_run_is_not_left_for_this_one(run, tmp_path, monkeypatch):
    """Figures are drawn from whatever file is there. Without LaTeX the error names what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    (run / "hellaswag.json").write_text(json.dumps({"n": 9, "completion": SCORE}))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.tex").write_text("kept")
    pictures = {"recipe.pdf", "loss.pdf", "lr.pdf", "grad_norm.pdf", "tokens_per_second.pdf"}
    for found in (pictures | {"scores.pdf"}, pictures):
        with pytest.raises(AymenError, match="latexmk is missing.*apt-get install .*latexmk texl"):
            build.main([str(run), "--out", str(tmp_path / "out")])
        assert {path.name for path in (tmp_path / "out").glob("*.pdf")} == found
        (run / "hellaswag.json").unlink(missing_ok=True)
    assert (tmp_path / "out/mine.tex").exists()
    assert (tmp_path / "out/loss.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.skipif(not shutil.which("latexmk"), reason="latexmk is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("score", [{}, {"n": 1000, "step": 40, "completion": SCORE}])
def test_the_paper_of_a_run_compiles_cleanly(run, tmp_path, score):
    (run / "hellaswag.json").write_text(json.dumps(score))
    assert build.main([str(run), "--out", str(tmp_path / "out")]) == 0
    log = (tmp_path / "out/research-report.log").read_text(errors="replace")
    assert not re.findall(r"LaTeX Warning: (?:Citation|Reference|There were undefined)", log)
    wide = [float(points) for points in re.findall(r"Overfull \\hbox \(([\d.]+)pt", log)]
    assert max(wide, default=0) < 20
    assert (tmp_path / "out/research-report.pdf").stat().st_size > 50_000
