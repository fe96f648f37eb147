"""One model on several ranks, whole on each or in parts: the same losses, files and bits."""

import json
import os
import socket
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing
from conftest import make_shards
from questions import EXAMPLES
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import rows
from transformers import GPT2LMHeadModel

from aymen_gpt.commands import pretrain
from aymen_gpt.commands.pretrain import build
from aymen_gpt.data import tokenizer
from aymen_gpt.errors import AymenError, Stopped, UsageError
from aymen_gpt.evaluation import scoring
from aymen_gpt.model import folders
from aymen_gpt.model.folders import checkpoints, problem
from aymen_gpt.model.gpt import GPT
from aymen_gpt.model.huggingface import load_pretrained
from aymen_gpt.training import checkpoint, sharding, tensor_files
from aymen_gpt.training import device as devices
from aymen_gpt.training.config import resolve
from aymen_gpt.training.device import choose_device
from aymen_gpt.training.distributed import Ranks, process_group
from aymen_gpt.training.runlog import RunLog
from aymen_gpt.training.trainer import Trainer

CPU = choose_device("cpu", "float32")
SMALL = {"preset": "tiny", "block_size": 16, "tokens_per_step": 8 * 16, "val_tokens": 80, "micro_batch": 2}
SMALL |= {"steps": 6, "val_every": 2, "checkpoint_every": 3, "hellaswag_every": 2, "n_layer": 3}
MORE = [pytest.param(n, shards, marks=pytest.mark.long) for n, shards in ((2, (1,)), (3, (1, 3)), (4, (2, 4)))]
GRIDS = [(2, (2,)), *MORE]  # processes, and how many of them share a model


class Stop:
    name, requested = "SIGTERM", False


class StopAt(Stop):
    def __init__(self, step):
        self.left = step

    @property
    def requested(self):
        self.left -= 1
        return self.left == 0


def train(ranks, data, run, stop=None, **options):
    t = build(resolve(SMALL | {"data": str(data)} | options | {"hellaswag_every": None}), CPU, ranks)
    t.config = resolve(SMALL | {"data": str(data)} | options)
    t.score = lambda model: score(model, ranks)
    if ranks.is_first:
        with RunLog(run, t.config.steps) as log:
            t.fit(run, log, stop or Stop(), dict)
    else:
        t.fit(run, None, stop or Stop(), dict)
    return t


def score(model, ranks):
    """Every rank makes as many passes as it likes: here one more than the rank before."""
    for _ in range(ranks.rank + 1):
        model.logits(model.hidden(torch.ones(1, 4, dtype=torch.int64)))
    ranks.gather(0)
    return {"completion": {"acc_norm": 0.25, "acc_norm_stderr": 0.01}}


def in_process(rank, world, port, work, arguments):
    torch.set_num_threads(1)
    tokenizer.write_huggingface_files = lambda *_, **__: None
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = Ranks(rank, world, rank, world)
    with process_group(ranks, torch.device("cpu"), 60):
        work(ranks, *arguments)


