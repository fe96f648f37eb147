"""cluster.py: datatrove's tasks prepare the parts, and merged they are the single run."""

import subprocess
import sys

import pytest
from conftest import ROOT
from test_prepare import digest, make_texts, prepared, quiet, write_parquet

from aymen_gpt.data import cluster, shares
from aymen_gpt.data.prepare import PrepareOptions
from aymen_gpt.errors import UsageError


def test_two_tasks_of_datatrove_merged_are_the_single_run(tmp_path, monkeypatch):
    executor = pytest.importorskip("datatrove.executor", reason="datatrove is an extra: pip install datatrove")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    source = (str(write_parquet(tmp_path / "a.parquet", make_texts(300), rows=20)),)
    options = PrepareOptions(source, tmp_path / "out", shard_tokens=2000, workers=0)
    step = cluster.PreparePart(options)
    executor.LocalPipelineExecutor([step], tasks=2, workers=2, logging_dir=str(tmp_path / "logs")).run()
    shares.Merge(options, quiet).run()
    single = PrepareOptions(source, tmp_path / "single", shard_tokens=2000, workers=0)
    prepared(single)
    assert digest(options.out) == digest(single.out)
    assert (tmp_path / "logs/completions/00001").exists()
    assert '"tokens"' in (tmp_path / "logs/stats.json").read_text()


def test_without_datatrove_the_step_says_what_to_install():
    code = (
        "import sys; sys.modules['datatrove'] = None\n"
        "from aymen_gpt.data import cluster, prepare\n"
        "try: cluster.PreparePart(prepare.PrepareOptions())\n"
        "except cluster.UsageError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "datatrove is not installed: pip install 'aymen-gpt[datatrove]'\n", done.stderr
    assert issubclass(UsageError, ValueError)
