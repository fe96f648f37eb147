"""python -m aymen_gpt.commands.demo: the whole journey, each stage by the command a person would type.

Prepares the built-in corpus, trains a small GPT, stops it half way with SIGTERM and lets it continue, scores it on
HellaSwag and lets it write. What is already done is not done again.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from aymen_gpt.commands import console
from aymen_gpt.errors import AymenError
from aymen_gpt.files import read_json
from aymen_gpt.model.folders import checkpoints, step_of
from aymen_gpt.reporting.run_folder import read_lines
from aymen_gpt.training.config import resolve
from aymen_gpt.wording import percent

CONFIG = resolve({"preset": "demo"})
RUN = Path(CONFIG.run)
EXAMPLES = 1000  # of HellaSwag's 10,042


def main() -> None:
    began = time.monotonic()
    stage(1, "text -> tokens: the documentation that comes with Python and our packages")
    call("fineweb.py", "--source", "builtin", "--out", CONFIG.data)
    half, done = CONFIG.steps // 2, steps_done()
    how = "stopped half way and continued" if done < half else f"{done} of them done before"
    stage(2, f"tokens -> a GPT: {CONFIG.steps} steps, {how}")
    if done < half:
        call("pretrain.py", "--preset", "demo", stop_at=half)
        print("--- exit code 75: stopped and saved. The same command again continues:", flush=True)
    call("pretrain.py", "--preset", "demo")
    stage(3, f"the GPT -> its score on {EXAMPLES:,} real HellaSwag examples")
    score = RUN / "hellaswag.json"
    if score.exists() and read_json(score).get("step") == step_of(checkpoints(RUN)[0]):
        print(f"already scored: {score}")
    else:
        call("hellaswag.py", "-m", str(RUN), "--limit", str(EXAMPLES), "--json", str(score))
    stage(4, "the GPT writes")
    call("generate.py", "-m", str(RUN), "Return a list of", "--max-tokens", "60")
    print(console.as_typed(closing(read_json(score), time.monotonic() - began)))


def stage(number: int, title: str) -> None:
    print(f"\n=== {number}/4  {title}", flush=True)


def call(*words: str, stop_at: int | None = None) -> None:
    """Run one of the doors to its end, or until it has trained ``stop_at`` steps.

    It is stopped with SIGTERM, as a scheduler would that wants its machine back.
    """
    print(console.as_typed(f"$ python {shlex.join(words)}"), flush=True)
    process = subprocess.Popen([sys.executable, *words])
    if stop_at is not None:
        while process.poll() is None and steps_done() < stop_at:
            time.sleep(0.2)
        if process.poll() is None:
            print(f"--- SIGTERM to process {process.pid}: it will finish its step, save and leave", flush=True)
            process.send_signal(signal.SIGTERM)
    code, expected = process.wait(), 0 if stop_at is None else 75
    if code != expected:
        raise AymenError(f"python {' '.join(words)} ended with exit code {code}, not {expected}")


def rows() -> list[dict[str, Any]]:
    return read_lines(RUN / "metrics.jsonl", [])


def steps_done() -> int:
    """The last step in the run's metrics, 0 before there is one."""
    return rows()[-1]["step"] if rows() else 0


def closing(score: dict[str, Any], seconds: float) -> str:
    vals = [row["val_loss"] for row in rows() if "val_loss" in row]
    found = score["completion"]
    share = percent(found["acc_norm"], found["acc_norm_stderr"], digits=1)
    return f"""
=== done in {seconds:.0f} s on {os.cpu_count()} cores
loss        {vals[0]:.2f} -> {vals[-1]:.2f} nats per token on text it never trained on
HellaSwag   {share} of {score["n"]:,} examples, where chance is 25 % and GPT-2 124M has 29.6 %:
            a model this small and young cannot do better than chance, and should not do worse
curve       {RUN}/report.html (open it in a browser)
samples     {RUN}/samples.jsonl
checkpoint  {checkpoints(RUN)[0]} (opens in transformers as it is)
next        {console.program("play")} -m {RUN}
            python generate.py -m {RUN} "Raised when"
            python fineweb.py --source YOUR.txt --out data/mine && \\
            python pretrain.py --preset demo --data data/mine --run-dir runs/mine"""


if __name__ == "__main__":
    console.run(main)
