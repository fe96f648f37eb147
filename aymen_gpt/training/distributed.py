"""One process or many: the same code with a ``Ranks`` value passed in."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from aymen_gpt.errors import AymenError

T = TypeVar("T")
PATIENCE = 3.0


@dataclass
class Ranks:
    """Which process this is, of how many; the default is the only one.

    When another rank dies or hangs, the collective under way raises AymenError naming it: each rank counts its
    arrivals in a store that lives in torchrun, not in a rank, and says there that it failed. Who is not ahead and
    says nothing within PATIENCE seconds does not live.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    store: dist.Store | None = None
    arrivals: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of ``values`` over all ranks, in place."""
        if self.world_size > 1:
            with self.meeting():
                dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.world_size > 1:
            with self.meeting():
                dist.barrier()

    def broadcast(self, value: T) -> T:
        """The first rank's value (anything JSON could hold) on every rank."""
        if self.world_size == 1:
            return value
        box: list[Any] = [value]
        with self.meeting():
            dist.broadcast_object_list(box, src=0)
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

    def all(self, condition: bool) -> bool:
        """Whether the condition holds on every rank."""
        return all(self.gather(condition))

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self.meeting():
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Around what every rank must come to: says which rank is missing, if it fails."""
        self.arrivals += 1
        if self.store is not None:
            self.store.set(str(self.rank), str(self.arrivals))
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise AymenError(f"{self._missing()}; run the same command again to continue ({reason})") from error

    def _missing(self) -> str:
        """Who did not go through the collective that this rank waited in, nor failed in it too, in words."""
        with suppress(RuntimeError):  # the store is gone too: blame nobody
            if self.store is not None:
                self.store.set(f"failed {self.rank}", "")
            silent, deadline = self._silent(), time.monotonic() + PATIENCE
            while silent and time.monotonic() < deadline:
                time.sleep(0.1)
                silent = self._silent()
            if silent:
                return f"rank{'s'[: len(silent) > 1]} {', '.join(silent)} did not answer: dead or hanging"
        return "the connection to another rank was lost"

    def _silent(self) -> list[str]:
        """The ranks that have neither come further than this one nor told the store that they failed."""
        names = [str(rank) for rank in range(self.world_size) if rank != self.rank]
        if self.store is None:
            return []
        failed = [name for name in names if self.store.check([f"failed {name}"])]
        known = [name for name in names if self.store.check([name])]
        ahead = [name for name in known if int(self.store.get(name)) > self.arrivals]
        return [name for name in names if name not in failed + ahead]


def ranks_from_environment() -> Ranks:
    """What torchrun says in RANK, WORLD_SIZE and LOCAL_RANK; one process without them."""
    return Ranks(
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
    )


def attempt() -> str:
    """A name for this start of the ranks by torchrun, which keeps its store through --max-restarts.

    Without it a restarted rank can read the address of a dead one there (torch 2.13: 5 of 8 restarts failed).
    Nodes count their restarts apart, so only the ranks of a single node can use the count.
    """
    single_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0) if single_node else 0}"


@contextmanager
def process_group(ranks: Ranks, device: torch.device, timeout_seconds: float = 600.0) -> Iterator[None]:
    """Connect the ranks for the length of the block: NCCL between GPUs, Gloo between CPUs.

    A rank that waits longer than the timeout for the others gives up.
    """
    if ranks.world_size == 1:
        yield
        return
    timeout = timedelta(seconds=timeout_seconds)
    on_cuda = device.type == "cuda"
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(attempt(), store)
    ranks.store = dist.PrefixStore("arrivals", store)
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if on_cuda else None,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
