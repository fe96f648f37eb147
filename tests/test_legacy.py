"""Checkpoints of nanoGPT and its kin come in with their weights, and with nothing that runs."""

import os
import pickle
import re

import pytest
import torch
from conftest import make_shards

from aymen_gpt.errors import DataError
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
def seed_file(tmp_path):
    """As build-nanogpt and the first version write it: with a pickled GPTConfig of the script that wrote it."""
    model = GPT(CONFIG, torch.Generator().manual_seed(1))
    script = type("GPTConfig", (), {"__module__": "pretrain_of_somebody"})
    config = script()
    config.__dict__.update(block_size=16, vocab_size=50304, n_layer=2, n_head=2, n_embd=16)
    path = tmp_path / "model_19072.pt"
    import sys
    import types

    module = types.ModuleType("pretrain_of_somebody")
    module.GPTConfig = script
    sys.modules["pretrain_of_somebody"] = module
    torch.save({"model": theirs(model), "config": config, "step": 19072, "val_loss": 3.07}, path)
    del sys.modules["pretrain_of_somebody"]
    return path, model


def same_logits(one, other):
    idx = torch.arange(16)[None]
    return torch.equal(one(idx), other(idx))


@pytest.mark.fault(20)
def test_a_checkpoint_with_a_pickled_config_gives_its_weights(seed_file):
    path, model = seed_file
    assert same_logits(load_pt(path), model)


def test_a_checkpoint_of_nanogpt_gives_its_weights(tmp_path):
    model = GPT(CONFIG, torch.Generator().manual_seed(2))
    args = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "bias": True, "vocab_size": 50257}
    path = tmp_path / "ckpt.pt"
    content = {"model": theirs(model, 50257, ""), "optimizer": {"state": {}}, "model_args": args, "iter_num": 5}
    torch.save(content, path)
    assert same_logits(load_pt(path), model)


@pytest.mark.fault(20)
def test_it_can_be_trained_on_but_brings_no_optimizer(door, tmp_path, seed_file):
    path, _ = seed_file
    make_shards(tmp_path / "data")
    words = ["pretrain.py", "--preset", "tiny", "--data", "data", "--steps", 2, "--init-from", path]
    refused = door(*words)
    assert refused.returncode == 2
    assert re.search(
        r"--init-from .*pt is GPTConfig\(block_size=16.*this run is GPTConfig\(block_size=64", refused.stderr
    )
    fits = GPT(GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=32), torch.Generator().manual_seed(3))
    torch.save({"model": theirs(fits), "model_args": {"n_head": 2}}, path)
    done = door(*words, "--dtype", "float32", "--learning-rate", "1e-9", "--hellaswag-every", 0)
    assert done.returncode == 0, done.stderr
    assert "no optimizer state" in done.stderr


@pytest.mark.fault(19)
@pytest.mark.parametrize("command", ["hellaswag.py", "generate.py"])
def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(door, tmp_path, command):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/was-run",)

    torch.save({"model": {"x": torch.zeros(1)}, "config": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Evil()))
    for name, message in (
        ("evil.pt", "asks to import posix.system: refused"),
        ("raw.pt", "raw.pt cannot be read"),
    ):
        done = door(command, "-m", name, *(["Hello"] if command == "generate.py" else ["--limit", 1]))
        assert done.returncode == 65, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("content", [{"weights": 1}, {"model": {}, "model_args": {"n_head": 2}}, [1, 2]])
def test_what_is_no_gpt_is_named(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(DataError, match=r"x\.pt is no"):
        load_pt(tmp_path / "x.pt")


def test_a_model_without_biases_is_refused(tmp_path):
    model = GPT(CONFIG, torch.Generator().manual_seed(2))
    state = {name: t for name, t in theirs(model).items() if not name.endswith(".bias")}
    torch.save({"model": state, "model_args": {"n_head": 2}}, tmp_path / "x.pt")
    with pytest.raises(DataError, match="no GPT-2 as we compute it .with biases, tied output.: .*[Mm]issing"):
        load_pt(tmp_path / "x.pt")
