"""The plan of a run: its arithmetic is that of the real thing, and it allocates and writes nothing."""

import re
from dataclasses import replace

import pytest
import torch

from aymen_gpt.model.gpt import GPT, PRESETS, GPTConfig
from aymen_gpt.training import checkpoint, memory, optim, plan
from aymen_gpt.training.config import resolve
from aymen_gpt.training.distributed import Ranks
from aymen_gpt.training.guard import Guard
from aymen_gpt.training.muon import Muon
from aymen_gpt.wording import duration


@pytest.mark.parametrize("name", PRESETS)
def test_the_parts_add_up_to_the_parameters(name):
    assert sum(plan.parameters(PRESETS[name]).values()) == PRESETS[name].n_params


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_checkpoint_is_as_large_as_was_said(tmp_path, name):
    config = GPTConfig(block_size=64, n_layer=4, n_head=4, n_embd=64)
    model = GPT(config, torch.Generator().manual_seed(0))
    rates = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer = Muon(model, Ranks(), matrix_rate=0.02, **rates) if name == "muon" else optim.adamw(model, **rates)
    optim.start_moments(model, optimizer)
    snapshot = checkpoint.Snapshot(1, 1, 8, {}, {}, Guard().state(), {"step": 1})
    folder = checkpoint.publish(tmp_path, checkpoint.capture(model, optimizer), snapshot, keep_last=2, keep=bool)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert plan.checkpoint_bytes(config, name) == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_activations_are_what_autograd_keeps(dtype):
    m, rows = GPTConfig(block_size=128, n_layer=3, n_head=4, n_embd=64), 2
    model = GPT(m, torch.Generator().manual_seed(0))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(t):
        if t.is_floating_point() and t.untyped_storage().data_ptr() not in weights:  # not the token ids
            kept[t.untyped_storage().data_ptr()] = t  # which also keeps its memory from being used again
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16),
    ):
        model.hidden(torch.zeros(rows, m.block_size, dtype=torch.int64))
    memory = plan.step_memory(m, rows, size=dtype.itemsize, chunk=1024)
    found = sum(t.untyped_storage().nbytes() for t in kept.values())
    assert found == memory["activations"] + memory["copies of weights for products"]
    assert memory["weights, gradients, moments"] == 16 * sum(p.numel() for p in model.parameters())


@pytest.fixture
def planned(call, tmp_path):
    def run(*words):
        done = call("pretrain.py", "--plan", *words)
        assert done.returncode == 0, done.stderr
        assert {path.name for path in tmp_path.iterdir()} <= {"shards"}
        return done.stdout

    return run


def test_the_largest_gpt_is_planned_on_any_machine(planned):
    said = planned("--preset", "gpt3-175b", "--gpus", 1024, "--device", "cpu")
    assert re.search(r"gpt3-175b: 17\d,\d{3},\d{3},\d{3} parameters", said)
    assert re.search(r"memory    1024 x .*micro-batch of 1 row.*of each:", said)
    assert re.search(r"moments +2,794 GB\n", said)
    assert "does not fit into " in said
    assert "time      --probe measures it" in said


@pytest.mark.slow
def test_another_device_is_planned_for_by_its_name(planned):
    words = ["--on", "h100", "--gpus", 8, "--mfu", 0.4, "--dollars-per-gpu-hour", 2.5, "--micro-batch", 64]
    said = planned(*words)
    assert "fits      --shard 1 --recompute none --micro-batch 64\n" in said
    assert "memory    8 x H100, micro-batch of 64 rows, bfloat16, of each:" in said
    assert "            fits into 80 GB\n" in said
    speed = 0.4 * 989e12 / PRESETS["gpt2"].flops_per_token
    seconds = 76_292 * 2**19 / speed / 8
    assert f"{speed:,.0f} tokens/s a device" in said
    assert f"time      {duration(seconds)} on 8 devices" in said
    assert f"cost      {seconds / 3600 * 8 * 2.5:.2f} dollars at 2.5 a device and hour" in said
    said = planned("--on", "h100", "--optimizer", "muon")
    assert "muon      1.63e+12 float32 FLOPs more an update (0.36 %)" in said
    assert re.search(r"gradients, moments +1.65 GB", said)  # 1.99 less a moment of 85M numbers
    small = planned("--preset", "tiny", *words, "--gpus", 1)
    assert re.search(r"time      \d+ s on 1 device\n", small)
    assert "cost      less than 0.01 dollars" in small


