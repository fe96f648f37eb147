"""GPT-nb.ipynb runs from top to bottom on a fresh run, and is committed as a real run left it."""

import json

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

NOTEBOOK = ROOT / "GPT-nb.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def pictures(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def text_of(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    return "".join("".join(output.get("text", "")) for output in outputs)


def test_it_runs_on_a_fresh_run(door, shards, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("matplotlib")
    done = door(
        "pretrain.py", "--preset", "tiny", "--data", shards, "--run-dir", tmp_path / "run", "--dtype", "float32"
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("AYMEN_GPT_RUN", str(tmp_path / "run"))
    notebook = nbformat.read(NOTEBOOK, 4)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(ROOT))
    assert pictures(notebook) == 5  # not scored
    assert "10,240 of 10,240 tokens, state: done" in text_of(notebook)


def test_it_is_committed_with_the_outputs_of_the_demo():
    notebook = json.loads(NOTEBOOK.read_text())
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell["outputs"] if o["output_type"] == "error"]
    assert pictures(notebook) == 6
    config = json.loads((ROOT / "docs/results/demo/config.json").read_text())
    assert f"commit {config['git_commit']}" in text_of(notebook)
