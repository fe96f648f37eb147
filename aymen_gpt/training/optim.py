"""AdamW over two parameter groups (matrices and embeddings decay, biases and LayerNorm do not), and its rate."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def decay_groups(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the parameters that weight decay acts on (two or more dimensions) and of those it spares."""
    decayed = [name for name, p in model.named_parameters() if p.dim() >= 2]
    spared = [name for name, p in model.named_parameters() if p.dim() < 2]
    return decayed, spared


def adamw(model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) with eps 1e-8, in one fused kernel where torch has it: on CUDA, MPS and CPU."""
    parameters = dict(model.named_parameters())
    decayed, spared = decay_groups(model)
    groups = [
        {"params": [parameters[name] for name in decayed], "weight_decay": weight_decay},
        {"params": [parameters[name] for name in spared], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True)


MOMENTS = ("exp_avg", "exp_avg_sq")


def moments(model: nn.Module, optimizer: torch.optim.AdamW, which: str) -> dict[str, Tensor]:
    """One of the MOMENTS of every parameter, by the parameter's name."""
    return {name: optimizer.state[p][which] for name, p in model.named_parameters()}


def restore_moments(
    model: nn.Module, optimizer: torch.optim.AdamW, updates: int, stored: dict[str, dict[str, Tensor]]
) -> None:
    """Put the optimizer where it was after ``updates``, from what ``moments`` gave for each of MOMENTS."""
    for name, p in model.named_parameters():
        state: dict[str, Tensor] = {"step": torch.tensor(float(updates), device=p.device)}
        state |= {which: stored[which][name].to(p.device) for which in MOMENTS}
        optimizer.state[p] = state


def start_moments(model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    """The state before the first update, allocated now: what fits after this fits for the whole run."""
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    restore_moments(
        model, optimizer, 0, {"exp_avg": zeros, "exp_avg_sq": {n: z.clone() for n, z in zeros.items()}}
    )


def updates(optimizer: torch.optim.AdamW) -> int:
    """How many updates the optimizer has made."""
    return int(next(iter(optimizer.state.values()))["step"].item())


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int, min_ratio: float) -> float:
    """Rate of update ``step`` (0 is the first): linear warmup, then half a cosine from peak to min_ratio * peak.

    GPT-3 (arXiv:2005.14165, appendix B). With peak 1.0, 2 warmup steps of 4 and min_ratio 0.1:

    >>> [round(learning_rate(s, peak=1.0, warmup_steps=2, steps=4, min_ratio=0.1), 3) for s in range(5)]
    [0.5, 1.0, 1.0, 0.55, 0.1]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[Tensor], limit: float | None) -> Tensor:
    """Scale the gradients to a total L2 norm of at most ``limit`` (None: any); the norm before, a float32 scalar.

    Gradients that are not finite stay as they are. A GPU computes on without the host looking at the norm; on a
    CPU a look spares a pass over all gradients, for most are small once training goes well.
    """
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit is not None and (norm.device.type != "cpu" or norm > limit):
        nn.utils.clip_grads_with_norm_(parameters, limit, norm.nan_to_num(0.0, posinf=0.0))
    return norm
