"""README says only what works: every command in it is run here, in its order, at a small scale.

``make demo``, ``make test`` and ``make report`` are run by people and CI; all else stands in SMALL with what makes
it small.
"""

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from fake_hub import FakeHub
from test_prepare import make_texts, write_parquet
from test_shards import llmc_bytes

from aymen_gpt.reporting.published_scores import ANCHORS

pytestmark = pytest.mark.slow

EDU = "--data edu_fineweb10B"
TINY = "--preset tiny --steps 4 --val-every 2 --checkpoint-every 2 --val-tokens 256 --hellaswag-every 0"
SMALL = {  # a command of README -> what is added to it here
    "python fineweb.py": "--shard-tokens 20000 --workers 1",
    "python pretrain.py": f"{TINY} {EDU} --run-dir runs/gpt2",
    "torchrun --standalone --nproc_per_node=8 pretrain.py": f"{TINY} {EDU} --run-dir runs/gpt2 --steps 6",
    "python hellaswag.py -m runs/gpt2": "--limit 4",
    'python generate.py -m runs/gpt2 "The mitochondria is"': "--max-tokens 3",
    "python pretrain.py --preset demo --resume must": f"{TINY} {EDU} --run-dir runs/gpt2",
    "python pretrain.py --preset demo --resume none": f"{TINY} {EDU} --run-dir runs/gpt2 --steps 6",
    "python pretrain.py --preset demo --init-from runs/demo --run-dir runs/tuned --learning-rate 3e-4": (
        f"{TINY} {EDU} --init-from runs/gpt2"
    ),
    "python pretrain.py --preset demo --optimizer muon --run-dir runs/muon": f"{TINY} {EDU}",
    "python benchmarks/recipe.py --tokens 1e6 --preset demo --data data/edu10B": (
        "--tokens 2e3 --preset tiny --arms muon --trials 1 --seeds 1 --shares --out recipe --work recipe/work"
    ),
    "python pretrain.py --plan --gpus 8": "",
    "python pretrain.py --preset demo --plan --probe": "--preset tiny",
    "python pretrain.py --plan --on h100 --gpus 8 --mfu 0.4 --dollars-per-gpu-hour 2.5": "",
    "python fineweb.py --source my/texts notes.jsonl.gz --out data/mine": "--workers 1",
    "hf download kjj0/finewebedu10B-gpt2 --repo-type dataset --local-dir data/edu10B": "",
    "python pretrain.py --data data/edu10B": f"{TINY} --run-dir runs/edu10B",
    "python pretrain.py --preset demo --data data/mine --run-dir runs/mine": TINY,
    "python hellaswag.py -m runs/gpt2 --json a.json": "--limit 4",
    "python hellaswag.py -m runs/mine --json b.json": "--limit 4",
    "python hellaswag.py --compare a.json b.json": "",
    "aymen-gpt report runs/mine": "",
    "aymen-gpt report runs/mine runs/tuned": "",
}
ELSEWHERE = {"make demo", "make test"}


def commands():
    """The lines of the bash blocks of README and docs/options.md, without their comments."""
    pages = (ROOT / "README.md").read_text() + (ROOT / "docs/options.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", pages, re.S)
    lines = [re.sub(r"\s+#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


def test_every_command_of_readme_is_known_here():
    assert set(commands()) == SMALL.keys() | ELSEWHERE


def test_the_journey_of_readme_works_as_written(door, call, tmp_path):
    """The first command of each program is a process of its own, the others run here and save its start."""
    texts = make_texts(300)
    (tmp_path / "my/texts").mkdir(parents=True)
    (tmp_path / "my/texts/a.txt").write_text("\n".join(texts))
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "notes.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    contents = {"sample/10BT/000_00000.parquet": write_parquet(tmp_path / "hub.parquet", texts * 10).read_bytes()}
    for name in ("val_000000", "train_000001"):
        contents[f"finewebedu_{name}.bin"] = llmc_bytes([50256, *range(500)])
    started = set()
    with FakeHub(contents) as hub:
        online = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
        for command in (command for command in commands() if command not in ELSEWHERE):
            program, *words = shlex.split(f"{command} {SMALL[command]}")
            if program == "hf":
                hf = Path(sys.executable).with_name("hf")
                subprocess.run([hf, *words], cwd=tmp_path, env=os.environ | online, check=True)
                continue
            if program == "torchrun":
                done = door(*words[2:], processes=2)
            elif (name := words[0]) not in started:
                done = door(*(["-m", "aymen_gpt"] if program == "aymen-gpt" else []), *words, **online)
                started.add(name)
            else:
                done = call(name if name.endswith(".py") else f"{name}.py", *words[1:])
            assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (tmp_path / "runs/gpt2/checkpoints/step-000000006/model.safetensors").exists()  # 8 GPUs went on
    assert (tmp_path / "runs/gpt2/earlier-1/metrics.jsonl").exists()
    assert json.loads((tmp_path / "a.json").read_text())["step"] == 6  # of runs/gpt2
    assert (tmp_path / "compare.html").exists()
    for name in ("tuned", "mine", "edu10B"):
        assert (tmp_path / f"runs/{name}/report.html").exists()


def test_the_published_scores_are_those_of_the_code():
    known = {(a.model, a.protocol, round(100 * a.value, 2)) for a in ANCHORS if a.metric == "acc_norm"}
    protocols = {"completion": "completion", "harness": "harness", "the paper's own": "gpt3-paper"}
    rows = re.findall(
        r"\| (GPT-[^|]*?) \|[^|]*\| ([^|]*?) \| ([\d.]+) % \|", (ROOT / "docs/reproduce.md").read_text()
    )
    assert len(rows) == 3
    for model, protocol, value in rows:
        short = model.removesuffix(" 125M")
        assert (short, protocols[protocol], float(value)) in known


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name
)
def test_links_between_pages_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
