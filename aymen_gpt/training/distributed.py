"""One process or many: the same code with a ``Ranks`` value passed in."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from aymen_gpt.errors import AymenError

T = TypeVar("T")


@dataclass
class Ranks:
    """Which process this is, of how many; the default is the only one.

    When another rank dies or hangs, the collective under way raises AymenError naming the ranks that never came
    to it: each rank counts its arrivals in a store that lives in torchrun, not in a rank.
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
        """Around what every rank must come to: says which rank did not, if it fails."""
        self.arrivals += 1
        if self.store is not None:
            self.store.set(str(self.rank), str(self.arrivals))
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise AymenError(f"{self._absent()}; run the same command again to continue ({reason})") from error

    def _absent(self) -> str:
        """Who never came to the collective that this rank waited in, in words."""
        late = [r for r in range(self.world_size) if r != self.rank and self._arrivals_of(r) < self.arrivals]
        if not late:
            return "the connection to another rank was lost"
        return f"rank{'s' if len(late) > 1 else ''} {', '.join(map(str, late))} did not arrive: dead or hanging"

    def _arrivals_of(self, rank: int) -> int:
        try:
            return int(self.store.get(str(rank))) if self.store and self.store.check([str(rank)]) else 0
        except RuntimeError:  # the store is gone too: blame nobody
            return self.arrivals


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
