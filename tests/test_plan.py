"""The plan of a run: its arithmetic is that of the real thing, and it allocates and writes nothing."""

import re

import pytest
import torch

from aymen_gpt.model.gpt import GPT, PRESETS, GPTConfig
from aymen_gpt.training import checkpoint, optim, plan


@pytest.mark.parametrize("name", PRESETS)
def test_the_parts_add_up_to_the_parameters(name):
    assert sum(plan.parameters(PRESETS[name]).values()) == PRESETS[name].n_params


@pytest.mark.parametrize(
    ("rows", "gpus", "micro_batch", "expected"),
    [(512, 1, 64, (64, 8)), (512, 8, 64, (64, 1)), (512, 3, 64, (64, 3)), (4, 1, 16, (4, 1)), (9, 2, 2, (2, 3))],
)
def test_rows_are_dealt_as_the_trainer_deals_them(rows, gpus, micro_batch, expected):
    assert plan.dealt(rows, gpus, micro_batch) == expected


def test_a_checkpoint_is_as_large_as_was_said(tmp_path):
    config = GPTConfig(block_size=64, n_layer=4, n_head=4, n_embd=64)
    model = GPT(config, torch.Generator().manual_seed(0))
    optimizer = optim.adamw(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    optim.start_moments(model, optimizer)
    snapshot = checkpoint.Snapshot(1, 1, 8, {}, {}, {}, {})
    folder = checkpoint.publish(tmp_path, checkpoint.capture(model, optimizer), snapshot, keep_last=2)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert plan.checkpoint_bytes(config) == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [4, 12])
def test_the_memory_is_within_15_percent_of_what_a_process_takes(door, dtype, rows):
    words = ["--preset", "demo", "--dtype", dtype, "--micro-batch", rows, "--tokens-per-step", 256 * rows]
    done = door("pretrain.py", *words, "--plan", "--probe", OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    measured, predicted = re.search(r"memory ([\d.]+) GB at the most, predicted ([\d.]+) GB", done.stdout).groups()
    assert float(predicted) == pytest.approx(float(measured), rel=0.15)


def test_the_largest_gpt_is_planned_on_any_machine_and_nothing_is_written(door, tmp_path):
    words = ["pretrain.py", "--preset", "gpt3-175b", "--plan", "--gpus", 1024, "--device", "cpu"]
    done = door(*words, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.search(r"gpt3-175b: 17\d,\d{3},\d{3},\d{3} parameters", done.stdout)
    assert re.search(r"memory    1024 x .*of each:", done.stdout)
    assert "time      --probe measures it" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_hours_and_dollars_follow_from_the_speed(door, tmp_path):
    words = ["--preset", "tiny", "--steps", 1000, "--gpus", 2, "--plan", "--probe", "--dollars-per-gpu-hour", 3600]
    done = door("pretrain.py", *words)
    assert done.returncode == 0, done.stderr
    speed = int(re.search(r"AdamW: ([\d,]+) tokens/s a device", done.stdout)[1].replace(",", ""))
    cost = int(re.search(r"cost      ([\d,]+) dollars at 3600 a device and hour", done.stdout)[1].replace(",", ""))
    assert cost == pytest.approx(1000 * 512 / speed, rel=0.02, abs=1)
    assert list(tmp_path.iterdir()) == []
