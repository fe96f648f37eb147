"""A small run of pretrain.py in a process of its own: start it, watch it, read what it logged."""

import json
import subprocess
import time

from conftest import door_command

TINY = ["--preset", "tiny", "--dtype", "float32", "--val-every", 5, "--checkpoint-every", 5]


def rows(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("step_seconds", "tokens_per_second")} for row in found]


def start(tmp_path, *words, processes=None):
    return subprocess.Popen(
        door_command("pretrain.py", *words, processes=processes),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def wait_for_step(run, step, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and f'{{"step": {step},' in (run / "metrics.jsonl").read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came: {process.communicate()}")
