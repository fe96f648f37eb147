"""The CUDA path on a pretended GPU (tools/rehearse.py): what it finds, and that it finds what is planted."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="the rehearsal needs a C++ compiler (g++)")


def rehearse(*words, planted=""):
    """Run tools.rehearse as a process; ``planted`` is code that runs first, with the modules imported."""
    code = f"""
import sys
from tools import pretend_cuda, rehearse
pretend_cuda.preload()
{planted}
sys.argv = ["rehearse", *{[str(w) for w in words]!r}]
raise SystemExit(rehearse.main())
"""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.slow
def test_a_whole_run_stays_on_the_device_and_within_its_budget_of_waits(tmp_path):
    done = rehearse("--parts", "run", "traces", "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["dtype"] for row in found["run"]][:: len(found["run"]) // 3] == ["bfloat16", "float16", "float32"]
    steps = [row["waits"] for row in found["run"] if row["what"].startswith("a step")]
    assert steps == [1] * 6  # three precisions, two steps each
    assert sum(row["programs"] for row in found["traces"]) <= 5
    assert [row["programs"] for row in found["traces"] if row["what"] in ("another", "a third step")] == [0, 0]
    assert "| dtype | what | waits |" in done.stdout


PLANTED = {
    "a tensor of the CPU in the step": (
        "from aymen_gpt.model import loss\n"
        "real = loss.cross_entropy\n"
        "def cross_entropy(logits, targets, *rest):\n"
        "    return real(logits, targets + torch.arange(3)[:1].unsqueeze(1), *rest)\n"
        "loss.cross_entropy = cross_entropy\n",
        "run",
        "device",
    ),
    "a wait in the loop over micro-batches": (
        "from aymen_gpt.training.trainer import Trainer\n"
        "real = Trainer.batch_loss\n"
        "def batch_loss(self, tokens):\n"
        "    loss = real(self, tokens)\n"
        "    loss.item()\n"
        "    return loss\n"
        "Trainer.batch_loss = batch_loss\n",
        "run",
        "waits 4 times, 1 at most",
    ),
    "a graph break": (
        "from aymen_gpt.model.gpt import Block\n"
        "real = Block.forward\n"
        "def forward(self, *rest):\n"
        "    torch._dynamo.graph_break()\n"
        "    return real(self, *rest)\n"
        "Block.forward = forward\n",
        "traces",
        "graph_break",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault):
    code, part, sign = PLANTED[fault]
    done = rehearse("--parts", part, planted="import torch\n" + code)
    assert done.returncode == 1
    assert sign in done.stderr


def test_without_a_compiler_one_line_names_it(tmp_path):
    code = "from tools import pretend_cuda as p; p.ROOT = p.Path(sys.argv[1]); p.preload()"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}", tmp_path],
        env=os.environ | {"PATH": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "the rehearsal needs a C++ compiler, g++: install it (Debian: apt install g++)"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_generated_code_is_within_its_budgets_and_compiles_for_two_architectures(tmp_path):
    pytest.importorskip("triton", reason="make rehearse installs triton")
    done = rehearse("--parts", "code", "kernels", "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    facts = {row["what"]: row["value"] for row in found["code"]}
    assert facts["products, TFLOP"] == pytest.approx(6 * 124e6 * 65536 / 1e12, rel=0.02)  # 6 N a token, less wpe
    assert facts["atomic additions with --deterministic"] == 0
    assert 1.5 < facts["of forward, the loss: GB a chunk of 8,192 tokens"] < 1.7
    assert [row["architecture"] for row in found["kernels"]] == ["sm_80", "sm_90"]
    assert all(row["programs"] >= row["kernels"] > 30 for row in found["kernels"])
