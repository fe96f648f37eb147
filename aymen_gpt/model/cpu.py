"""What makes training faster on a CPU and nowhere else. Skip this file when you read for the algorithm."""

import ctypes
import platform
import sys
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def keep_freed_memory() -> None:
    """Let glibc keep big freed blocks instead of returning them to the system.

    Every step frees and takes the same large tensors. By default each goes through mmap and munmap, and the
    kernel zeroes its pages anew. The constants are those of malloc.h: M_TRIM_THRESHOLD -1, M_MMAP_MAX -4.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)


def use_sparse_gradient(embedding: nn.Embedding) -> None:
    """Add the embedding's gradient to the output layer's a row a token, not as a second (V, C) matrix."""
    embedding.sparse = True


SMALL = 1e-37  # float32 keeps 24 bits of a probability down to here, 86 nats; below, fewer and fewer


def cross_entropy(logits: Tensor, targets: Tensor, vocab_size: int, with_grad: bool) -> tuple[Tensor, Tensor]:
    """What loss.cross_entropy does, in place: ``with_grad`` the logits become their gradient.

    32 rows at a time, so that their float32 softmax (6 MB) stays in the cache; one exponential a logit serves
    loss and gradient.
    """
    logits[:, vocab_size:] = -torch.inf  # padding is never predicted
    loss = logits.new_zeros((), dtype=torch.float32)
    for some, t in zip(logits.split(32), targets.split(32), strict=True):
        p = _room(32, logits.size(1), torch.float32)[: some.size(0)]
        torch.softmax(p.copy_(some), 1, out=p)
        p_t = p.gather(1, t)
        if p_t.min() >= SMALL:
            log_p = p_t.log()
        else:  # log p[t] = logit[t] - lse, where lse = max logit - log(max p): nothing here is ever too small
            largest = some[:, :vocab_size].amax(1, keepdim=True).float()
            log_p = some.gather(1, t).float() - largest + p.amax(1, keepdim=True).log()
        loss -= log_p.sum()
        if with_grad:
            p.scatter_add_(1, t, torch.full_like(t, -1.0, dtype=torch.float32))
            some.copy_(p)
    return loss, logits


def logits_room(rows: int, w: Tensor) -> Tensor | None:
    """Memory for the logits (rows, Vp) of every call, which keeps the heap from falling into pieces.

    None on other devices and under torch.compile, which plan their memory themselves, and for fake tensors, which
    take none.
    """
    if w.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(w, FakeTensor):
        return None
    return _room(rows, w.size(0), w.dtype)


@lru_cache(maxsize=2)
def _room(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype)
