"""The output layer and its cross-entropy in one step, without ever holding the logits of a whole batch.

Logits are the largest tensor of GPT-2 training: 64 rows of 1,024 tokens x 50,304 columns x 4 bytes = 13 GB.
They are needed only to make a loss and two gradients, so they are made a few thousand tokens at a time, turned
into gradients on the spot (softmax minus one-hot) and dropped. The result is that of
``F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")`` and its backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aymen_gpt.model import cpu

SMALL = 1e-37  # float32 keeps 24 bits of a probability down to here, 86 nats; below, fewer and fewer


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
        logits_room, p_room = cpu.rooms(chunk_tokens, w)
        piece = chunk_tokens if p_room is None else p_room.size(0)
        for start in range(0, hidden.size(0), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            h, t = hidden[part].to(dtype), targets[part].unsqueeze(1)  # (n, C), (n, 1)
            logits = torch.mm(h, w.t(), out=None if logits_room is None else logits_room[: h.size(0)])  # (n, Vp)
            logits[:, vocab_size:] = -torch.inf  # padding is never predicted
            for some, their_t in zip(logits.split(piece), t.split(piece), strict=True):
                loss -= _log_p(some, their_t, vocab_size, p_room, with_grad).sum()
            if d_hidden is not None:  # logits are gradients now
                d_hidden[part] = logits @ w
                d_w = logits.t() @ h
                d_weight = d_w.to(weight.dtype) if d_weight is None else d_weight.add_(d_w)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden.mul_(grad), d_weight.mul_(grad), None, None, None, None, None


def _log_p(logits: Tensor, t: Tensor, vocab_size: int, p_room: Tensor | None, with_grad: bool) -> Tensor:
    """log p of the targets t (n, 1), in float32; with_grad the logits (n, Vp) become softmax minus one-hot.

    One exponential per logit serves loss and gradient.
    """
    if p_room is None:
        p = F.softmax(logits, dim=1, dtype=torch.float32)
    else:
        p = p_room[: logits.size(0)]
        torch.softmax(p.copy_(logits), 1, out=p)
    p_t = p.gather(1, t)
    if p_room is not None and p_t.min() >= SMALL:
        log_p = p_t.log()
    else:  # log p[t] = logit[t] - lse, where lse = max logit - log(max p): nothing here is ever too small
        largest = logits[:, :vocab_size].amax(1, keepdim=True).float()
        log_p = logits.gather(1, t).float() - largest + p.amax(1, keepdim=True).log()
    if with_grad:
        p.scatter_add_(1, t, torch.full_like(t, -1.0, dtype=torch.float32))
        logits.copy_(p)
    return log_p


def default_chunk(device: str) -> int:
    """Tokens whose logits exist at once, on a type of device."""
    return 1024 if device == "cpu" else 8192


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, *, chunk_tokens: int | None = None
) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target], in nats; a float32 scalar.

    hidden (..., C) and targets (...) line up; weight is (Vp, C) with Vp >= vocab_size, columns past vocab_size
    are left out of the softmax. Products run in the autocast dtype when autocast is on, the softmax and the sum
    in float32. ``chunk_tokens`` bounds the tokens whose logits exist at once; the default is 1,024 on a CPU (100
    MB with bfloat16 products: 2 bytes x Vp each) and 8,192 elsewhere (2.5 GB: 6 bytes, a whole softmax).
    Backward may run once.
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
