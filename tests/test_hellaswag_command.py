"""hellaswag.py as people run it: what it prints, writes and refuses, on a few examples of their own."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, make_shards
from safetensors.torch import load_file, save_file

from aymen_gpt import files
from aymen_gpt.model.gpt import GPT, GPTConfig
from aymen_gpt.model.huggingface import config_to_huggingface, to_huggingface

pytestmark = pytest.mark.slow

CONFIG = GPTConfig(block_size=32, n_layer=1, n_head=1, n_embd=16)
N = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    weights = GPT(CONFIG, torch.Generator().manual_seed(0)).state_dict()
    (folder / "config.json").write_text(json.dumps(config_to_huggingface(CONFIG)))
    save_file(to_huggingface(weights, CONFIG.vocab_size), folder / "model.safetensors")
    return folder


@pytest.fixture
def data(tmp_path):
    rows = [
        {
            "ind": 100 + i,
            "activity_label": "Counting",
            "ctx_a": f"She counts to {i}.",
            "ctx_b": "then she",
            "ctx": f"She counts to {i}. then she",
            "endings": ["stops.", "goes on and on and on.", "laughs.", "starts again."],
            "label": i % 4,
        }
        for i in range(N)
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scores(done):
    """{protocol: its line} of the table."""
    lines = done.stdout.splitlines()
    return {words[0]: line for line in lines if (words := line.split()) and words[0] in ("completion", "harness")}


def test_both_protocols_are_printed_and_every_answer_is_written(door, model, data, tmp_path):
    done = door("hellaswag.py", "-m", model, "-d", "cpu", "--data", data, "--json", tmp_path / "new" / "s.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "new" / "s.json").read_text())
    assert (found["model"], found["checkpoint"], found["step"]) == (str(model), str(model), None)
    assert re.fullmatch("[0-9a-f]{64}", found["weights_sha256"])
    assert [row["ind"] for row in found["examples"]] == list(range(100, 100 + N))
    for protocol, line in scores(done).items():
        s = found[protocol]
        assert f"{100 * s['acc']:.2f} % ± {100 * s['acc_stderr']:.2f}" in line
        assert f"{100 * s['acc_norm']:.2f} % ± {100 * s['acc_norm_stderr']:.2f}" in line
        right = [row[protocol]["choice_norm"] == row["label"] for row in found["examples"]]
        assert s["acc_norm"] == sum(right) / N
    assert scores(done).keys() == {"completion", "harness"}
    assert f"all {N} examples of {data}" in done.stdout
    assert re.search(r"^chance +25\.00 % +25\.00 %$", done.stdout, re.MULTILINE)
    assert "published" not in done.stdout  # own data compares with nothing
    assert f"{N} of {N} scored" in done.stderr
    assert "scored" not in done.stdout


def test_the_json_of_a_run_names_the_checkpoint_and_its_step(door, model, data, tmp_path):
    shutil.copytree(model, tmp_path / "run/checkpoints/step-000000012")
    save_manifest(tmp_path / "run/checkpoints/step-000000012", 12)
    done = door("hellaswag.py", "-m", "run", "--data", data, "--protocol", "harness", "--json", "s.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "s.json").read_text())
    assert (found["model"], found["checkpoint"]) == ("run", "run/checkpoints/step-000000012")
    assert found["step"] == 12


def save_manifest(folder, step):
    found = {p.name: {"bytes": p.stat().st_size, "sha256": files.sha256(p)} for p in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"step": step, "files": found}))


def test_the_score_of_a_run_stands_in_its_page_and_in_its_card(door, tmp_path):
    """What training measured after it saved the checkpoint, and then the larger score."""
    make_shards(tmp_path / "data")
    every = ["--checkpoint-every", 2, "--hellaswag-every", 2, "--hellaswag-limit", 4, "--dtype", "float32"]
    done = door("pretrain.py", "--preset", "tiny", "--data", "data", "--steps", 4, "--run-dir", "run", *every)
    assert done.returncode == 0, done.stderr
    card, page = tmp_path / "run/checkpoints/step-000000004/README.md", tmp_path / "run/report.html"
    assert re.search(r"^\| completion \| 4 \| [\d.]+ %", card.read_text(), re.MULTILINE)
    assert "4 examples, step 4" in page.read_text()
    done = door("hellaswag.py", "-m", "run", "--limit", 8, "--json", "run/hellaswag.json")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^\| (\w+) \| 8 \| [\d.]+ %", card.read_text(), re.MULTILINE) == ["completion", "harness"]
    assert "8 examples, step 4" in page.read_text()
    assert "| completion | 4 |" in (tmp_path / "run/checkpoints/step-000000002/README.md").read_text()


def test_one_protocol_and_a_subset_say_so(door, model, data):
    done = door("hellaswag.py", "-m", model, "--protocol", "harness", "--limit", 5, "--data", data)
    assert done.returncode == 0, done.stderr
    assert scores(done).keys() == {"harness"}
    assert f"a subset: 5 of {N} examples" in done.stdout
    for whole in ("0", "all"):
        done = door("hellaswag.py", "-m", model, "--protocol", "harness", "--limit", whole, "--data", data)
        assert f"all {N} examples of {data}" in done.stdout


def test_the_real_set_stands_beside_anchors_of_its_own_protocol(door, model):
    done = door("hellaswag.py", "-m", model, "--protocol", "completion", "--limit", 6, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert "a subset: 6 of 10,042 validation examples" in done.stdout
    published = done.stdout.partition("published")[2]
    assert "29.55 %" in published  # GPT-2 124M by completion
    assert "31.14 %" not in published  # the same by harness


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--limit", "-1"], 2, "error: --limit -1: expected a whole number from 1"),
        (["--batch-tokens", "-4"], 2, "error: --batch-tokens -4: expected a whole number from 1"),
        (["--protocol", "mean"], 2, "error: --protocol mean: expected completion, harness, both\n"),
        (
            ["--modle", "x"],
            2,
            "error: there is no option --modle; did you mean --model?\nusage: python hellaswag.py",
        ),
        (["-m", ""], 2, "error: --model '': expected a name"),
        (["--json", ""], 2, "error: --json '': expected a name"),
        (["--data", ""], 2, "error: --data '': expected a name"),
        (["--compare", "a.json", ""], 2, "error: --compare '': expected a name"),
        (["--json", "x" * 300], 73, "x: File name too long; choose another path"),
        (["--device", "tpu"], 2, "error: --device tpu: expected auto, cpu, mps, cuda"),
        (["--dtype", "int8"], 2, "error: --dtype int8: expected auto, float32, bfloat16, float16"),
        (["--json", "."], 2, "error: --json .: this is a folder"),
        (["-m", "runs/none", "--json", "own.jsonl/a"], 73, "error: cannot write own.jsonl/a: a file stands where"),
        (["--compare", "a.json", "b.json", "--json", "c.json"], 2, "error: --compare reads what --json wrote"),
        (["--compare", "a.json", "b.json"], 65, "error: a.json: no such file"),
        (["--data", "nowhere.jsonl"], 65, "error: nowhere.jsonl: No such file"),
        (["-m", "runs/none", "--data", "own.jsonl"], 65, "error: no model at runs/none"),
        (["-m", "gpt2", "--data", "own.jsonl"], 69, "error: cannot get config.json of openai-community/gpt2"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(door, data, tmp_path, words, code, message):
    done = door("hellaswag.py", *words, HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_bad_row_is_named(door, model, data):
    data.write_text(data.read_text() + '{"label": 1}\n')
    done = door("hellaswag.py", "-m", model, "--data", data)
    assert done.returncode == 65
    assert done.stderr.startswith(f"error: {data}: row {N + 1} lacks activity_label")
    assert done.stderr.count("\n") == 1


def answers(path):
    """What two scorings must have in common, near ties apart: everything but the last bits of the likelihoods."""
    found = json.loads(path.read_text())
    likely = [row[p].pop("log_likelihoods") for row in found["examples"] for p in ("completion", "harness")]
    return found, np.array(likely)


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_gives_the_same_score(door, model, data, tmp_path, processes):
    alone = door("hellaswag.py", "-m", model, "--data", data, "--json", tmp_path / "1.json")
    together = door(
        "hellaswag.py", "-m", model, "--data", data, "--json", tmp_path / "2.json", processes=processes
    )
    assert together.returncode == 0, together.stderr
    assert together.stdout.replace("2.json", "1.json") == alone.stdout  # once, and the same
    (a, likely_a), (b, likely_b) = answers(tmp_path / "1.json"), answers(tmp_path / "2.json")
    assert a == b
    np.testing.assert_allclose(likely_a, likely_b, atol=1e-4)
    assert f"on {processes} x " in together.stderr


def test_two_scorings_are_compared(door, model, data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    state = load_file(other / "model.safetensors")
    save_file({name: t * (-1 if "wte" in name else 1) for name, t in state.items()}, other / "model.safetensors")
    for name, path in (("a.json", model), ("b.json", other)):
        assert door("hellaswag.py", "-m", path, "--data", data, "--json", tmp_path / name).returncode == 0
    done = door("hellaswag.py", "--compare", tmp_path / "a.json", tmp_path / "b.json")
    assert done.returncode == 0, done.stderr
    assert f"the same {N} examples" in done.stdout
    lines = re.findall(
        r"^(completion|harness) +(acc\w*) +([\d.]+) % +([\d.]+) % +([-+][\d.]+) ", done.stdout, re.M
    )
    assert len(lines) == 4
    assert f"A  {model}\nB  {other}\n" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("By harness, ")
    for protocol, measure, *values in lines:
        a, b = (100 * json.loads((tmp_path / f).read_text())[protocol][measure] for f in ("a.json", "b.json"))
        assert [float(value) for value in values] == pytest.approx([a, b, b - a], abs=0.006)


def test_comparing_needs_no_torch(tmp_path):
    code = """
import sys
from aymen_gpt.commands import hellaswag
try: hellaswag.main(["--compare", "a.json", "b.json"])
except ValueError: pass
print("torch" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
