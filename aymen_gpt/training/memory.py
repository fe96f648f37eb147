"""Memory of one GPU of many, counted where there is none: a step of the real code on tensors without numbers.

Under PyTorch's FakeTensorMode a tensor has a shape and nothing else, a process group of the kind "fake" sends
nothing, and FSDPMemTracker adds up the tensors that are alive. It sees neither what a GPU's allocator, NCCL and
CUDA take beside them nor what torch.compile saves: most of the logits' copies, and a part of the activations.
https://github.com/pytorch/pytorch/tree/v2.13.0/torch/distributed/_tools
"""

from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from aymen_gpt.model.loss import default_chunk, linear_cross_entropy
from aymen_gpt.training.config import RECOMPUTE, TrainConfig
from aymen_gpt.training.device import Device
from aymen_gpt.training.distributed import Ranks
from aymen_gpt.training.muon import Muon
from aymen_gpt.training.plan import FLOAT, moments
from aymen_gpt.training.sharding import shard_size
from aymen_gpt.training.trainer import Trainer

NODE = 8  # GPUs of one machine, for --shard node
FEW, MORE = 4, 6  # layers: from here on, each layer more takes as much as the one before it
PARTS = {  # the tracker's words, of one process and of many -> ours
    "weights": ("Parameter", "Sharded Param"),
    "gradients": ("Gradient", "Sharded Grad", "Unsharded Grad"),
    "moments": ("Optstate", "OptState"),
    "activations": ("Activation",),
    "gathered layers": ("Unsharded Param", "All Gather", "Reduce Scatter"),
}


def peak(c: TrainConfig, gpus: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the tensors of the first of ``gpus`` GPUs when they are most, by part.

    A step is forward and backward of a micro-batch, or of two where there are more, for the second one has the
    first one's gradients beside it. AdamW's fused kernel takes nothing more; Muon's update is counted.
    """
    with nobody(gpus), FakeTensorMode(allow_non_fake_inputs=True):
        device = Device(torch.device("cpu"), dtype, "", None)
        t = Trainer(replace(c, hellaswag_every=None, compile=False), device, first_of(gpus), None, None, "")  # type: ignore[arg-type]
        as_on_cuda(t)
        tracker = FSDPMemTracker(t.model, t.optimizer) if gpus > 1 else MemTracker()
        tracker.track_external(t.model, t.optimizer)
        with tracker:
            for _ in t.try_passes(t.micro_batch):
                tracker.reset_mod_stats()
            if isinstance(t.optimizer, Muon):
                t.optimizer.adamw.param_groups.clear()
                t.optimizer.step()
            (of_device,) = tracker.get_tracker_snapshot("peak").values()
            of_device.pop("Total")
    names: Any = {word: part for part, words in PARTS.items() for word in words}
    parts: Counter[str] = Counter()
    for kind, size in of_device.items():
        parts[names.get(getattr(kind, "value", kind), "temporary tensors")] += size
    moved = {"moments": "moments, Muon's update"} if c.optimizer == "muon" else {}
    return {moved.get(part, part): parts[part] for part in (*PARTS, "temporary tensors")}


def first_of(gpus: int) -> Ranks:
    return Ranks(0, gpus, 0, min(gpus, NODE))


@contextmanager
def nobody(gpus: int) -> Iterator[None]:
    """A process group of so many ranks, of which only the first one is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        yield
    finally:
        dist.destroy_process_group()


def as_on_cuda(t: Trainer) -> None:
    """Let a trainer on the CPU compute as on a GPU, where it was not compiled."""
    t.model.wte.sparse = False
    t.head = partial(linear_cross_entropy, chunk_tokens=default_chunk("cuda"))


def estimate(c: TrainConfig, gpus: int, dtype: torch.dtype) -> int:
    """Bytes of all parts, for a deep model by those of two shallow ones, in seconds."""
    if c.n_layer <= MORE:
        return sum(peak(c, gpus, dtype).values())
    few, more = (sum(peak(replace(c, n_layer=n), gpus, dtype).values()) for n in (FEW, MORE))
    return few + (more - few) * (c.n_layer - FEW) // (MORE - FEW)


def choices(c: TrainConfig, gpus: int, free: set[str]) -> Iterator[list[TrainConfig]]:
    """The settings of a run, but only the ``free`` options vary; each list has the micro-batches, smallest first.

    First comes what is fastest: the fewest GPUs for a copy of the model, and nothing computed twice.
    """
    sizes = [2**n for n in range(7) if 2**n < 2 * c.rows_per_step / gpus]
    node = ["node"] * (gpus > NODE and gpus % NODE == 0)
    for shard in ["1", *node, *["all"] * (gpus > 1)] if "shard" in free else [c.shard]:
        for recompute in RECOMPUTE if "recompute" in free else [c.recompute]:
            setting = replace(c, shard=shard, recompute=recompute)
            yield [replace(setting, micro_batch=size) for size in sizes] if "micro_batch" in free else [setting]


def in_words(c: TrainConfig) -> str:
    return f"--shard {c.shard} --recompute {c.recompute} --micro-batch {c.micro_batch}"


def fit(
    c: TrainConfig, gpus: int, dtype: torch.dtype, limit: float, free: set[str]
) -> tuple[TrainConfig | None, dict[str, int], list[str]]:
    """The fastest setting, if any, whose peak is at most ``limit`` bytes, that peak, and what is too much."""
    tried: list[str] = []
    for configs in choices(c, gpus, free):
        smallest = configs[0]
        copy = shard_size(smallest.shard, first_of(gpus))
        least = FLOAT * (c.model.n_params + moments(c.model, c.optimizer)) / copy
        if least > limit:
            said = f"--shard {smallest.shard}: weights and moments alone take {least / 1e9:,.1f} GB"
            tried += [said] * (said not in tried)
            continue
        of = lru_cache(partial(estimate, gpus=gpus, dtype=dtype))
        fitting = bisect(configs, limit, key=of)
        for setting in reversed(configs[:fitting]):
            parts = peak(setting, gpus, dtype)
            if sum(parts.values()) <= limit:
                return setting, parts, tried
        tried.append(f"{in_words(smallest)} takes {of(smallest) / 1e9:,.2f} GB")
    return None, {}, tried