def on_ranks(world, work, *arguments):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(in_process, (world, port, work, arguments), nprocs=world)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """A run of one process, in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "write_huggingface_files", lambda *_, **__: None)
        train(Ranks(), data, run := tmp_path_factory.mktemp("alone") / "run")
    return run


def numbers(run):
    return [[row.get(key, 0.0) for key in ("loss", "val_loss", "grad_norm")] for row in rows(run)]


def assert_the_same_curve(run, other):
    """Norms to a thousandth: torch adds up the squares of a million numbers one after the other, in float32."""
    for (*losses, norm), (*others, norm_too) in zip(numbers(run), numbers(other), strict=True):
        assert losses == pytest.approx(others, abs=1e-5)
        assert norm == pytest.approx(norm_too, rel=1e-3)


def tensors(run):
    found = checkpoints(run)[0].glob("*.safetensors")
    return {name: t for file in found for name, t in load_file(file).items()}


def whole_and_in_two_parts(ranks, data, folder, shards, options):
    for shard in shards:
        options = options | {"shard": str(shard)}
        train(ranks, data, folder / f"{shard}" / "whole", **options)
        with pytest.raises(Stopped):
            train(ranks, data, folder / f"{shard}" / "parts", StopAt(3), **options)
        train(ranks, data, folder / f"{shard}" / "parts", **options)


def assert_the_parts_are_the_whole(folder):
    parts, whole = folder / "parts", folder / "whole"
    assert numbers(parts) == numbers(whole)
    parts, whole = tensors(parts), tensors(whole)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.fault(11)
@pytest.mark.parametrize(("world", "shards"), GRIDS)
def test_any_grid_of_ranks_learns_the_same_and_repeats_itself_bit_for_bit(world, shards, data, alone, tmp_path):
    """Eight rows do not divide by three ranks, and five validation rows by none; ranks score unlike often."""
    options = {"micro_batch": None} if world == 2 else {}  # then a pass that does not count comes first
    on_ranks(world, whole_and_in_two_parts, data, tmp_path, shards, options)
    for shard in shards:
        assert_the_same_curve(tmp_path / f"{shard}" / "whole", alone)
        assert_the_parts_are_the_whole(tmp_path / f"{shard}")


@pytest.mark.slow
@pytest.mark.long
def test_muon_and_recomputed_blocks_learn_the_same(data, tmp_path):
    options = {"optimizer": "muon", "steps": 4}
    on_ranks(3, whole_and_in_two_parts, data, tmp_path, (3,), options | {"recompute": "block"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "write_huggingface_files", lambda *_, **__: None)
        train(Ranks(), data, tmp_path / "alone", **options)
    assert_the_same_curve(tmp_path / "3" / "whole", tmp_path / "alone")
    assert_the_parts_are_the_whole(tmp_path / "3")


def overflowing(predict):
    """In half precision: then all ranks make the pass again in float32."""

    def call(predictor, *args, **options):
        log_p, hits = predict(predictor, *args, **options)
        return (log_p * np.nan if predictor.dtype != torch.float32 else log_p), hits

    return call


def score_and_sample(ranks, data, folder, whole):
    """What the first rank logs after step 6, from untrained weights, with three questions and with one."""
    logged, options = [], {"data": str(data), "shard": str(ranks.world_size), "compile": True}
    compiled = counters["stats"].copy()
    for count, device in (3, CPU), (1, CPU), (1, choose_device("cpu", "bfloat16")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pretrain, "load_examples", lambda n=count: EXAMPLES[:n])
            t = build(resolve(SMALL | options), device, ranks)
            t.can_be_whole = whole
            if ranks.rank == 1 and device is not CPU:
                patch.setattr(scoring.Predictor, "__call__", overflowing(scoring.Predictor.__call__))
            log = SimpleNamespace(write=lambda row, samples: logged.append([row, samples[:1], len(samples)]))
            t.report(log if ranks.is_first else None, {"step": 6, "val_loss": 0.0})
    assert counters["stats"] == compiled  # nothing more, for shapes that come once
    if ranks.is_first:
        (folder / f"{ranks.world_size}").write_text(json.dumps(logged))


@pytest.mark.slow
def test_ranks_that_cannot_hold_the_whole_model_score_and_sample_it_together(data, tmp_path):
    """One rank has two questions and the other one, or none; then numbers overflow on the latter."""
    score_and_sample(Ranks(), data, tmp_path, True)
    on_ranks(2, score_and_sample, data, tmp_path, False)
    for alone, together in zip(*(json.loads((tmp_path / n).read_text()) for n in "12"), strict=True):
        assert together == [*alone[:2], 1]


def copy_checkpoint(ranks, data, source, run, options):
    """Read a checkpoint and write it again, in files of at most 60 kB."""
    t = build(resolve(SMALL | {"data": str(data), "hellaswag_every": None} | options), CPU, ranks)
    checkpoint.restore(source, t.model, t.optimizer, ranks)
    captured = checkpoint.capture(t.model, t.optimizer, ranks, limit=60_000)
    held = sum(sharding.local(p).numel() for p in t.model.parameters())
    assert held <= 1.2 * sum(p.numel() for p in t.model.parameters()) / int(options.get("shard", 1))
    if ranks.rank < captured.writers.count:
        checkpoint.publish(run, captured, checkpoint.read_snapshot(source), keep_last=2)
    if ranks.rank == 0 and captured.writers.count > 1:
        folders.sha256 = None  # the first rank does not read again what the others have hashed
        assert problem(checkpoints(run)[0], remember=True) is None


@pytest.mark.slow
def test_a_checkpoint_is_the_same_bytes_from_any_grid_and_transformers_reads_its_parts(data, alone, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "write_huggingface_files", lambda *_, **__: None)
        copy_checkpoint(Ranks(), data, checkpoints(alone)[0], tmp_path / "1", {})
    expected = {p.name: p.read_bytes() for p in checkpoints(tmp_path / "1")[0].iterdir()}
    parts = [name for name in expected if name.startswith("model-0")]
    assert len(parts) >= 3
    assert sum(name.startswith("optimizer-0") for name in expected) >= 5
    for world, shard in [(4, 2)]:
        run = tmp_path / f"{world} {shard}"
        on_ranks(world, copy_checkpoint, data, checkpoints(alone)[0], run, {"shard": str(shard)})
        assert {p.name: p.read_bytes() for p in checkpoints(run)[0].iterdir()} == expected
    folder, tokens = checkpoints(tmp_path / "1")[0], torch.arange(16)[None]
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(load_pretrained(folder)(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    on_ranks(2, copy_checkpoint, data, folder, tmp_path / "again", {"shard": "2"})  # reads the parts too
    assert {p.name: p.read_bytes() for p in checkpoints(tmp_path / "again")[0].iterdir()} == expected
    (folder / parts[1]).write_bytes(b"damaged")
    assert problem(folder).startswith(f"{parts[1]} is 7 bytes, its manifest says")
    (folder / parts[1]).unlink()
    assert problem(folder) == f"{parts[1]} is missing"


def save_while_one_cannot(ranks, data, run):
    t = build(resolve(SMALL | {"data": str(data), "hellaswag_every": None, "shard": "2"}), CPU, ranks)
    captured = checkpoint.capture(t.model, t.optimizer, ranks, limit=60_000)
    if ranks.rank == 1:
        tensor_files.save_file = lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    with pytest.raises(AymenError, match="No space left on device"):
        checkpoint.publish(run, captured, t.snapshot({"step": 0}), keep_last=2)


def test_a_checkpoint_of_which_a_rank_cannot_write_its_part_does_not_count(data, tmp_path):
    on_ranks(2, save_while_one_cannot, data, tmp_path)
    assert checkpoints(tmp_path) == []


@pytest.mark.fault(7, 8)
def test_a_rank_that_dies_or_hangs_while_it_writes_is_not_waited_for(data, tmp_path, monkeypatch):
    t = build(resolve(SMALL | {"data": str(data), "hellaswag_every": None}), CPU, Ranks())
    ranks = Ranks(0, 2, timeout=0.1)
    captured = replace(checkpoint.capture(t.model, t.optimizer), writers=tensor_files.Writers(ranks, 2))
    monkeypatch.setattr(checkpoint, "capture", lambda *_: captured)
    with checkpoint.Saver(tmp_path, print, 2, bool, ranks) as saver:
        saver.start(t.model, t.optimizer, t.snapshot({"step": 0}))
    assert "rank 1 did not write its part" in str(saver.error)
    assert checkpoints(tmp_path) == []


class Collectives(TorchDispatchMode):
    """How many numbers each collective call takes from a rank, by the kind of the collective."""

    def __init__(self):
        super().__init__()
        self.numbers = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace in ("c10d", "_c10d_functional") and "wait" not in op.__name__:
            given = [t.numel() for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.numbers.setdefault(op.__name__.partition(".")[0], []).append(max(given))
        return op(*args, **(kwargs or {}))


def count_collectives(ranks, data, folder):
    found = {}
    for shard in (1, 2):
        t = build(resolve(SMALL | {"data": str(data), "hellaswag_every": None, "shard": str(shard)}), CPU, ranks)
        batches = t.batches_of(0)
        assert len(batches) == 2
        with Collectives() as counted:
            t.train_step(0, batches)
        found[shard] = counted.numbers
    if ranks.is_first:
        (folder / "counts.json").write_text(json.dumps(found))


def test_whole_models_exchange_gradients_once_a_step_and_nothing_else(data, tmp_path):
    on_ranks(2, count_collectives, data, tmp_path)
    alone, together = json.loads((tmp_path / "counts.json").read_text()).values()
    n_params = sum(p.numel() for p in GPT(resolve(SMALL).model).parameters())
    assert alone.keys() == {"allreduce_"}
    assert sorted(alone["allreduce_"])[0] == 2  # the loss and the norm
    assert sum(alone["allreduce_"]) == n_params + 2
    assert sum(together["_reduce_scatter_base_"]) == 2 * n_params  # two micro-batches
    assert n_params < sum(together["_allgather_base_"]) <= 4 * n_params  # forward and backward of each


def test_initial_weights_are_those_of_one_process(data):
    whole = GPT(resolve(SMALL).model, torch.Generator().manual_seed(1337))
    with torch.device("meta"):
        model = GPT(whole.config)
    sharding.draw(model, torch.Generator().manual_seed(1337), torch.device("cpu"))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("auto", 1),
        ("1", 1),
        ("2", 2),
        ("node", 3),
        ("all", 6),
        ("4", "4: 6 processes do not divide"),
        ("0", "0: expected auto, a number"),
        ("some", "some: expected auto, a number of processes, node or all"),
    ],
)
def test_shard_is_a_number_of_processes_that_divides_them(option, expected):
    ranks = Ranks(0, 6, 0, 3)
    if isinstance(expected, int):
        assert sharding.shard_size(option, ranks) == expected
    else:
        with pytest.raises(UsageError, match=f"--shard {expected}"):
            sharding.shard_size(option, ranks)


def test_a_model_that_fits_on_no_gpu_is_shared_without_being_asked_to(monkeypatch):
    """As far as a machine without a GPU can tell: what is decided before the model is there."""

    class Decided(Exception):
        pass

    def new_model(shape, seed, size, *_):
        raise Decided(size)

    monkeypatch.setattr(sharding, "new_model", new_model)
    monkeypatch.setattr(Ranks, "gather", lambda ranks, value: [1, value])  # another one has more memory
    monkeypatch.setattr(devices, "memory_there", lambda device: 80.0)
    cuda, c = (
        devices.device_elsewhere("h100", "auto")[0],
        {"preset": "gpt3-13b", "recompute": "block", "hellaswag_every": None},
    )
    for options, device, shard in (
        ({}, cuda, 8),
        ({"preset": "gpt2"}, cuda, 1),
        ({"shard": "2"}, cuda, 2),
        ({}, CPU, 1),
    ):
        with pytest.raises(Decided, match=f"^{shard}$"):
            Trainer(resolve(c | options), device, Ranks(0, 16, 0, 8), None, None, "")
