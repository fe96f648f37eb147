"""Shared by all tests: one thread a process (two test processes share two cores), tiny shards, the doors."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # for paper/ and tools/, which are not installed


@pytest.fixture
def shards(tmp_path):
    """A folder of small token shards: 20,000 val and 80,000 train tokens in documents of about 200."""
    return make_shards(tmp_path / "shards")


def make_shards(folder: Path, seed: int = 0) -> Path:
    from aymen_gpt.data.shards import shard_name, write_shard

    rng = np.random.default_rng(seed)
    for index, (split, n) in enumerate((("val", 20_000), ("train", 50_000), ("train", 30_000))):
        tokens = rng.integers(0, 2000, n).astype(np.uint16)
        tokens[rng.integers(0, n, n // 200)] = 50256
        tokens[0] = 50256
        write_shard(folder / shard_name(split, index), tokens)
    return folder


@pytest.fixture(scope="session")
def real():
    """HellaSwag's validation set."""
    from aymen_gpt.evaluation.hellaswag_data import load_examples

    return load_examples()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache that still has the vocabulary."""
    from aymen_gpt.data import tokenizer

    tokenizer.gpt2()  # kept in memory
    monkeypatch.setenv("AYMEN_GPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def disk(tmp_path):
    """A real small disk: disk("100k") is its folder; asked again it has another size, or with "ro" is read-only.

    What is on it stays. Skips where nobody may mount: that takes Linux and root, as in a container.
    """
    folder = tmp_path / "disk"

    def mount(option):
        option = option if option == "ro" else f"rw,size={option}"
        command = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", folder]
        if folder.is_mount():
            subprocess.run([*command[:4], f"remount,{option}", *command[5:]], check=True)
            return folder
        folder.mkdir()
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small disk needs root")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def door(tmp_path):
    """Run a command as a user does, in a folder of its own: door("pretrain.py", "--steps", 3)."""

    def run(*words, processes=None, timeout=240, **environment):
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as an activated environment has it
        done = subprocess.run(
            door_command(*words, processes=processes),
            cwd=tmp_path,
            env=os.environ | {"PATH": path} | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        for name in ("stdout", "stderr"):  # the commands to type next, as if the doors lay here
            setattr(done, name, getattr(done, name).replace(f"python {ROOT}/", "python "))
        return done

    return run


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """As door, in this process, which saves the start: call("pretrain.py", "--steps", 3)."""
    from aymen_gpt.__main__ import main

    def run(script, *words):
        capsys.readouterr()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *map(str, words)])
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with pytest.raises(SystemExit) as ended:
                main(script.removesuffix(".py"))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        said = (text.replace(f"python {ROOT}/", "python ") for text in capsys.readouterr())
        return subprocess.CompletedProcess(sys.argv, ended.value.code, *said)

    return run


@pytest.fixture
def refused(call, tmp_path):
    """Assert that a command ends with a code and a line of error, writing nothing: refused(2, "what", *words)."""

    def check(code, message, *words):
        before = set(tmp_path.rglob("*"))
        done = call(*words)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        first, *usage = done.stderr.splitlines()
        assert first.startswith("error: ")
        assert message in first
        assert len(usage) <= 1
        assert all(line.startswith("usage: ") for line in usage)
        assert set(tmp_path.rglob("*")) == before

    return check


def door_command(script, *words, processes=None):
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    )
    return [sys.executable, *torchrun, script if script == "-m" else str(ROOT / script), *map(str, words)]
