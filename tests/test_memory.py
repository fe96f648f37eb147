"""What a step takes, counted on tensors without numbers, against what the CPU's allocator gave out for one."""

import gc
import json

import pytest
import torch
from test_sharding import on_ranks
from torch.profiler import ProfilerActivity, profile

from aymen_gpt.model import cpu
from aymen_gpt.training import memory
from aymen_gpt.training.config import resolve
from aymen_gpt.training.device import Device
from aymen_gpt.training.distributed import Ranks
from aymen_gpt.training.trainer import Trainer

SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 32, "hellaswag_every": None}  # 7M parameters


def config(tokens=256, rows=8, **options):
    return resolve(SHAPE | {"tokens_per_step": tokens, "micro_batch": rows} | options)


def most_given_out(ranks, c, dtype):
    """Bytes that torch's CPU allocator had given out when they were most, up to the last backward."""
    gc.collect()  # what is freed inside was not given out there
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        trainer = Trainer(c, Device(torch.device("cpu"), dtype, "", None), ranks, None, None, "")
        memory.as_on_cuda(trainer)
        list(trainer.try_passes(trainer.micro_batch))
    events = [e for e in watch.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measure(ranks, configs, dtype, folder):
    cpu.logits_room = lambda *_: None  # as on a GPU
    (folder / f"{ranks.rank}").write_text(json.dumps([most_given_out(ranks, c, dtype) for c in configs]))


def counted(c, world, dtype):
    return sum(memory.peak(c, world, dtype).values())


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("world", "shards"), [(2, "12")])
def test_ranks_take_what_was_counted(world, shards, tmp_path):
    """One micro-batch on each rank, then two: the loss takes the most. With few tokens the end of backward does.

    There the embedding's gradient is counted once too often: autograd adds to a real one in place, to a fake not.
    Real runs differ, too: now and then one holds that gradient once more where the loss takes the most.
    """
    many = [
        config(tokens=256 * world * n, recompute="block", shard=s) for n, s in zip((1, 2), shards, strict=False)
    ]
    few = config(tokens=32 * world, shard="2")
    on_ranks(world, measure, [*many, few], torch.bfloat16, tmp_path)
    *most, at_the_end = json.loads((tmp_path / "0").read_text())
    embedding = 4 * few.model.padded_vocab_size * few.n_embd
    for c, measured in zip(many, most, strict=True):
        missing = measured - counted(c, world, torch.bfloat16)
        assert min(abs(missing), abs(missing - embedding)) <= 0.01 * measured
    assert 0 <= counted(few, world, torch.bfloat16) - at_the_end <= embedding


@pytest.mark.parametrize("c", [config(tokens=512), config(recompute="attention"), config(recompute="block")])
def test_one_process_takes_what_was_counted(c, monkeypatch):
    monkeypatch.setattr(cpu, "logits_room", lambda *_: None)
    assert counted(c, 1, torch.bfloat16) == pytest.approx(most_given_out(Ranks(), c, torch.bfloat16), rel=0.01)


def test_from_four_layers_on_each_one_takes_the_same():
    c = config(tokens=2**9, rows=2, n_layer=8, shard="all", recompute="block")
    assert memory.estimate(c, 4, torch.bfloat16) == counted(c, 4, torch.bfloat16)


EVERY = {"shard", "recompute", "micro_batch"}


@pytest.mark.parametrize(
    ("limit", "free", "chosen"),
    [
        (9999, EVERY, "--shard 1 --recompute none --micro-batch 64"),
        (1100, EVERY, "--shard 1 --recompute none --micro-batch 4"),
        (1017, EVERY, "--shard 1 --recompute attention --micro-batch 1"),
        (1014, EVERY, "--shard 1 --recompute block --micro-batch 4"),
        (160, EVERY, "--shard node --recompute none --micro-batch 1"),
        (70, EVERY, "--shard all --recompute block --micro-batch 4"),
        (9999, {"shard", "recompute"}, "--shard 1 --recompute none --micro-batch 8"),
        (9999, EVERY - {"shard"}, "--shard all --recompute none --micro-batch 64"),
    ],
)
def test_the_fastest_setting_that_fits_is_chosen(limit, free, chosen, monkeypatch):
    def peak(c, gpus, dtype):
        copy = {"1": 1, "node": 8, "all": 16}[c.shard]
        row = {"none": 20, "attention": 15, "block": 2}[c.recompute]
        return {"state": 1000 // copy, "activations": c.micro_batch * row}

    monkeypatch.setattr(memory, "peak", peak)
    monkeypatch.setattr(memory, "moments", lambda m, _: -m.n_params)
    c = config(tokens=64 * 32 * 16, shard="all" if "shard" not in free else "1")
    setting, parts, _ = memory.fit(c, 16, torch.bfloat16, limit, free)
    assert memory.in_words(setting) == chosen
    assert sum(parts.values()) <= limit


def test_what_fits_nowhere_is_said_with_its_size(monkeypatch):
    monkeypatch.setattr(memory, "peak", lambda *_: {"all": 3_000_000_000})
    setting, _, tried = memory.fit(config(), 2, torch.bfloat16, 5e7, {"shard"})
    assert setting is None
    assert tried == [
        "--shard 1: weights and moments alone take 0.1 GB",
        "--shard all --recompute none --micro-batch 8 takes 3.00 GB",
    ]
