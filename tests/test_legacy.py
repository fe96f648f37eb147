"""Checkpoints of nanoGPT and its kin come in with their weights, and with nothing that runs."""

import os
import pickle
import sys
import types
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import make_shards

from aymen_gpt.__main__ import command
from aymen_gpt.errors import DataError, UsageError
from aymen_gpt.model.gpt import GPT, GPTConfig
from aymen_gpt.model.legacy import load_pt

CONFIG = GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=16)


def theirs(model, rows=50304, prefix="_orig_mod."):
    """The model's weights by the names that nanoGPT gives them."""
    state = {f"{prefix}transformer.{name}": t.clone() for name, t in model.state_dict().items()}
    for name in [name for name in state if name.endswith("wte.weight")]:
        state[name] = state[name][:rows]
        state[f"{prefix}lm_head.weight"] = state[name]
    return state


@pytest.fixture
def seed_file(tmp_path, monkeypatch):
    """As build-nanogpt and the first version write it: with a pickled GPTConfig of the script that wrote it."""
    model = GPT(CONFIG, torch.Generator().manual_seed(1))
    module = types.ModuleType("pretrain_of_somebody")
    module.GPTConfig = type("GPTConfig", (), {"__module__": "pretrain_of_somebody"})
    config = module.GPTConfig()
    config.__dict__.update(block_size=16, vocab_size=50304, n_layer=2, n_head=2, n_embd=16)
    path = tmp_path / "model_19072.pt"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pretrain_of_somebody", module)
        torch.save({"model": theirs(model), "config": config, "step": 19072, "val_loss": 3.07}, path)
    return path, model


def same_logits(one, other):
    idx = torch.arange(16)[None]
    return torch.equal(one(idx), other(idx))


@pytest.mark.fault(20)
def test_a_checkpoint_with_a_pickled_config_gives_its_weights(seed_file):
    path, model = seed_file
    assert same_logits(load_pt(path), model)


@pytest.mark.slow
@pytest.mark.fault(20)
def test_it_can_be_trained_on_but_brings_no_optimizer(door, tmp_path, seed_file):
    path, _ = seed_file
    make_shards(tmp_path / "data")
    words = f"--preset tiny --data {tmp_path}/data --steps 2 --init-from {path} --run-dir {tmp_path}/run".split()
    with pytest.raises(UsageError, match="--init-from .*pt has 2 layers, .* 16 tokens of context; this run has "):
        command("pretrain", words)
    fits = GPT(GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=32), torch.Generator().manual_seed(3))
    torch.save({"model": theirs(fits), "model_args": {"n_head": 2}}, path)
    done = door("pretrain.py", *words, "--dtype", "float32", "--learning-rate", "1e-9", "--hellaswag-every", 0)
    assert done.returncode == 0, done.stderr
    assert "no optimizer state" in done.stderr


@pytest.mark.fault(19)
@pytest.mark.parametrize("door", ["hellaswag", "generate"])
def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(tmp_path, monkeypatch, door):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/was-run",)

    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"x": torch.zeros(1)}, "config": Evil()}, "evil.pt")
    Path("raw.pt").write_bytes(pickle.dumps(Evil()))
    for name, message in (("evil.pt", "asks to import posix.system: refused"), ("raw.pt", "cannot be read")):
        with pytest.raises(DataError, match=f"^{name} {message}"):
            command(door, ["-m", name])
    assert not Path("was-run").exists()


def save(tmp_path, state, n_head=2):
    torch.save({"model": state, "model_args": {"n_head": n_head}}, tmp_path / "x.pt")
    return tmp_path / "x.pt"


@pytest.mark.parametrize(
    "content",
    [
        {"weights": 1},
        [1, 2],
        {"model": 5, "model_args": {"n_head": 2}},
        {"model": {}, "model_args": [2]},
        {"model": {}},
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(DataError, match=r"x\.pt is no checkpoint of nanoGPT"):
        load_pt(tmp_path / "x.pt")


@pytest.mark.fault(51)
@pytest.mark.parametrize(
    ("change", "n_head", "message"),
    [
        ({}, 3, "n_embd 16 does not divide into n_head 3"),
        ({}, 0, "every size of a GPT must be at least 1"),
        ({}, "2", "checkpoint of nanoGPT"),
        ({"wte.weight": torch.zeros(5)}, 2, "wte.weight and wpe.weight are not two matrices"),
        ({"wte.weight": 5}, 2, "wte.weight is no tensor"),
        ({"wte.weight": torch.ones(50304, 16)}, 2, "lm_head.weight differs"),
        (
            {name: torch.ones(60000, 16) for name in ("wte.weight", "lm_head.weight")},
            2,
            r"wte.weight has the shape \(60000, 16\)",
        ),
        ({"h.1.ln_1.weight": torch.tensor(1.0)}, 2, "size mismatch for h.1.ln_1.weight"),
        ({"h": torch.zeros(1), 7: torch.zeros(1)}, 2, "Unexpected key"),
        ({"h.1.attn.c_attn.bias": torch.zeros(48, dtype=torch.int8)}, 2, "holds torch.int8"),
        ({"h.x.ln_1.bias": torch.zeros(16)}, 2, "Missing key"),
        ({"h.0.mlp.c_fc.bias": None}, 2, "Missing key.*h.0.mlp.c_fc.bias"),
    ],
)
def test_what_is_no_gpt2_is_named(tmp_path, change, n_head, message):
    state = theirs(GPT(CONFIG, torch.Generator().manual_seed(2)), prefix="") | {
        name if name in ("h", 7, "lm_head.weight") else f"transformer.{name}": value
        for name, value in change.items()
    }
    state = {name: t for name, t in state.items() if t is not None}
    with pytest.raises(DataError, match=rf"x\.pt is no .*{message}"):
        load_pt(save(tmp_path, state, n_head))


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt_gives_its_weights_and_no_biases_are_biases_of_zero(tmp_path, bias):
    model = GPT(CONFIG, torch.Generator().manual_seed(2))
    state = theirs(model, 50257, "")
    if not bias:  # its default
        state = {name: t for name, t in state.items() if not name.endswith(".bias")}
    assert same_logits(load_pt(save(tmp_path, state)), model)


@pytest.mark.fault(51)
def test_any_flipped_bit_is_noticed(tmp_path):
    config = GPTConfig(block_size=2, vocab_size=4, n_layer=1, n_head=1, n_embd=1)
    path = save(tmp_path, theirs(GPT(config, torch.Generator().manual_seed(2)), rows=4), 1)
    good = load_pt(path).state_dict()
    content = path.read_bytes()
    for place in range(0, len(content), 23):
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        with suppress(DataError):  # what else is raised is a traceback for the user
            found = load_pt(path).state_dict()  # a bit that nobody reads, such as a file's time
            assert all(torch.equal(t, good[name]) for name, t in found.items())
