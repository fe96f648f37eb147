"""Many clients at once on the server of aymen-gpt play: does it lose an answer, does its memory grow?

    python benchmarks/play.py [-m runs/demo] [--clients 20] [--seconds 30] [--tokens 50]

Starts the server, and that many clients that ask for one streamed text after the other, each until the time is up.
Every answer must be whole: as many tokens as it was to have, and the same as the first client got for its seed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

SEEDS = 5


def ask(address: str, model: str, tokens: int, seed: int) -> str:
    body = {"model": model, "prompt": "The", "max_tokens": tokens, "seed": seed, "stream": True, "logprobs": 0}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode())
    lines = urllib.request.urlopen(request, timeout=300).read().decode().splitlines()
    assert lines[-2] == "data: [DONE]", lines[-3:]
    parts = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert parts[-1]["finish_reason"] == "stop" or sum(len(p["logprobs"]["tokens"]) for p in parts) == tokens
    return "".join(part["text"] for part in parts)


def memory(pid: int) -> float:
    """Resident memory of a process in MB (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


def client(address: str, options, until: float, expected: list[str], found: list) -> None:
    seed = 0
    while time.monotonic() < until:
        began = time.monotonic()
        try:
            right = ask(address, options.model_name, options.tokens, seed % SEEDS) == expected[seed % SEEDS]
        except Exception as error:
            right = f"{type(error).__name__}: {error}"
        found.append((right, time.monotonic() - began))
        seed += 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-m", default="runs/demo")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--tokens", type=int, default=50)
    options = parser.parse_args()
    command = [sys.executable, "-m", "aymen_gpt", "play", "-m", options.m, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        address = server.stdout.readline().split("open ")[1].split()[0]
        options.model_name = json.load(urllib.request.urlopen(f"{address}/v1/models"))["data"][0]["id"]
        expected = [ask(address, options.model_name, options.tokens, seed) for seed in range(SEEDS)]
        sizes, found = [memory(server.pid)], []
        until = time.monotonic() + options.seconds
        each = (address, options, until, expected, found)
        clients = [threading.Thread(target=client, args=each) for _ in range(options.clients)]
        for thread in clients:
            thread.start()
        while any(thread.is_alive() for thread in clients):
            time.sleep(1)
            sizes.append(memory(server.pid))
        took = time.monotonic() - until + options.seconds
        server.terminate()
    wrong = [right for right, _ in found if right is not True]
    waits, third = sorted(seconds for _, seconds in found), len(sizes) // 3
    print(f"{options.clients} clients for {options.seconds:g} s: {len(found)} answers, {len(wrong)} wrong or lost")
    print(f"{len(found) * options.tokens / took:.0f} tokens/s in all")
    print(f"an answer took {statistics.median(waits):.1f} s (median), {waits[-1]:.1f} s (longest)")
    print(f"server's memory: {sizes[0]:.0f} MB before, {max(sizes[1:third]):.0f} MB in the first third, ", end="")
    print(f"{max(sizes[-third:]):.0f} MB in the last")
    print(*{str(reason) for reason in wrong}, sep="\n", end="")


if __name__ == "__main__":
    main()
