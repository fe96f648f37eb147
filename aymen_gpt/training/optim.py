"""AdamW over two parameter groups (matrices and embeddings decay, biases and LayerNorm do not); state and rate."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from aymen_gpt.training.config import TrainConfig
from aymen_gpt.training.muon import Muon
from aymen_gpt.training.sharding import total


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that weight decay acts on (two or more dimensions), and those it spares."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    spared = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def adamw(model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) with eps 1e-8, in one fused kernel where torch has it: on CUDA, MPS and CPU."""
    return torch.optim.AdamW(decay_groups(model, weight_decay), lr=lr, betas=betas, eps=1e-8, fused=True)


MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def kinds(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of what an optimizer remembers of its parameters, by which a checkpoint calls it."""
    return (*MOMENTS, "momentum") if isinstance(optimizer, Muon) else MOMENTS


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer remembers, as KIND/NAME of the parameter, one of the ``kinds`` after the other."""
    states = {name: optimizer.state[p] for name, p in model.named_parameters()}
    return {
        f"{kind}/{name}": state[kind]
        for kind in kinds(optimizer)
        for name, state in states.items()
        if kind in state
    }


def start_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The state before the first update, allocated now: what fits after this fits for the whole run."""
    moved = optimizer.matrices if isinstance(optimizer, Muon) else {}
    for name, p in model.named_parameters():
        step = {} if name in moved else {"step": torch.zeros((), device=p.device)}
        of_kind = {kind: torch.zeros_like(p) for kind in (("momentum",) if name in moved else MOMENTS)}
        optimizer.state[p] = step | of_kind


def set_updates(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Let the optimizer go on as after so many updates."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(count)


def updates(optimizer: torch.optim.Optimizer) -> int:
    """How many updates the optimizer has made."""
    return int(next(state["step"] for state in optimizer.state.values() if "step" in state).item())


DECAY = 0.6  # of the steps, at the end of the linear schedule


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, steps: int, min_ratio: float, schedule: str = "cosine"
) -> float:
    """Rate of update ``step`` (0 is the first): linear warmup, then from peak to min_ratio * peak.

    "cosine" is half a cosine, as GPT-3 has it (arXiv:2005.14165, appendix B); "linear" stays at the peak, then
    falls in a straight line over the last DECAY of the steps (arXiv:2405.18392). With peak 1.0, 2 warmup steps of
    4 and min_ratio 0.1:

    >>> [round(learning_rate(s, peak=1.0, warmup_steps=2, steps=4, min_ratio=0.1), 3) for s in range(5)]
    [0.5, 1.0, 1.0, 0.55, 0.1]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "linear":
        return peak * (min_ratio + (1 - min_ratio) * min(max(steps - step, 0) / (DECAY * steps), 1.0))
    progress = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def scheduled_rate(c: TrainConfig, step: int) -> float:
    """Rate of update ``step`` of a run."""
    ends: dict[str, Any] = {"warmup_steps": c.warmup_steps, "steps": c.steps, "min_ratio": c.min_lr_ratio}
    return learning_rate(step, peak=c.learning_rate, schedule=c.schedule, **ends)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of all groups, or ``times`` that where a group says so."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("times", 1.0)


def clip_gradients(parameters: Iterable[Tensor], limit: float | None) -> Tensor:
    """Scale the gradients to a total L2 norm of at most ``limit`` (None: any); the norm before, a float32 scalar.

    Gradients that are not finite stay as they are. A GPU computes on without the host looking at the norm; on a
    CPU a look spares a pass over all gradients, for most are small once training goes well.
    """
    parameters = list(parameters)
    norm = total(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if limit is not None and (norm.device.type != "cpu" or norm > limit):
        nn.utils.clip_grads_with_norm_(parameters, limit, norm.nan_to_num(0.0, posinf=0.0))
    return norm
