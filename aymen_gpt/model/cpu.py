"""What makes training faster on a CPU and nowhere else. Skip this file when you read for the algorithm."""

import ctypes
import platform
import sys
from functools import lru_cache

import torch
from torch import Tensor, nn


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


def rooms(rows: int, w: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Memory for the logits (rows, Vp), and for the float32 softmax of 32 of them, 6 MB that stay in the cache.

    On a CPU one place for all calls is faster, and keeps the heap from falling into pieces. A compiler plans its
    memory itself, and so does CUDA's allocator: None there.
    """
    if w.device.type != "cpu" or torch.compiler.is_compiling():
        return None, None
    return _rooms(rows, w.size(0), w.dtype)


@lru_cache(maxsize=1)
def _rooms(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty(rows, columns, dtype=dtype), torch.empty(32, columns)
