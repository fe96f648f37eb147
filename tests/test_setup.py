"""make setup chooses PyTorch's CPU build where there is no NVIDIA GPU: the Makefile on a pretended machine."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


CPU = ["pip uv==0.13.9", "uv cpu torch", "pip requirements"]
USUAL = CPU[2:]
MIRROR = "global.index-url='https://mirror.example/simple'"


@pytest.mark.parametrize(
    ("gpu", "configured", "uv_works", "installs"),
    [(False, "", True, CPU), (False, "", False, CPU), (True, "", True, USUAL), (False, MIRROR, True, USUAL)],
    ids=["no-gpu", "no-gpu-not-reachable", "gpu", "own-index"],
)
def test_setup_installs_the_cpu_build_only_where_it_should(tmp_path, gpu, configured, uv_works, installs):
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    log, venv, tools = tmp_path / "log", tmp_path / ".venv/bin", tmp_path / "tools"
    for name in ("sh", "uname", "grep", "touch", "echo", "test"):
        tools.mkdir(exist_ok=True)
        (tools / name).symlink_to(shutil.which(name))
    for path in (tools / "fake-python", venv / "python", *([tools / "nvidia-smi"] if gpu else [])):
        script(path, "true")
    script(venv / "pip", f'case "$*" in "config list") echo "{configured}";; *) echo "pip $*" >> {log};; esac')
    script(venv / "uv", f'echo "uv $*" >> {log}; exit {0 if uv_works else 1}')
    words, env = [shutil.which("make"), "setup", "PYTHON=fake-python"], {**os.environ, "PATH": str(tools)}
    make = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert make.returncode == 0, make.stderr
    lines = [line for line in log.read_text().splitlines() if "-e ." not in line]
    assert len(lines) == len(installs)
    for line, words in zip(lines, installs, strict=True):
        assert all(word in line for word in words.split()), line
    assert ("pip installs PyPI's build instead" in make.stdout) == (not uv_works)
