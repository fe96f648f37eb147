"""One process or many: the same code with a ``Ranks`` value passed in."""

import math
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from aymen_gpt.errors import AymenError

T = TypeVar("T")
PATIENCE = 3.0
LOST = re.compile("gloo|nccl|connection|timed out|timeout|nothing for|cannot be finished", re.IGNORECASE)


@dataclass
class Ranks:
    """Which process this is, of how many; the default is the only one.

    When another rank fails, dies or hangs, the collective under way raises AymenError naming it: each rank counts
    its arrivals in a store that lives in torchrun, not in a rank, and writes there why it failed. A rank that is
    not ahead and writes nothing within PATIENCE seconds is missing; see show_life for ranks that wait for others.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1  # processes on this machine
    store: dist.Store = field(default_factory=dist.HashStore)
    arrivals: int = 0
    timeout: float = math.inf  # seconds that ranks wait for one another
    queued: bool = False  # whether to wait for a sum does not stop the host (NCCL)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def limit(self) -> timedelta:
        """When torch.distributed itself gives up. NCCL's watchdog kills without a word: ours is first."""
        return timedelta(seconds=self.timeout + 60 * self.queued)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of ``values`` over all ranks, in place."""
        self._together(dist.all_reduce, values, async_op=True)
        return values

    def gather(self, value: T) -> list[T]:
        """Every rank's value (anything that can be pickled), in order of rank, on every rank."""
        values = [value] * self.world_size
        self._together(dist.all_gather_object, values, value)
        return values

    def broadcast(self, value: T) -> T:
        """The first rank's value on every rank."""
        box = [value]
        self._together(dist.broadcast_object_list, box, src=0)
        return box[0]

    def first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on the first rank, on every rank; its AymenError too."""
        made: T | AymenError | None = None
        if self.is_first:
            try:
                made = make()
            except AymenError as error:
                made = error
        result: Any = self.broadcast(made)
        if isinstance(result, AymenError):
            raise result
        return result

    def _together(self, collective: Callable[..., dist.Work | None], *values: Any, **options: Any) -> None:
        """Return when a collective of torch.distributed is done. It is not begun where there is one rank.

        With NCCL ``wait`` only puts the wait into the GPU's queue, and whoever reads the result next hangs where
        no signal and no timeout reaches it, if a rank is missing. So look, and see in the store who failed.
        """
        if self.world_size == 1:
            return
        with self.meeting():
            work = collective(*values, **options)
            if work is None:  # of Python objects: it is done
                return
            began = looked = time.monotonic()
            while self.queued and not work.is_completed():
                time.sleep(0.0005)
                now = time.monotonic()
                if now > began + self.timeout:
                    raise RuntimeError(f"nothing for {self.timeout:g} s")
                if now > looked + 1:
                    looked = now
                    if self._failures():
                        raise RuntimeError("the sum cannot be finished")
            work.wait()

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Around what every rank must come to: says which rank is missing, if it fails for one.

        Other errors pass, as that of memory that is full here.
        """
        self.arrivals += 1
        self.store.set(str(self.rank), str(self.arrivals))
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or LOST.search(str(error))
            if self.world_size == 1 or not lost:
                raise
            self.say_failed("")  # of another rank's failure
            reason = " ".join(str(error).split())[:200]
            raise AymenError(f"{self._missing()}; run the same command again to continue ({reason})") from error

    def say_failed(self, why: str) -> None:
        """Tell the other ranks, at most once, that this one has failed."""
        with suppress(RuntimeError):  # the store is gone too
            if not self.store.check([f"failed {self.rank}"]):
                self.store.set(f"failed {self.rank}", why)
                self.store.set("failed", "")

    def show_life(self, over: threading.Event) -> None:
        """In a thread: when a rank has failed, write that this one lives; it may wait for one that waits.

        Only if all that are missing live are they named: a process may hang while its threads go on.
        """
        with suppress(RuntimeError):  # the store is gone
            while not over.wait(PATIENCE / 4):
                if self.store.check(["failed"]):
                    return self.store.set(f"alive {self.rank}", "")

    def _missing(self) -> str:
        """In words, who failed, or else who did not go through the collective that this rank waited in."""
        deadline = time.monotonic() + PATIENCE
        with suppress(RuntimeError):  # the store is gone too
            while True:
                failures = self._failures()
                for rank, why in failures.items():
                    if why:
                        return f"rank {rank} failed: {why}"
                silent = [name for name in self._others() if name not in failures and not self._is_ahead(name)]
                if not silent:
                    break
                if time.monotonic() > deadline:
                    lost = [name for name in silent if not self.store.check([f"alive {name}"])] or silent
                    return f"rank{'s'[: len(lost) > 1]} {', '.join(lost)} did not answer: dead or hanging"
                time.sleep(0.1)
        return "the connection to another rank was lost"

    def _others(self) -> list[str]:
        return [str(rank) for rank in range(self.world_size) if rank != self.rank]

    def _failures(self) -> dict[str, str]:
        """Of each other rank that said it failed: why, empty where that is another rank's failure."""
        told = [name for name in self._others() if self.store.check([f"failed {name}"])]
        return {name: self.store.get(f"failed {name}").decode() for name in told}

    def _is_ahead(self, name: str) -> bool:
        """Whether a rank has come to a collective behind the one that this rank is in."""
        return self.store.check([name]) and int(self.store.get(name)) > self.arrivals


