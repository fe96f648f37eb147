"""aymen-gpt push: a run becomes a model on the Hub, here the fake one."""

import shutil

import pytest
import torch
from fake_hub import FakeHub, talk_to
from huggingface_hub import ModelCard
from run_folders import write_run
from test_checkpoint import save, trained

from aymen_gpt.evaluation.load_model import load_model
from aymen_gpt.model.card import for_hub

TOKEN = "hf_" + "x" * 34
MODEL = {"config.json", "generation_config.json", "model.safetensors", "manifest.json", "README.md"}
TOKENIZER = {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
RUN = {"loss.png", "report.html"}
CONTINUE = {"state.json", "optimizer.safetensors"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with FakeHub({}) as hub:
        talk_to(hub, monkeypatch, tmp_path / "hub")
        yield hub


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    rows = [{"step": step, "loss": 11 - step, "tokens": 64 * step} for step in (1, 2, 3)]
    folder = write_run(tmp_path_factory.mktemp("work") / "x", rows, config={"run": {"run": "runs/x", "steps": 3}})
    save(folder, 2)
    (save(folder, 3, trained(seed=1)) / "secrets.txt").write_text("not of the checkpoint")
    return folder


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "runs/x")


def listed(text):
    return {line.split()[1] for line in text.splitlines() if line.startswith(" ")}


def test_a_run_becomes_a_model_of_the_hub(hub, run, call):
    done = call("push.py", "-m", "runs/x", "me/x")
    assert done.returncode == 0, done.stderr
    assert hub.files.keys() == MODEL | TOKENIZER | RUN == listed(done.stdout)
    assert (hub.visibility, hub.tokens) == ("public", {f"Bearer {TOKEN}"})
    assert hub.files["loss.png"].startswith(b"\x89PNG")
    assert b"<svg" in hub.files["report.html"]
    card = hub.files["README.md"].decode()
    assert "](loss.png)" in card
    assert card.count('from_pretrained("me/x")') == 2
    assert "`python hellaswag.py -m me/x`" in card
    assert "which continue the run, were not uploaded" in card
    assert ModelCard(card).data.model_name == "x"
    assert torch.equal(load_model("me/x", torch.device("cpu")).model.wte.weight, trained(seed=1)[0].wte.weight)
    assert TOKEN not in done.stdout + done.stderr


def test_the_optimizer_goes_on_request_and_leaves_with_the_next_push(hub, run, call):
    assert call("push.py", "-m", "runs/x", "me/x", "--with-optimizer", "--private").returncode == 0
    assert hub.files.keys() == MODEL | TOKENIZER | RUN | CONTINUE
    assert hub.visibility == "private"
    assert "`optimizer.safetensors` beside this file continue the run;" in hub.files["README.md"].decode()
    assert call("push.py", "-m", "runs/x", "me/x").returncode == 0
    assert hub.files.keys() == MODEL | TOKENIZER | RUN


def test_a_dry_run_sends_nothing_and_needs_no_token(hub, run, call, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    before = set(tmp_path.rglob("*"))
    done = call("push.py", "-m", "runs/x", "me/x", "--dry-run", "--private")
    assert (done.returncode, hub.requests, set(tmp_path.rglob("*"))) == (0, [], before)
    assert listed(done.stdout) == MODEL | TOKENIZER | RUN
    assert "step-000000003 -> me/x, private: 12 files," in done.stdout


def test_the_newest_whole_checkpoint_goes(hub, run, call):
    (run / "checkpoints/step-000000003/optimizer.safetensors").write_bytes(b"damaged")
    assert "step-000000003 ->" in call("push.py", "-m", "runs/x", "me/x", "--dry-run").stdout
    done = call("push.py", "-m", "runs/x", "me/x", "--dry-run", "--with-optimizer")
    assert "step-000000002 ->" in done.stdout
    assert "skipped as damaged" in done.stderr


def test_a_public_repository_gets_no_private_model(hub, run, call):
    hub.visibility = "public"
    done = call("push.py", "-m", "runs/x", "me/x", "--private")
    assert (done.returncode, hub.files) == (2, {})
    assert done.stderr.startswith("error: me/x exists and is public: make it private")


@pytest.mark.parametrize(
    ("token", "faults", "code", "message"),
    [
        ("", {}, 2, "no token for the Hub: type hf auth login, or set HF_TOKEN to one that may write"),
        ("hf_ä b", {}, 2, "the token for the Hub has blanks or letters that no token has"),
        (
            TOKEN,
            {"POST create": ["401"], "GET api": ["401", "401"]},
            69,
            "the Hub does not take this token (HTTP 401): type hf auth login",
        ),
        (TOKEN, {"POST create": ["403"], "GET api": ["404"]}, 69, "this token may not write to me/x (HTTP 40"),
        (TOKEN, {"POST commit": ["403"]}, 69, "this token may not write to me/x (HTTP 403): check the owner"),
        (TOKEN, {"POST batch": ["403"]}, 69, "this token may not write to me/x (HTTP 403)"),
        (TOKEN, {"POST commit": ["503"]}, 69, "cannot push to me/x at http://127.0.0.1:"),
        (TOKEN, {"POST validate-yaml": ["400"]}, 65, "the Hub refuses the model card: Invalid metadata"),
    ],
)
def test_refusals_are_one_line(hub, run, call, monkeypatch, tmp_path, token, faults, code, message):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    hub.faults = faults
    done = call("push.py", "-m", "runs/x", "me/x")
    assert (done.returncode, hub.files) == (code, {}), done.stderr
    assert done.stderr.startswith(f"error: {message}"), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not token or token not in done.stderr


def test_no_network_is_one_line(hub, run, call, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    done = call("push.py", "-m", "runs/x", "me/x")
    assert done.returncode == 69
    assert done.stderr.startswith("error: cannot push to me/x at http://127.0.0.1:9: ConnectError")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set: unset it to push" in call("push.py", "-m", "runs/x", "me/x").stderr


@pytest.mark.parametrize("repo", ["x", "me/x/y", "me/x y", "../x", "me/"])
def test_a_name_that_the_hub_cannot_have_is_refused(refused, repo):
    refused(2, "expected OWNER/REPO", "push.py", "-m", "runs/x", repo)


def test_no_run_is_one_line(refused):
    refused(65, "no checkpoint yet in runs/none", "push.py", "-m", "runs/none", "me/x")


def test_a_card_that_a_person_wrote_keeps_its_words():
    own = "# Mine\n\nSee ![my loss](loss.png).\n"
    assert for_hub(own, "me/x", training=False) == own
    assert for_hub("# Mine\n", "me/x", training=False).startswith("# Mine\n\n## Loss\n\n![")
