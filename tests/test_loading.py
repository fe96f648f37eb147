"""Names of models, as people type them, to models."""

import json

import pytest
import torch
from fake_hub import FakeHub, talk_to
from safetensors.torch import load_file, save_file

from aymen_gpt import files
from aymen_gpt.errors import DataError, NetworkError
from aymen_gpt.evaluation.loading import load_model
from aymen_gpt.model.gpt import GPT, GPTConfig
from aymen_gpt.model.huggingface import config_to_huggingface, to_huggingface

CONFIG = GPTConfig(block_size=16, vocab_size=150, n_layer=2, n_head=2, n_embd=16)
CPU = torch.device("cpu")
IDX = torch.arange(12)[None] * 11 % 150


def make_folder(folder, seed=0, config=CONFIG):
    folder.mkdir(parents=True)
    model = GPT(config, torch.Generator().manual_seed(seed))
    (folder / "config.json").write_text(json.dumps(config_to_huggingface(config)))
    save_file(to_huggingface(model.state_dict(), config.vocab_size), folder / "model.safetensors")
    return model


def make_run(run, steps):
    """A run with one checkpoint per step, each of its own random weights."""
    models = {}
    for step in steps:
        folder = run / "checkpoints" / f"step-{step:09d}"
        models[step] = make_folder(folder, seed=step)
        found = {p.name: {"bytes": p.stat().st_size, "sha256": files.sha256(p)} for p in folder.iterdir()}
        (folder / "manifest.json").write_text(json.dumps({"step": step, "files": found}))
    return models


def same(a, b):
    with torch.no_grad():
        return torch.equal(a(IDX), b(IDX))


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_a_folder_is_loaded_ready_to_score(tmp_path):
    model = make_folder(tmp_path / "m")
    found, description = load_model(str(tmp_path / "m"), CPU)
    assert same(found, model)
    assert not found.training
    assert found.wte.weight.dtype == torch.float32
    assert description == f"{tmp_path / 'm'}, {CONFIG.n_params:,} parameters"


def test_bfloat16_weights_are_widened(tmp_path):
    make_folder(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(weights).items()}, weights)
    assert {p.dtype for p in load_model(str(tmp_path / "m"), CPU)[0].parameters()} == {torch.float32}


def test_a_run_is_its_newest_checkpoint(tmp_path):
    models = make_run(tmp_path / "run", [5, 20, 100])
    found, description = load_model(str(tmp_path / "run"), CPU)
    assert same(found, models[100])
    assert description.startswith(str(tmp_path / "run" / "checkpoints" / "step-000000100,"))


def test_a_damaged_checkpoint_of_a_run_is_named_and_skipped(tmp_path):
    models = make_run(tmp_path / "run", [5, 20])
    flip_a_byte(tmp_path / "run" / "checkpoints" / "step-000000020" / "model.safetensors")
    found, description = load_model(str(tmp_path / "run"), CPU)
    assert same(found, models[5])
    assert "skipped as damaged" in description
    assert "step-000000020: model.safetensors has another sha256" in description


def test_a_checkpoint_asked_for_by_name_is_not_skipped(tmp_path):
    models = make_run(tmp_path / "run", [5, 20])
    older = tmp_path / "run" / "checkpoints" / "step-000000005"
    assert same(load_model(str(older), CPU)[0], models[5])
    flip_a_byte(older / "model.safetensors")
    with pytest.raises(DataError, match=r"step-000000005 is damaged: model\.safetensors has another sha256"):
        load_model(str(older), CPU)


def test_a_run_without_a_usable_checkpoint_says_why(tmp_path):
    make_run(tmp_path / "run", [5])
    (tmp_path / "run" / "checkpoints" / "step-000000005" / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"no usable checkpoint in .*run.*model\.safetensors is missing"):
        load_model(str(tmp_path / "run"), CPU)
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    with pytest.raises(DataError, match="no checkpoint yet"):
        load_model(str(tmp_path / "new"), CPU)


@pytest.mark.parametrize("name", ["nonsense", "runs/nonsense", "./nonsense", "/nowhere/at/all", "a/b/c", ""])
def test_a_name_of_nothing_lists_what_is_expected(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no model.*expected gpt2, gpt2-medium.*a run folder") as caught:
        load_model(name, CPU)
    assert caught.value.exit_code == 65


def test_a_missing_folder_beside_others_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(DataError, match="no model at models/mine"):
        load_model("models/mine", CPU)


def test_a_folder_without_weights_names_the_file(tmp_path):
    make_folder(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"no model in .*m: model\.safetensors.* is missing"):
        load_model(str(tmp_path / "m"), CPU)


@pytest.mark.parametrize("content", [b"", b"pickle?" * 9, b"\x10\x00\x00\x00\x00\x00\x00\x00{}"])
def test_broken_weights_are_named(tmp_path, content):
    make_folder(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="cannot use the model in .*m:"):
        load_model(str(tmp_path / "m"), CPU)


def test_half_a_weight_file_is_named(tmp_path):
    make_folder(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot use the model in .*m:"):
        load_model(str(tmp_path / "m"), CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"n_embd": 32}, "size mismatch"),
        ({"n_layer": 3}, "missing"),
    ],
)
def test_a_model_that_is_no_gpt2_is_refused(tmp_path, change, message):
    make_folder(tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(DataError, match=message):
        load_model(str(tmp_path / "m"), CPU)


def test_a_config_that_is_no_json_is_named(tmp_path):
    make_folder(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("<html>")
    with pytest.raises(DataError, match="cannot use the model in"):
        load_model(str(tmp_path / "m"), CPU)


@pytest.mark.parametrize(("name", "repo"), [("gpt2", "openai-community/gpt2"), ("some-one/tiny.gpt", None)])
def test_hub_names_are_downloaded(tmp_path, monkeypatch, name, repo):
    model = make_folder(tmp_path / "m")
    with FakeHub({p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}) as hub:
        talk_to(hub, monkeypatch, tmp_path / "hub")
        found, description = load_model(name, CPU)
        assert all(f"/{repo or name}/" in request for request in hub.requests)
    assert same(found, model)
    assert description.startswith(f"{name} of the Hub")


def test_a_hub_model_in_several_files_is_downloaded(tmp_path, monkeypatch):
    model = make_folder(tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "model.safetensors").unlink()
    place = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(place.values()):
        save_file({n: t for n, t in weights.items() if place[n] == file}, tmp_path / "m" / file)
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    with FakeHub({p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}) as hub:
        talk_to(hub, monkeypatch, tmp_path / "hub")
        assert same(load_model("some-one/tiny", CPU)[0], model)


def test_a_hub_model_without_safetensors_names_the_file(tmp_path, monkeypatch):
    with FakeHub({"config.json": b"{}", "pytorch_model.bin": b"pickle"}) as hub:
        talk_to(hub, monkeypatch, tmp_path / "hub")
        with pytest.raises(NetworkError, match=r"model\.safetensors of some-one/old: not found"):
            load_model("some-one/old", CPU)
        assert not any("pytorch_model" in request for request in hub.requests)