def ranks_from_environment() -> Ranks:
    """What torchrun says in RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; one process without them."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    rank, world_size, local_rank, local_world_size = (int(os.environ.get(n, alone)) for n, alone in names.items())
    return Ranks(rank, world_size, local_rank, local_world_size)


def meet(store: dist.Store, rank: int, world_size: int, seconds: float) -> dist.Store:
    """A part of torchrun's store that only the ranks of this start know.

    torchrun keeps its store through --max-restarts, so a rank can read there the address of a dead one, and nodes
    count their restarts apart. Here the first rank gives this start a name, the others greet it under that name,
    each with a word of its own, and it answers with their words: no rank can take what is old for new. AymenError
    names ranks that do not come within so many seconds.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + seconds
    late = set(range(1, world_size)) if rank == 0 else {0}
    if rank == 0:
        store.set("start", mine)
    while late and time.monotonic() < deadline:
        if rank > 0 and not store.check(["start"]):
            time.sleep(0.05)
            continue
        start = dist.PrefixStore(store.get("start").decode(), store)
        if rank > 0:
            start.set(f"{rank} greets", mine)
        for other in sorted(late):
            if rank == 0 and start.check([f"{other} greets"]):
                start.set(f"{other} is here", start.get(f"{other} greets").decode())
                late.remove(other)
            elif rank and start.check([f"{rank} is here"]) and start.get(f"{rank} is here").decode() == mine:
                late.remove(other)
        time.sleep(0.05)
    if late:
        names = ", ".join(map(str, sorted(late)))
        raise AymenError(f"rank{'s' * (len(late) > 1)} {names} did not come within {seconds:g} s: start all nodes")
    return start


@contextmanager
def process_group(ranks: Ranks, device: torch.device, timeout_seconds: float = 600.0) -> Iterator[None]:
    """Connect the ranks for the length of the block: NCCL between GPUs, Gloo between CPUs and for Python objects.

    A rank that waits longer than the timeout for the others gives up. A rank that leaves the block by an error
    says so to the others and does not take its leave of NCCL, for that would wait for them.
    """
    if ranks.world_size == 1:
        yield
        return
    ranks.timeout, ranks.queued = timeout_seconds, device.type == "cuda"
    store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
    store = meet(store, rank, world_size, timeout_seconds)
    ranks.store = dist.PrefixStore("arrivals", store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if ranks.queued else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=ranks.limit,
        device_id=device if ranks.queued else None,
    )
    threading.Thread(target=ranks.show_life, args=(over := threading.Event(),), daemon=True).start()
    try:
        yield
    except BaseException as error:
        ranks.say_failed(" ".join(str(error).split())[:200] or type(error).__name__)
        raise
    finally:
        over.set()
    dist.destroy_process_group()
