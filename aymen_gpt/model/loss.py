"""The output layer and its cross-entropy in one step, without ever holding the logits of a whole batch.

Logits are the largest tensor of GPT-2 training: 64 rows of 1,024 tokens x 50,304 columns x 4 bytes = 13 GB.
They are needed only to make a loss and two gradients, so they are made a few thousand tokens at a time, turned
into gradients on the spot (softmax minus one-hot) and dropped. The result is that of
``F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")`` and its backward.
"""

from typing import Any

import torch
from torch import Tensor

from aymen_gpt.model import cpu


def cross_entropy(
    logits: Tensor, targets: Tensor, vocab_size: int, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Summed loss of logits (n, Vp) for targets (n, 1), and its gradient by the logits, in their dtype.

    Columns are compared with the target instead of gathered and scattered, so that torch.compile makes all of it
    one kernel that reads the logits twice and writes the gradient once.
    """
    column = torch.arange(logits.size(1), device=logits.device)
    is_target = column == targets  # (n, Vp)
    real = torch.where(column < vocab_size, logits.float(), -torch.inf)  # padding is never predicted
    lse = real.logsumexp(1, keepdim=True)
    loss = (lse - torch.where(is_target, real, 0.0).sum(1, keepdim=True)).sum()
    return loss, ((real - lse).exp() - is_target.float()).to(logits.dtype) if with_grad else None


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients together with the loss; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        chunk_tokens: int,
        dtype: torch.dtype,
        with_grad: bool,
    ) -> Tensor:
        w = weight.to(dtype)  # (Vp, C)
        loss = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden) if with_grad else None  # (N, C)
        d_weight: Tensor | None = None  # (Vp, C)
        room = cpu.logits_room(chunk_tokens, w)
        softmax_loss = cross_entropy if room is None else cpu.cross_entropy
        for start in range(0, hidden.size(0), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            h, t = hidden[part].to(dtype), targets[part].unsqueeze(1)  # (n, C), (n, 1)
            logits = torch.mm(h, w.t(), out=None if room is None else room[: h.size(0)])  # (n, Vp)
            of_part, d_logits = softmax_loss(logits, t, vocab_size, with_grad)
            loss += of_part
            if d_hidden is not None and d_logits is not None:
                d_hidden[part] = d_logits @ w
                d_w = d_logits.t() @ h
                d_weight = d_w.to(weight.dtype) if d_weight is None else d_weight.add_(d_w)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden.mul_(grad), d_weight.mul_(grad), None, None, None, None, None


def default_chunk(device: str) -> int:
    """Tokens whose logits exist at once, on a type of device."""
    return 8192 if device == "cuda" else 1024


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, *, chunk_tokens: int | None = None
) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target], in nats; a float32 scalar.

    hidden (..., C) and targets (...) line up; weight is (Vp, C) with Vp >= vocab_size, columns past vocab_size
    are left out of the softmax. Products run in the autocast dtype when autocast is on, the softmax and the sum
    in float32. ``chunk_tokens`` bounds the tokens whose logits exist at once; the default is 8,192 on CUDA (0.8 GB
    of bfloat16 logits and as much of gradient, compiled) and 1,024 elsewhere. Backward may run once.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if chunk_tokens is None:
        chunk_tokens = default_chunk(device)
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    flat = hidden.reshape(-1, hidden.size(-1))
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(
            flat, weight, targets.reshape(-1), vocab_size, chunk_tokens, dtype, with_grad
        )
