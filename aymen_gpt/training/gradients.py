"""Gradients summed over ranks, the first while backward is still computing the last.

Gradients live in a few flat tensors, the buckets, in the order in which backward reaches their parameters: the
last layer's first. When backward has filled a bucket it is summed over the ranks in the background. That is what
DistributedDataParallel does too, with ``gradient_as_bucket_view``; but it regroups its buckets after the first
backward, which a resumed run passes at another step, and expects as many micro-batches of every rank. Here the
buckets never change, so a resumed run repeats the uninterrupted one bit for bit at any number of ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from aymen_gpt.training.distributed import Ranks

BUCKET_BYTES = 25 * 2**20  # DDP's default too: large enough to use a network well, small enough to begin early


class GradientSum:
    """Owns ``p.grad`` of the parameters; alone it leaves them to autograd.

    clear(), then backward for every micro-batch, with coming() before the last one, then complete().
    """

    def __init__(self, ranks: Ranks, parameters: Sequence[Tensor], bucket_bytes: int = BUCKET_BYTES) -> None:
        self.ranks, self.parameters = ranks, list(parameters)
        self.buckets: list[Tensor] = []
        self._views: list[tuple[Tensor, Tensor]] = []  # a parameter and its place in a bucket
        self._missing: list[int] = []  # gradients that each bucket still waits for
        self._begun: list[Any] = []  # sums under way, bucket after bucket
        self._failure: RuntimeError | None = None
        if ranks.world_size > 1:
            self._sizes = [self._make(group) for group in _groups(self.parameters[::-1], bucket_bytes)]
        self.clear()

    def _make(self, group: list[Tensor]) -> int:
        """The next bucket, with a place for the gradient of each parameter of ``group``."""
        number, begin = len(self.buckets), 0
        self.buckets.append(group[0].new_zeros(sum(p.numel() for p in group)))
        for p in group:
            self._views.append((p, self.buckets[number][begin : begin + p.numel()].view_as(p)))
            begin += p.numel()
            p.register_post_accumulate_grad_hook(lambda _: self._arrived(number))
        return len(group)

    def clear(self) -> None:
        """Forget all gradients."""
        for p in self.parameters:
            p.grad = None
        for bucket in self.buckets:
            bucket.zero_()
        for p, view in self._views:
            p.grad = view

    def coming(self) -> None:
        """The next backward completes the gradients of this rank."""
        if self.buckets:
            self._missing = list(self._sizes)

    def _arrived(self, number: int) -> None:
        if self._missing:
            self._missing[number] -= 1
            self._begin()

    def _begin(self) -> None:
        """Start to sum the full buckets, in their order, which is then that of every rank."""
        while len(self._begun) < len(self.buckets) and self._missing[len(self._begun)] == 0 and not self._failure:
            try:
                self._begun.append(dist.all_reduce(self.buckets[len(self._begun)], async_op=True))
            except RuntimeError as error:  # another rank is gone; complete() says which
                self._failure = error

    def complete(self) -> None:
        """Return when every gradient is its sum over all ranks. AymenError names the ranks that did not come."""
        if not self.buckets:
            return
        self._missing = [0] * len(self.buckets)  # a parameter that the loss does not depend on adds nothing
        with self.ranks.meeting():
            self._begin()
            if self._failure:
                raise self._failure
            for work in self._begun:
                work.wait()
        self._begun, self._missing = [], []


def _groups(parameters: Sequence[Tensor], limit: int) -> list[list[Tensor]]:
    """Neighbours that are at most ``limit`` bytes together; larger ones alone.

    >>> import torch
    >>> [len(group) for group in _groups([torch.empty(2), torch.empty(1), torch.empty(9), torch.empty(1)], 12)]
    [2, 1, 1]
    """
    groups: list[list[Tensor]] = []
    room = 0
    for p in parameters:
        room -= p.nbytes
        if room < 0:
            groups.append([])
            room = limit - p.nbytes
        groups[-1].append(p)
    return groups
