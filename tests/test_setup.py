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


@pytest.mark.parametrize(
    ("gpu", "configured", "uv_works", "installs"),
    [
        (False, "", True, ["pip uv==0.13.9", "uv cpu torch", "pip requirements"]),
        (False, "", False, ["pip uv==0.13.9", "uv cpu torch", "pip requirements"]),
        (True, "", True, ["pip requirements"]),
        (False, "global.index-url='https://mirror.example/simple'", True, ["pip requirements"]),
    ],
    ids=["no-gpu", "no-gpu-not-reachable", "gpu", "own-index"],
)
def test_setup_installs_the_cpu_build_only_where_it_should(tmp_path, gpu, configured, uv_works, installs):
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    log, venv, tools = tmp_path / "log", tmp_path / ".venv/bin", tmp_path / "tools"
    for name in ("sh", "uname", "grep", "touch", "echo", "test"):
        tools.mkdir(exist_ok=True)
        (tools / name).symlink_to(shutil.which(name))
    script(tools / "fake-python", "true")
    script(venv / "python", "true")
    script(venv / "pip", f'case "$*" in "config list") echo "{configured}";; *) echo "pip $*" >> {log};; esac')
    script(venv / "uv", f'echo "uv $*" >> {log}; exit {0 if uv_works else 1}')
    if gpu:
        script(tools / "nvidia-smi", "true")
    make = subprocess.run(
        [shutil.which("make"), "setup", "PYTHON=fake-python"],
        cwd=tmp_path,
        env={**os.environ, "PATH": str(tools)},
        capture_output=True,
        text=True,
    )
    assert make.returncode == 0, make.stderr
    lines = [line for line in log.read_text().splitlines() if "-e ." not in line]
    assert len(lines) == len(installs)
    for line, words in zip(lines, installs, strict=True):
        assert all(word in line for word in words.split()), line
    assert ("pip installs PyPI's build instead" in make.stdout) == (not uv_works)
