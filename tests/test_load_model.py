"""Names of models, as people type them, to models."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import make_shards
from fake_hub import FakeHub, talk_to
from safetensors.torch import load_file, save_file

from aymen_gpt import files
from aymen_gpt.__main__ import command
from aymen_gpt.data import fetch
from aymen_gpt.errors import DataError, NetworkError, UsageError
from aymen_gpt.evaluation.load_model import load_model
from aymen_gpt.model.gpt import GPT, PRESETS, GPTConfig
from aymen_gpt.model.huggingface import config_to_huggingface, to_huggingface

CONFIG = GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=16)
IDX = torch.arange(12)[None] * 4001 % 50257


def make_folder(folder, seed=0, config=CONFIG, **changed):
    """A folder as others make them; ``changed`` are values of one weight, by its name with _ for dots."""
    folder.mkdir(parents=True)
    model = GPT(config, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.view(-1)[5] = changed.get(name.replace(".", "_"), p.view(-1)[5])
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


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tmp_path):
    """Its folder is m."""
    return make_folder(tmp_path / "m")


WEIGHTS, JSON = Path("m/model.safetensors"), Path("m/config.json")


def load(name="m", **options):
    return load_model(name, torch.device("cpu"), **options)


def refused(message, name="m", **options):
    with pytest.raises(DataError, match=message) as caught:
        load(name, **options)
    assert caught.value.exit_code == 65


def change_config(**change):
    JSON.write_text(json.dumps(json.loads(JSON.read_text()) | change))


def same(a, b):
    with torch.no_grad():
        return torch.equal(a(IDX), b(IDX))


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_a_folder_is_loaded_ready_to_score(model):
    found = load()
    assert same(found.model, model)
    assert not found.model.training
    assert found[1:] == (f"m, {CONFIG.n_params:,} parameters", Path("m"), None)
    save_file({name: t.bfloat16() for name, t in load_file(WEIGHTS).items()}, WEIGHTS)
    assert {p.dtype for p in load().model.parameters()} == {torch.float32}


def test_a_run_is_its_newest_checkpoint_that_is_not_damaged(tmp_path, capsys):
    models = make_run(tmp_path / "run", [5, 20, 100])
    found, description, path, step = load("run")
    assert same(found, models[100])
    assert (path.name, step) == ("step-000000100", 100)
    flip_a_byte(path / "model.safetensors")
    refused("step-000000100 is damaged: model.safetensors has another sha256", str(path))  # asked for by name
    found, description, *_ = load("run")
    assert same(found, models[20])
    assert description == "run/checkpoints/step-000000020, 810,960 parameters"
    assert "step-000000100: model.safetensors has another sha256" in capsys.readouterr().err
    for weights in tmp_path.glob("run/*/*/model.safetensors"):
        weights.unlink()
    refused("no usable checkpoint in run: .*model.safetensors is missing", "run")
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    refused("no checkpoint yet", "new")


@pytest.mark.parametrize(
    "name",
    ["nonsense", "runs/nonsense", "./nonsense", "/nowhere/at/all", "a/b/c", "", "foo/..", "foo/a--b", "foo/b.git",
     "-/-", "models/mine", pytest.param("x" * 5000, id="long"), "a\0b"],
)  # fmt: skip
def test_a_name_of_nothing_lists_what_is_expected(name, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()  # beside a folder of models nobody means the Hub
    monkeypatch.setattr(fetch, "hub_file", lambda *_, **__: pytest.fail("the Hub was asked"))
    refused("no model.*expected gpt2, gpt2-medium.*a run folder", name)


@pytest.mark.fault(51)
def test_missing_or_broken_weights_are_named(model):
    for content in (b"", b"pickle?" * 9, b"\x10\x00\x00\x00\x00\x00\x00\x00{}", WEIGHTS.read_bytes()[:-100]):
        WEIGHTS.write_bytes(content)
        refused("cannot use the model in m:")
    WEIGHTS.unlink()
    refused("no model in m: model.safetensors.* is missing")


@pytest.mark.fault(51)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"n_inner": 100}, "n_inner is '100'"),
        ({"n_inner": [[1]]}, "n_inner is '"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is '1e-06'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is 'False'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is 'True'"),
        ({"n_embd": 32}, r"size mismatch for wte.weight: .*\[50304, 16\].*\[50304, 32\]"),
        ({"n_layer": 3}, "Missing key.*h.2.ln_1.weight"),
        ({"n_layer": 10**9}, "1,000,000,000 layers, and only 28 tensors"),
        *(({"n_layer": size}, "n_layer is .*, expected a whole number") for size in ("2", None, [2], True)),
        ({"n_head": 5}, "n_embd 16 does not divide into n_head 5"),
        ({"vocab_size": 65}, "m knows 65 tokens; Aymen-GPT reads and writes GPT-2's 50,257"),
        ({"vocab_size": 60000}, "m knows 60,000 tokens; Aymen-GPT reads"),
    ],
)
def test_a_model_that_is_no_gpt2_is_refused(model, change, message):
    change_config(**change)
    refused(message)


@pytest.mark.fault(51, 53)
def test_json_of_another_shape_is_named(model):
    WEIGHTS.unlink()
    index = WEIGHTS.with_name("model.safetensors.index.json")
    for places in (None, {}, "x", {"a": 5}, {"a": "../secret.safetensors"}, {"a": ".."}):
        index.write_text(json.dumps({"weight_map": places}))
        refused(r"index\.json: expected a weight_map that names \.safetensors files of the same folder")
    for path in (index, JSON):
        path.write_text("<html>")
        refused(f"cannot read {path}: no JSON")


@pytest.mark.fault(51)
@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("wte.weight", torch.zeros(5), r"wte.weight has the shape \(5,\), the model 50,257 tokens"),
        ("wte.weight", torch.zeros(5, 16), r"wte.weight has the shape \(5, 16\)"),
        ("lm_head.weight", torch.zeros(50257, 16), "lm_head.weight differs"),
        (
            "h.0.ln_1.weight",
            torch.tensor(1.0),
            r"size mismatch for h.0.ln_1.weight: copying .* torch.Size\(\[\]\) from checkpoint, .*\[16\]",
        ),
        ("h.1.attn.c_attn.weight", torch.zeros(2, 2, 2), "t.. expects a tensor with <= 2 dim"),
        ("wpe.weight", torch.zeros(16, 16, dtype=torch.int64), "wpe.weight holds torch.int64"),
        ("h.1.attn.c_attn.weigth", torch.zeros(2), "Unexpected key.*h.1.attn.c_attn.weigth"),
    ],
)
def test_weights_of_another_shape_are_named(model, name, tensor, message):
    save_file(load_file(WEIGHTS) | {f"transformer.{name}": tensor}, WEIGHTS)
    refused(f"cannot use the model in .*{message}")


@pytest.mark.fault(52)
def test_rows_past_gpt2s_vocabulary_are_left_out(model):
    state = load_file(WEIGHTS)
    state["transformer.wte.weight"] = torch.cat([state["transformer.wte.weight"], torch.ones(47, 16)])
    save_file(state, WEIGHTS)
    change_config(vocab_size=50304)
    found = load(shape=CONFIG).model
    assert found.config == CONFIG
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), model.parameters(), strict=True))


def test_another_shape_is_refused_in_words_before_weights_are_looked_at(model, tmp_path, monkeypatch):
    """Of gpt2 the shape is known; of other Hub models config.json alone is asked for."""
    theirs, tiny = "2 layers, 2 heads, 16 wide, 16 tokens of context", PRESETS["tiny"]
    ours = "this run has 2 layers, 2 heads, 32 wide, 64 tokens of context: add "
    WEIGHTS.unlink()
    with FakeHub({"config.json": JSON.read_bytes()}) as hub:
        talk_to(hub, monkeypatch, tmp_path / "hub")
        flags = "--n-layer 12 --n-head 12 --n-embd 768 --block-size 1024$"
        with pytest.raises(UsageError, match=f"--init-from gpt2 has 12 layers, 12 heads, 768 .*{ours}{flags}"):
            load("gpt2", shape=tiny)
        assert hub.requests == []
        for name in ("some-one/tiny", "m"):
            with pytest.raises(
                UsageError, match=f"--init-from {name} has {theirs}; {ours}--n-embd 16 --block-size"
            ):
                load(name, shape=tiny)
        assert all(request.endswith("config.json") for request in hub.requests)


@pytest.mark.parametrize(("name", "repo"), [("gpt2", "openai-community/gpt2"), ("some-one/tiny.gpt", None)])
def test_hub_names_are_downloaded(model, tmp_path, monkeypatch, name, repo):
    if repo is None:  # in several files
        weights = load_file(WEIGHTS)
        WEIGHTS.unlink()
        place = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(weights)}
        for file in set(place.values()):
            save_file({n: t for n, t in weights.items() if place[n] == file}, tmp_path / "m" / file)
        (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    with FakeHub({p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}) as hub:
        talk_to(hub, monkeypatch, tmp_path / "hub")
        found, description, *_ = load(name)
        assert all(f"/{repo or name}/" in request for request in hub.requests)
    assert same(found, model)
    assert description.startswith(f"{name} of the Hub")


def test_a_hub_model_without_safetensors_names_the_file(tmp_path, monkeypatch):
    config = json.dumps(config_to_huggingface(CONFIG)).encode()
    with FakeHub({"config.json": config, "pytorch_model.bin": b"pickle"}) as hub:
        talk_to(hub, monkeypatch, tmp_path / "hub")
        with pytest.raises(NetworkError, match=r"model\.safetensors of some-one/old: not found"):
            load("some-one/old")
        assert not any("pytorch_model" in request for request in hub.requests)


@pytest.mark.fault(30)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    model = make_folder(tmp_path / "m", h_1_mlp_c_fc_weight=value)
    torch.save({"model": model.state_dict(), "model_args": {"n_head": 2}}, tmp_path / "m.pt")
    for name in ("m", "m.pt"):
        refused(rf"^{name}: h\.1\.mlp\.c_fc\.weight holds NaN or infinity", name)


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hellaswag", "-m m --limit 2"),
        ("generate", "-m m Hello"),
        ("pretrain", "--init-from m --preset tiny --data data --steps 1"),
    ],
)
def test_no_command_uses_a_model_that_is_not_finite(tmp_path, name, words):
    make_shards(tmp_path / "data")
    make_folder(tmp_path / "m", config=PRESETS["tiny"], ln_f_weight=math.nan)
    with pytest.raises(DataError, match="^m: ln_f.weight holds NaN or infinity"):
        command(name, words.split())
