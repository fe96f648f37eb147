"""Causal attention for training on a CPU in bfloat16, for contexts that are not long.

PyTorch's CPU kernel never holds the (T, T) probabilities, which is what long contexts need. At a few hundred
tokens plain matrix products that keep them are faster, forward and backward: a block of queries at a time, with
the keys up to its last one, the queries, keys and values of all heads in one tensor. Scores and softmax are
float32, all other products bfloat16; the results are as near to float32's as the kernel's are
(tests/test_cpu_attention.py).
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from aymen_gpt.model.gpt import GPT, CausalSelfAttention

LONGEST = 512  # tokens; 1.6 times as fast as the kernel at 256, 1.8 times here; beyond, p takes too much memory
ROWS = 128  # queries at once, so that most keys that they may not see are left out
AT_ONCE = 2**19  # probabilities in float32, 2 MB: they stay in the cache


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_head: int) -> Tensor:
        B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
        heads = qkv.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4).reshape(3, B * n_head, T, C // n_head)
        y = torch.empty_like(heads[0])  # (B nh, T, hs)
        kept = []  # probabilities of the pieces
        for part, rows, seen in _pieces(B * n_head, T):
            q, k, v = heads[0, part, rows], heads[1, part, seen], heads[2, part, seen]
            mask, scale = _mask(T)[rows, seen], q.size(2) ** -0.5
            scores = torch.baddbmm(mask, q.float(), k.float().transpose(1, 2), alpha=scale)
            p = torch.softmax(scores, dim=2, out=scores).to(v.dtype)
            y[part, rows] = torch.bmm(p, v)
            kept.append(p)
        ctx.save_for_backward(heads, *kept)
        return y.view(B, n_head, T, -1).transpose(1, 2).reshape(B, T, C)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        heads, *kept = ctx.saved_tensors
        B, T, C = grad.shape
        grads = grad.view(B, T, -1, heads.size(3)).transpose(1, 2).reshape(heads[0].shape)
        d_heads = torch.empty_like(heads)
        for p, (part, rows, seen) in zip(kept, _pieces(len(grads), T), strict=True):
            q, k, v, g = heads[0, part, rows], heads[1, part, seen], heads[2, part, seen], grads[part, rows]
            d_p = torch.bmm(g, v.transpose(1, 2)).float()
            d_scores = torch._softmax_backward_data(d_p, p.float(), 2, torch.float32)
            d_scores = d_scores.mul_(q.size(2) ** -0.5).to(q.dtype)
            d_heads[0, part, rows] = torch.bmm(d_scores, k)
            further = float(seen.stop < T)  # the last queries come first and see all keys: nothing is there yet
            d_heads[1, part, seen].baddbmm_(d_scores.transpose(1, 2), q, beta=further)
            d_heads[2, part, seen].baddbmm_(p.transpose(1, 2), g, beta=further)
        return d_heads.view(3, B, -1, T, heads.size(3)).permute(1, 3, 0, 2, 4).reshape(B, T, 3 * C), None


def _pieces(n_heads: int, T: int) -> Iterator[tuple[slice, slice, slice]]:
    """What is computed at once: some heads, some queries of theirs, and the keys that these may see.

    >>> for piece in _pieces(32, 256):
    ...     print(*(f"{p.start}:{p.stop}" for p in piece))
    0:16 128:256 0:256
    16:32 128:256 0:256
    0:32 0:128 0:128
    """
    for end in range(T, 0, -ROWS):
        rows = slice(max(end - ROWS, 0), end)
        n = max(1, AT_ONCE // ((end - rows.start) * end))
        for first in range(0, n_heads, n):
            yield slice(first, first + n), rows, slice(0, end)


@lru_cache(maxsize=1)
def _mask(T: int) -> Tensor:
    """-inf where a token (row) would look at a later one (column)."""
    return torch.full((T, T), -torch.inf).triu_(1)


def attention(qkv: Tensor, n_head: int) -> Tensor:
    """What model.gpt.attention computes, (B, T, C) for queries, keys and values (B, T, 3C) in bfloat16."""
    with torch.autocast("cpu", enabled=False):
        result: Tensor = _Attention.apply(qkv, n_head)
    return result


def use(model: GPT) -> None:
    """Let every block of the model compute its attention here."""
    for module in model.modules():
        if isinstance(module, CausalSelfAttention):
            module.attention = attention
