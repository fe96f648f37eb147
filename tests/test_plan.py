"""The plan of a run: its arithmetic is that of the real thing, and it allocates and writes nothing."""

import re

import pytest
import torch

from aymen_gpt.model.gpt import GPT, PRESETS, GPTConfig
from aymen_gpt.training import checkpoint, optim, plan
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


def test_another_device_is_planned_for_by_its_name(planned):
    words = ["--on", "h100", "--gpus", 8, "--mfu", 0.4, "--dollars-per-gpu-hour", 2.5]
    said = planned(*words)
    assert "memory    8 x H100, micro-batch of 64 rows, bfloat16, of each:" in said
    assert "            fits into 80 GB\n" in said
    speed = 0.4 * 989e12 / PRESETS["gpt2"].flops_per_token
    seconds = 76_292 * 2**19 / speed / 8
    assert f"{speed:,.0f} tokens/s a device" in said
    assert f"time      {duration(seconds)} on 8 devices" in said
    assert f"cost      {seconds / 3600 * 8 * 2.5:.2f} dollars at 2.5 a device and hour" in said
    said = planned(*words, "--optimizer", "muon")
    assert "muon      1.63e+12 float32 FLOPs more an update (0.36 %)" in said
    assert re.search(r"gradients, moments +1.65 GB", said)  # 1.99 less a moment of 85M numbers
    small = planned("--preset", "tiny", *words, "--gpus", 1)
    assert re.search(r"time      \d+ s on 1 device\n", small)
    assert "cost      less than 0.01 dollars" in small


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
