"""One model on many ranks, by PyTorch's FSDP2 (fully_shard), and what our promises need around it.

``shard`` ranks hold one copy of weights, gradients and moments between them. The world holds world_size / shard
such copies, which learn alike. Before a block computes, its ranks gather its weights; after backward they add up
its gradients, and each keeps the sum of its own part: ZeRO-3 (arXiv:1910.02054). With ``shard`` 1 every rank has
the whole model and gradients go through an all-reduce, block after block while backward goes on, as with DDP.

A rank has rows [first, first + n) of each parameter: those of torch.chunk, the last ranks may have fewer, or none.
One process is not wrapped at all. https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh

from aymen_gpt.errors import UsageError
from aymen_gpt.model.gpt import GPT, GPTConfig
from aymen_gpt.training.distributed import Ranks

if TYPE_CHECKING:  # where one process trains they are not imported, for that takes a second
    from torch.distributed.tensor import DTensor


def is_dealt(t: Tensor) -> TypeGuard["DTensor"]:
    """Whether several ranks hold the rows of a tensor, a copy of it or both."""
    return hasattr(t, "full_tensor")


def engines(model: nn.Module) -> list[Any]:
    """The modules that fully_shard has wrapped, the model first; none in a single process."""
    return list(filter(is_wrapped, model.modules())) if is_wrapped(model) else []


def is_wrapped(model: nn.Module) -> bool:
    return hasattr(model, "reset_iter_state")


def shard_size(option: str, ranks: Ranks, auto: int = 1) -> int:
    """Ranks of one copy of the model, by ``--shard``: auto, a number, node (those of one machine) or all."""
    size = {"auto": auto, "node": ranks.local_world_size, "all": ranks.world_size}.get(option)
    if size is None and not re.fullmatch("[1-9][0-9]{0,5}", option):
        raise UsageError(f"--shard {option}: expected auto, a number of processes, node or all")
    size = size or int(option)
    if ranks.world_size % size:
        raise UsageError(f"--shard {option}: {ranks.world_size} processes do not divide into groups of {size}")
    return size


def new_model(config: GPTConfig, seed: int, size: int, ranks: Ranks, place: torch.device) -> GPT:
    """The model with its first random weights, the same whether one process or ``size`` of many hold a copy."""
    generator = torch.Generator().manual_seed(seed)
    with unset_fake_temporarily():  # of training/memory.py: a mesh needs numbers
        with torch.device("meta"):
            model = GPT(config)
        if ranks.world_size > 1:
            shard(model, size, ranks, place)
    draw(model, generator, place)
    return model


def shard(model: GPT, size: int, ranks: Ranks, place: torch.device) -> GPT:
    """Give each rank its rows of every parameter, and let ``model(...)`` and backward do the rest, sums included.

    Gradients are sums over ranks, not means: the loss already is a share of the whole step's.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not hasattr(FSDPModule, "reset_iter_state"):
        raise UsageError(f"several processes need torch 2.13 or newer, this is {torch.__version__}")
    shape = {"replicate": ranks.world_size // size, "shard": size}
    if size == ranks.world_size:
        del shape["replicate"]
    mesh = init_device_mesh(place.type, tuple(shape.values()), mesh_dim_names=tuple(shape))
    for group in mesh.get_all_groups() if ranks.timeout < math.inf else []:  # else they wait for half an hour
        dist.distributed_c10d._set_pg_timeout(ranks.limit, group)
    for block in model.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in engines(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return model


def draw(model: GPT, generator: torch.Generator, place: torch.device) -> None:
    """The weights of GPT.init_weights, to the bit, for a model on the meta device, sharded or not.

    Every rank draws all of them, a parameter at a time, and keeps its rows.
    """
    model.to_empty(device=place)
    for name, p in model.named_parameters():
        put(p, model.initial(name, p.shape, generator))
    if is_wrapped(model):
        with torch.no_grad():  # fully_shard finds its root in the first pass: nothing else may come before
            model(torch.zeros(1, 1, dtype=torch.int64, device=place))
        settle(model)


def local(t: Tensor) -> Tensor:
    """What this rank has of a tensor; of a whole one, all."""
    return t.to_local() if is_dealt(t) else t


def total(t: Tensor) -> Tensor:
    """The whole of a tensor or of a sum over ranks; every rank must ask."""
    return t.full_tensor() if is_dealt(t) else t


def copy_size(t: Tensor) -> int:
    """How many ranks hold one copy of a parameter of the model."""
    return t.device_mesh["shard"].size() if is_dealt(t) else 1


def heights(t: Tensor) -> list[int]:
    """How many rows of a dealt tensor each rank of a copy has, by torch.chunk's rule."""
    size = copy_size(t)
    most = -(-t.size(0) // size)
    return [min(max(t.size(0) - i * most, 0), most) for i in range(size)]


def first_row(t: Tensor) -> int:
    """The first row that this rank has of a tensor."""
    return sum(heights(t)[: t.device_mesh["shard"].get_local_rank()]) if is_dealt(t) else 0


@torch.no_grad()
def put(t: Tensor, whole: Tensor) -> None:
    """Make a tensor equal to ``whole``, of which this rank takes its rows."""
    mine, first = local(t), first_row(t)
    mine.copy_(whole[first : first + mine.size(0)])


def deal_out(like: Tensor, rows: list[Tensor]) -> Tensor:
    """This rank's share, whole, of n matrices that lie as ``like`` does, ``rows`` of each here: (share, R, C).

    The copies of the model divide the matrices, and so do the ranks of a copy; all get equally many, filled up
    with zeros.
    """
    if not is_dealt(like):
        return torch.stack(rows)
    size, (height, C) = copy_size(like), rows[0].shape
    share = -(-len(rows) // dist.get_world_size())
    first = dist.get_rank() // size * size * share
    mine = rows[0].new_zeros(size * share, height, C)
    for place, matrix in zip(mine, rows[first : first + size * share], strict=False):
        place.copy_(matrix)
    counts = [share * n * C for n in heights(like)]
    whole, group = mine.new_empty(sum(counts)), like.device_mesh["shard"].get_group()
    dist.all_to_all_single(whole, mine.view(-1), counts, [share * height * C] * size, group)
    return torch.cat([t.view(share, -1, C) for t in whole.split(counts)], 1)


def deal_back(like: Tensor, share: Tensor, n: int) -> Tensor:
    """The way back, from each rank's share of n matrices to this rank's rows of all of them: (n, rows, C)."""
    if not is_dealt(like):
        return share
    size = copy_size(like)
    parts = share.split(heights(like), 1)
    height = parts[dist.get_rank() % size].size(1)
    mine, whole = share.new_empty(size * len(share), height, like.size(1)), torch.cat([p.flatten() for p in parts])
    counts, group = [p.numel() for p in parts], like.device_mesh["shard"].get_group()
    dist.all_to_all_single(mine.view(-1), whole, [mine.numel() // size] * size, counts, group)
    if size == dist.get_world_size():
        return mine[:n]
    of_all, copies = mine.new_empty(n, *mine.shape[1:]), like.device_mesh["replicate"].get_group()
    for copy, part in enumerate(of_all.split(len(mine))):  # the last copies may have no matrices
        if copy == dist.get_rank() // size:
            part.copy_(mine[: len(part)])
        dist.broadcast(part, group=copies, group_src=copy)
    return of_all


def gather_to(owner: int, t: Tensor) -> Tensor | None:
    """The whole tensor, in host memory of rank ``owner`` of the first ``shard`` ranks; None on the others.

    All ranks of the first copy of the model must ask; those of other copies have nothing to do.
    """
    if not is_dealt(t):
        return t.detach().to("cpu", copy=True)
    mesh, mine = t.device_mesh["shard"], t.to_local().detach()
    if mesh.size() == 1:
        return mine.to("cpu", copy=True) if dist.get_rank() == owner else None
    if dist.get_rank() >= mesh.size():
        return None
    rows = -(-t.size(0) // mesh.size())
    padded = mine.new_zeros(rows, *t.shape[1:])
    padded[: mine.size(0)] = mine
    parts = [torch.empty_like(padded) for _ in range(mesh.size())] if dist.get_rank() == owner else None
    dist.gather(padded, parts, dst=owner, group=mesh.get_group())
    return torch.cat(parts)[: t.size(0)].to("cpu", copy=True) if parts else None


def accumulate(model: nn.Module, *, last: bool) -> None:
    """Say whether the next backward is the last of a step; the earlier ones spare what communication they can.

    With ``shard`` 1 they add up gradients on each rank; else a rank has no room for all of them, and only the sum
    over the copies of the model waits for the last.
    """
    root: Any = model
    if not is_wrapped(root):
        return
    if copy_size(next(model.parameters())) == 1:
        root.set_requires_gradient_sync(last)
    else:
        root.set_requires_all_reduce(last)


def settle(model: nn.Module) -> None:
    """After passes without backward: free gathered weights, forget the order of passes."""
    modules = engines(model)
    for root in modules[:1]:
        root.reset_iter_state()
    for module in modules:
        module.reshard()


def forget(model: nn.Module) -> None:
    """After passes that do not count, failed ones included: settle, and clear all gradients.

    Those of gathered weights too, which reset_iter_state leaves: they would be added to the next step's.
    """
    settle(model)
    for module in engines(model):
        module.unshard()
        module.zero_grad()
        module.reshard()
    model.zero_grad()


@contextmanager
def evaluation(model: nn.Module, *, whole: bool) -> Iterator[None]:
    """Around passes without backward; all ranks must come in, and inside make as many passes as one another.

    Where the ``whole`` model fits on each rank, 4 bytes a parameter, it has all weights as plain tensors instead,
    and may use them alone, as often as it likes.
    """
    modules = engines(model)
    for module in modules if whole else []:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not model, recurse=False)
        settle(model)
