"""The README.md of a checkpoint is a model card that the Hub's own reader understands."""

import json

from huggingface_hub import ModelCard
from test_checkpoint import save, snapshot

from aymen_gpt.model.card import card
from aymen_gpt.model.folders import problem
from aymen_gpt.training import checkpoint

SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257}
SCORED = {
    "step": 40,
    "hellaswag": {
        "n": 250,
        "completion": {"acc": 0.3, "acc_stderr": 0.029, "acc_norm": 0.232, "acc_norm_stderr": 0.0267},
    },
}
RUN = {
    "run": {"run": "runs/edu: the 'first'", "steps": 100},
    "command": ["python", "pretrain.py", "--run", "runs/edu: the 'first'"],
    "n_params": 124_439_808,
    "data": {
        "source": {"repo": "HuggingFaceFW/fineweb-edu", "revision": "87f0914"},
        "train_tokens": 9_900_000_000,
        "manifest_sha256": "ab" * 32,
    },
    "versions": {"torch": "2.13.0"},
    "git_commit": "c0ffee",
    "world_size": 8,
}


def test_the_hub_reads_scores_with_their_protocol():
    found = ModelCard(card(50, SHAPE, {"loss": 3.5, "val_loss": 3.25}, RUN, SCORED)).data
    assert {(r.metric_type, r.metric_value) for r in found.eval_results} == {("acc", 0.3), ("acc_norm", 0.232)}
    assert {r.dataset_name for r in found.eval_results} == {"HellaSwag, completion protocol"}
    assert {r.metric_name for r in found.eval_results} == {f"{m} at step 40, n = 250" for m in ("acc", "acc_norm")}
    assert found.model_name == "edu: the 'first'"
    assert found.datasets == ["HuggingFaceFW/fineweb-edu"]


def test_the_text_says_what_is_known():
    text = card(50, SHAPE, {"loss": 3.5, "val_loss": 3.25}, RUN, SCORED)
    for part in (
        "step 50",
        "50 of 100",
        "124,439,808",
        "3.2500 nats",
        "| completion | 30.00 % ± 2.90 | 23.20 % ± 2.67 |",
        "At step 40, over 250 of 10,042",
        "ODC-By 1.0",
        "revision 87f0914",
        "ab" * 32,
        "commit `c0ffee`",
        "8 process",
        """python pretrain.py --run 'runs/edu: the '"'"'first'"'"''""",
    ):
        assert part in text, part


def test_without_score_and_config_it_claims_nothing():
    text = card(1, SHAPE, {}, {}, {})
    assert ModelCard(text).data.eval_results is None
    assert "Not scored yet" in text
    assert "not known to the program" in text
    assert "None" not in text


def test_text_from_the_run_cannot_break_the_metadata():
    run = {"run": {"run": 'runs/x"\nlicense: mit'}, "data": {"source": {"repo": '"]\nlicense: mit #'}}}
    data = ModelCard(card(1, SHAPE, {}, run, SCORED)).data
    assert data.license is None


def test_every_checkpoint_has_a_card(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RUN))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(SCORED) + '\n{"step": 41, "loss": 3}\n{"st')
    folder = save(tmp_path)
    text = (folder / "README.md").read_text()
    assert "commit `c0ffee`" in text
    assert "At step 40" in text


def test_a_run_without_config_is_saved_all_the_same(tmp_path):
    for content in ("{half", "[]"):
        (tmp_path / "config.json").write_text(content)
        (tmp_path / "metrics.jsonl").write_bytes(b'["hellaswag"]\n\xff"hellaswag"')
        assert problem(save(tmp_path, step=2 + len(content))) is None
    assert checkpoint.read_snapshot(save(tmp_path, step=4)).metrics == snapshot(4).metrics
