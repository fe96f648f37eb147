"""Competitors timed in turn, A B C A B C, each a live process of its own: a machine that slows down slows all."""

import multiprocessing
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from aymen_gpt.training.device import peak_memory

Work = Callable[[Any], float]  # does one round's task; returns a number, so that the device has finished
Build = Callable[[], Work]  # a module's function or functools.partial of one: it is sent to a new process


@dataclass
class Timing:
    """What one competitor took."""

    seconds: list[float] = field(default_factory=list)  # one a round
    value: float = float("nan")  # that it returned last
    peak_gb: float = 0.0  # the most its process held (CUDA: its tensors)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def times_slower(self, than: "Timing") -> float:
        """The median over rounds of this one's seconds over the other's in the same round."""
        return statistics.median(a / b for a, b in zip(self.seconds, than.seconds, strict=True))


def alternate(builds: Mapping[str, Build], tasks: Iterable[Any], *, warm_up: Iterable[Any]) -> dict[str, Timing]:
    """Build every competitor, let it do the ``warm_up`` tasks, then give each task to all in turn."""
    context, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    timings = {name: Timing() for name in builds}
    pipes, processes = {}, []
    warm_up = list(warm_up)
    for name, build in builds.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(build, threads, theirs), daemon=True))
        processes[-1].start()
        for task in warm_up:  # one after the other, or compiling would slow the rest
            _ask(pipes[name], task)
    for task in tasks:
        for name, pipe in pipes.items():
            seconds, timings[name].value, timings[name].peak_gb = _ask(pipe, task)
            timings[name].seconds.append(seconds)
    for pipe in pipes.values():
        pipe.close()
    for process in processes:
        process.join(60)
    return timings


def _ask(pipe: Any, task: Any) -> Any:
    pipe.send(task)
    return pipe.recv()


def _serve(build: Build, threads: int, pipe: Any) -> None:
    torch.set_num_threads(threads)
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = build()
    while True:
        try:
            task = pipe.recv()
        except EOFError:  # nothing more to do
            return
        began = time.perf_counter()
        value = work(task)
        pipe.send((time.perf_counter() - began, value, peak_memory(place) / 1e9))


def command() -> str:
    """How this program was called, for the record."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
