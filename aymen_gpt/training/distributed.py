"""One process or many: the same code with a ``Ranks`` value passed in.

Gradients are summed by one flat all-reduce after the last micro-batch instead of DistributedDataParallel. The
order of summation is then always the same, so a resumed run repeats the uninterrupted one bit for bit at any
number of ranks (DDP regroups its buckets after the first backward, which a resumed run passes at another step),
and ranks may take different numbers of micro-batches.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many; the default is the only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of ``values`` over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace every parameter's gradient by its sum over all ranks."""
        if self.world_size == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = _flatten_dense_tensors(grads)
        dist.all_reduce(flat)
        for grad, summed in zip(grads, _unflatten_dense_tensors(flat, grads), strict=True):
            grad.copy_(summed)

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.world_size > 1:
            dist.barrier()

    def broadcast(self, value: T) -> T:
        """The first rank's value (anything JSON could hold) on every rank."""
        if self.world_size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def ranks_from_environment() -> Ranks:
    """What torchrun says in RANK, WORLD_SIZE and LOCAL_RANK; one process without them."""
    return Ranks(
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
    )


@contextmanager
def process_group(
    ranks: Ranks, device: torch.device, timeout: timedelta = timedelta(minutes=10)
) -> Iterator[None]:
    """Connect the ranks for the length of the block: NCCL between GPUs, Gloo between CPUs."""
    if ranks.world_size == 1:
        yield
        return
    on_cuda = device.type == "cuda"
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=timeout, device_id=device if on_cuda else None)
    try:
        yield
    finally:
        dist.destroy_process_group()
