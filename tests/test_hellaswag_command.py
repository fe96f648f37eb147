"""hellaswag.py as people run it: what it prints, writes and refuses, on a few examples of their own."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from conftest import ROOT, make_shards
from questions import EXAMPLES, write_model
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow

N = len(EXAMPLES)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(asdict(example)) + "\n" for example in EXAMPLES))
    return path


@pytest.fixture
def score(call):
    """Score in this process: what it printed, and {protocol: its line} of the table."""

    def run(*words):
        done = call("hellaswag.py", *words)
        assert done.returncode == 0, done.stderr
        lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
        return done, {protocol: lines[protocol] for protocol in ("completion", "harness") if protocol in lines}

    return run


def test_both_protocols_are_printed_and_every_answer_is_written(score, model, data, tmp_path):
    done, lines = score("-m", model, "-d", "cpu", "--data", data, "--json", "new/s.json")
    found = json.loads((tmp_path / "new/s.json").read_text())
    assert (found["model"], found["checkpoint"], found["step"]) == (str(model), str(model), None)
    assert re.fullmatch("[0-9a-f]{64}", found["weights_sha256"])
    assert [row["ind"] for row in found["examples"]] == [example.ind for example in EXAMPLES]
    assert lines.keys() == {"completion", "harness"}
    for protocol, line in lines.items():
        s = found[protocol]
        assert f"{100 * s['acc']:.2f} % ± {100 * s['acc_stderr']:.2f}" in line
        assert f"{100 * s['acc_norm']:.2f} % ± {100 * s['acc_norm_stderr']:.2f}" in line
        right = [row[protocol]["choice_norm"] == row["label"] for row in found["examples"]]
        assert s["acc_norm"] == sum(right) / N
    assert f"all {N} examples of {data}" in done.stdout
    assert re.search(r"^chance +25\.00 % +25\.00 %$", done.stdout, re.MULTILINE)
    assert "published" not in done.stdout  # own data compares with nothing
    assert f"{N} of {N} scored" in done.stderr
    assert "scored" not in done.stdout


def test_the_score_of_a_run_stands_in_its_page_and_in_its_card(call, score, tmp_path):
    """What training measured after it saved the checkpoint, and then the larger score."""
    make_shards(tmp_path / "data")
    every = "--steps 4 --checkpoint-every 2 --hellaswag-every 2 --hellaswag-limit 4 --dtype float32"
    done = call("pretrain.py", *f"--preset tiny --data data --run-dir run {every}".split())
    assert done.returncode == 0, done.stderr
    card, page = tmp_path / "run/checkpoints/step-000000004/README.md", tmp_path / "run/report.html"
    assert re.search(r"^\| completion \| 4 \| [\d.]+ %", card.read_text(), re.MULTILINE)
    assert "4 examples, step 4" in page.read_text()
    score("-m", "run", "--limit", 8, "--json", "run/hellaswag.json")
    found = json.loads((tmp_path / "run/hellaswag.json").read_text())
    assert (found["model"], found["checkpoint"]) == ("run", "run/checkpoints/step-000000004")
    assert found["step"] == 4
    assert re.findall(r"^\| (\w+) \| 8 \| [\d.]+ %", card.read_text(), re.MULTILINE) == ["completion", "harness"]
    assert "8 examples, step 4" in page.read_text()
    assert "| completion | 4 |" in (tmp_path / "run/checkpoints/step-000000002/README.md").read_text()


def test_one_protocol_and_a_subset_say_so(score, model, data):
    words = ["-m", model, "--protocol", "harness", "--data", data, "--limit"]
    done, lines = score(*words, 2)
    assert lines.keys() == {"harness"}
    assert f"a subset: 2 of {N} examples" in done.stdout
    for whole in ("0", "all"):
        assert f"all {N} examples of {data}" in score(*words, whole)[0].stdout


def test_the_real_set_stands_beside_anchors_of_its_own_protocol(score, model):
    done, _ = score("-m", model, "--protocol", "completion", "--limit", 6, "--dtype", "float32")
    assert "a subset: 6 of 10,042 validation examples" in done.stdout
    published = done.stdout.partition("published")[2]
    assert "29.55 %" in published  # GPT-2 124M by completion
    assert "31.14 %" not in published  # the same by harness


MISTAKES = [
    (2, "--limit -1: expected a whole number from 1", "--limit -1"),
    (2, "--batch-tokens -4: expected a whole number from 1", "--batch-tokens -4"),
    (2, "--protocol mean: expected completion, harness, both", "--protocol mean"),
    (2, "there is no option --modle; did you mean --model?", "--modle x"),
    (2, "--model '': expected a name", "-m ''"),
    (2, "--json '': expected a name", "--json="),
    (2, "--data '': expected a name", "--data="),
    (2, "--compare '': expected a name", "--compare a.json ''"),
    (2, "--device tpu: expected auto, cpu, mps, cuda", "--device tpu"),
    (2, "--dtype int8: expected auto, float32, bfloat16, float16", "--dtype int8"),
    (2, "--json .: this is a folder", "--json ."),
    (2, "--compare reads what --json wrote", "--compare a.json b.json --json c.json"),
    (65, "a.json: no such file", "--compare a.json b.json"),
    (65, "nowhere.jsonl: No such file", "--data nowhere.jsonl"),
    (65, "no model at runs/none", "-m runs/none --data own.jsonl"),
    (65, f"own.jsonl: row {N + 1} lacks activity_label", "--data own.jsonl"),
    (73, "x: File name too long; choose another path", f"--json {'x' * 300}"),
    (73, "cannot write own.jsonl/a: a file stands where", "-m runs/none --json own.jsonl/a"),
]


@pytest.mark.parametrize(("code", "message", "words"), MISTAKES)
def test_mistakes_are_one_line_and_an_exit_code(refused, data, code, message, words):
    if "lacks" in message:
        data.write_text(data.read_text() + '{"label": 1}\n')
    refused(code, message, "hellaswag.py", *shlex.split(words))


def test_a_model_that_cannot_be_fetched_is_exit_69(door, data, tmp_path):
    done = door("hellaswag.py", "-m", "gpt2", "--data", data, HF_HOME=str(tmp_path / "hub"))
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr.startswith("error: cannot get config.json of openai-community/gpt2")


def answers(path):
    """What two scorings must have in common, near ties apart: everything but the last bits of the likelihoods."""
    found = json.loads(path.read_text())
    likely = [row[p].pop("log_likelihoods") for row in found["examples"] for p in ("completion", "harness")]
    return found, np.array(likely)


def test_any_number_of_processes_gives_the_same_score(door, score, model, data, tmp_path):
    alone, _ = score("-m", model, "--data", data, "--json", tmp_path / "1.json")
    words = ["-m", model, "--data", data, "--json", tmp_path / "2.json"]
    together = door("hellaswag.py", *words, processes=3)
    assert together.returncode == 0, together.stderr
    assert together.stdout.replace("2.json", "1.json") == alone.stdout  # once, and the same
    (a, likely_a), (b, likely_b) = answers(tmp_path / "1.json"), answers(tmp_path / "2.json")
    assert a == b
    np.testing.assert_allclose(likely_a, likely_b, atol=1e-4)
    assert "on 3 x " in together.stderr


def test_two_scorings_are_compared(call, score, model, data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    state = load_file(other / "model.safetensors")
    save_file({name: t * (-1 if "wte" in name else 1) for name, t in state.items()}, other / "model.safetensors")
    for name, path in (("a.json", model), ("b.json", other)):
        score("-m", path, "--data", data, "--json", name)
    done = call("hellaswag.py", "--compare", "a.json", "b.json")
    assert done.returncode == 0, done.stderr
    assert f"the same {N} examples" in done.stdout
    row = r"^(completion|harness) +(acc\w*) +([\d.]+) % +([\d.]+) % +([-+][\d.]+) "
    lines = re.findall(row, done.stdout, re.M)
    assert len(lines) == 4
    assert f"A  {model}\nB  {other}\n" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("By harness, ")
    for protocol, measure, *values in lines:
        a, b = (100 * json.loads((tmp_path / f).read_text())[protocol][measure] for f in ("a.json", "b.json"))
        assert [float(value) for value in values] == pytest.approx([a, b, b - a], abs=0.006)


def test_comparing_needs_no_torch():
    code = """
import sys
from dataclasses import asdict
from aymen_gpt.__main__ import command
try: command("hellaswag", ["--compare", "a.json", "b.json"])
except ValueError: pass
print("torch" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