@pytest.fixture
def shallow(monkeypatch):
    """Plan as if any model had six layers, which is counted in two seconds."""
    monkeypatch.setitem(PRESETS, "gpt3-6.7b", replace(PRESETS["gpt3-6.7b"], n_layer=6))


@pytest.mark.slow
def test_the_parts_of_a_counted_step_add_up(planned, shallow):
    words = ["--preset", "gpt3-6.7b", "--gpus", 4, "--gpu-memory", 24, "--recompute", "block", "--micro-batch", 2]
    said = planned(*words)
    assert "too much  --shard 1 --recompute block --micro-batch 2 takes " in said
    assert "fits      --shard all --recompute block --micro-batch 2\n" in said
    assert "memory    4 x GPU, micro-batch of 2 rows, bfloat16, of each:" in said
    assert "counted with all 6 layers, in " in said
    parts = dict(re.findall(r"^ {12}(\w[\w ]*?)  +([\d.]+) GB$", said, re.M))
    total = float(parts.pop("all"))
    assert sum(map(float, parts.values())) == pytest.approx(total, abs=0.05)
    assert float(parts["moments"]) == pytest.approx(2 * float(parts["weights"]), abs=0.02)
    assert total < 24


def test_what_no_setting_makes_fit_is_refused(call, shallow):
    done = call("pretrain.py", "--plan", "--preset", "gpt3-6.7b", "--gpus", 2, "--gpu-memory", 4)
    assert done.returncode == 1
    assert "error: gpt3-6.7b does not fit on 2 x 4 GB, --shard all: weights and moments alone take " in done.stderr
    assert "time" not in done.stdout


def test_a_measurement_is_of_this_machine(refused):
    refused(
        2, "--probe measures this machine: leave out --gpu-memory 80", "pretrain.py", "--probe", "--gpu-memory", 80
    )


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "attention", "block"])
def test_the_estimate_of_a_shared_model_is_near_what_is_counted(recompute):
    c = resolve({"preset": "gpt3-6.7b", "shard": "all", "recompute": recompute, "micro_batch": 1})
    assert plan.sharded_memory(c, 8) == pytest.approx(memory.estimate(c, 8, torch.bfloat16), rel=0.1)


@pytest.mark.parametrize(
    ("preset", "gpus", "shard"),
    [("gpt2", 8, 1), ("gpt3-2.7b", 64, 1), ("gpt3-13b", 64, 8), ("gpt3-175b", 256, 256), ("gpt3-13b", 12, 12)],
)
def test_a_model_is_shared_by_as_few_gpus_as_hold_it(preset, gpus, shard):
    assert plan.smallest_shard(resolve({"preset": preset, "recompute": "block"}), gpus, 8, 80e9) == shard


def test_the_micro_batch_of_a_plan_is_one_that_fits(planned):
    said = planned("--preset", "gpt2-xl", "--on", "a10g")  # 24 GB, and 25 for the weights and the optimizer
    assert "micro-batch of 1 row" in said
    assert "does not fit into 24 GB" in said
    said = planned("--preset", "gpt2-large", "--on", "a10g")
    rows = int(re.search(r"micro-batch of (\d+) rows", said)[1])
    assert 1 < rows < 64
    assert "fits into 24 GB" in said


def test_a_plan_doubts_what_the_training_would(planned, shards):
    said = planned("--preset", "tiny", "--data", shards, "--steps", 99_999, "--warmup-steps", 10**6)
    assert "warning: --warmup-steps 1,000,000 is more than --steps 99,999" in said
    assert f"a run that suits them: python pretrain.py --preset demo --data {shards} --steps 310\n" in said


def test_hours_and_dollars_follow_from_the_speed(planned):
    words = ["--preset", "tiny", "--steps", 1000, "--gpus", 2, "--probe", "--dollars-per-gpu-hour", 3600]
    said = planned(*words)
    speed = int(re.search(r"AdamW: ([\d,]+) tokens/s a device", said)[1].replace(",", ""))
    cost = float(re.search(r"cost      ([\d,.]+) dollars at 3600 a device", said)[1].replace(",", ""))
    assert cost == pytest.approx(1000 * 512 / speed, rel=0.02)
