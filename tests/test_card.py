"""The README.md of a checkpoint is a model card that the Hub's own reader understands."""

import json
import shutil

from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from test_checkpoint import save, snapshot

from aymen_gpt.commands.report import write_cards
from aymen_gpt.model.card import card
from aymen_gpt.model.folders import problem
from aymen_gpt.reporting.run_folder import read_run
from aymen_gpt.training import checkpoint

SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257}
SCORES = {"completion": {"n": 250, "acc": 0.3, "acc_stderr": 0.029, "acc_norm": 0.232, "acc_norm_stderr": 0.0267}}
RUN = {
    "run": {"run": "runs/edu: the 'first'", "steps": 100},
    "command": ["python", "pretrain.py", "--run-dir", "runs/edu: the 'first'"],
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


def test_the_hub_reads_scores_with_their_protocol_and_the_text_says_what_is_known():
    text = card(50, SHAPE, {"loss": 3.5, "val_loss": 3.25}, RUN, SCORES)
    found = ModelCard(text).data
    assert {(r.metric_type, r.metric_value, r.metric_name, r.dataset_name) for r in found.eval_results} == {
        (metric, value, f"{metric}, step 50, 250 examples", "HellaSwag, completion protocol")
        for metric, value in (("acc", 0.3), ("acc_norm", 0.232))
    }
    assert (found.model_name, found.datasets) == ("edu: the 'first'", ["HuggingFaceFW/fineweb-edu"])
    for part in (
        "step 50",
        "50 of 100",
        "124,439,808",
        "3.2500 nats",
        "| completion | 250 | 30.00 % ± 2.90 | 23.20 % ± 2.67 |",
        "ODC-By 1.0",
        "revision 87f0914",
        "ab" * 32,
        "commit c0ffee",
        "8 processes",
        """python pretrain.py --run-dir 'runs/edu: the '"'"'first'"'"''""",
    ):
        assert part in text, part


def test_without_score_and_config_it_claims_nothing():
    text = card(1, SHAPE, {}, {}, {})
    assert ModelCard(text).data.eval_results is None
    assert "Not scored yet" in text
    assert "not known to the program" in text
    assert "None" not in text


def test_text_from_the_run_is_text():
    """Whatever stands in config.json: as YAML, as Markdown and as HTML it stays one piece of text."""
    evil = 'x"\nlicense: mit\n---\n# Owned\n```\n~~~\n<script>alert(1)</script> [a](http://b) **c** `d` | e'
    run = {
        "run": {"run": f"runs/{evil}", "steps": evil},
        "command": ["python", "pretrain.py", "--run-dir", evil],
        "n_params": evil,
        "data": {"source": {"repo": evil, "revision": evil}, "train_tokens": evil, "manifest_sha256": evil},
        "versions": {"torch": evil},
        "git_commit": evil,
        "world_size": evil,
    }
    text = card(50, SHAPE, {"loss": evil, "val_loss": evil, "tokens": evil}, run, SCORES)
    plain, data = card(50, SHAPE, {}, {}, SCORES), ModelCard(text).data
    assert (data.license, data.library_name, len(data.eval_results)) == (None, "transformers", 2)
    html, fine = (MarkdownIt().enable("table").render(ModelCard(made).text) for made in (text, plain))
    for tag in ("script", "a ", "strong", "h1", "h2", "h3", "ul", "pre", "blockquote"):
        assert html.count(f"<{tag}") == fine.count(f"<{tag}"), tag
    cells = [line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("| ")]
    assert set(cells) == {3, 5}


def test_every_checkpoint_has_a_card_that_carries_the_scores_of_its_step(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RUN))
    rows = [{"step": 2, "hellaswag": {"n": 250, **SCORES}}, {"step": 4, "loss": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"st')
    first, second = save(tmp_path, step=2), save(tmp_path, step=4)
    for folder in (first, second):
        assert "commit c0ffee" in (folder / "README.md").read_text()
        assert "Not scored yet" in (folder / "README.md").read_text()
        assert "README.md" not in json.loads((folder / "manifest.json").read_text())["files"]
    write_cards(read_run(tmp_path))
    assert "| completion | 250 | 30.00 % ± 2.90 |" in (first / "README.md").read_text()
    assert "Not scored yet" in (second / "README.md").read_text()
    larger = {"step": 2, "n": 10_042, "completion": {"acc": 0.31}, "harness": {"acc": 0.32, "acc_norm": 0.33}}
    (tmp_path / "hellaswag.json").write_text(json.dumps(larger))
    write_cards(read_run(tmp_path))
    text = (first / "README.md").read_text()
    assert "| completion | 10,042 | 31.00 % | - |\n| harness | 10,042 | 32.00 % | 33.00 % |" in text
    assert problem(first) is None


def test_a_card_that_a_person_has_edited_stays(tmp_path):
    first, second = save(tmp_path, step=2), save(tmp_path, step=4)
    rows = [{"step": step, "hellaswag": {"n": 250, **SCORES}} for step in (2, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (first / "README.md").write_text("my model")
    for _ in range(2):
        write_cards(read_run(tmp_path))
        assert (first / "README.md").read_text() == "my model"
        assert "| completion | 250 | 30.00 % ± 2.90 |" in (second / "README.md").read_text()
    (second / "README.md").unlink()
    write_cards(read_run(tmp_path))
    assert "| completion | 250 |" in (second / "README.md").read_text()


def test_a_checkpoint_that_goes_away_is_not_brought_back_by_its_card(tmp_path, monkeypatch):
    folder = save(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 2, "hellaswag": {"n": 250, **SCORES}}))
    monkeypatch.setattr(checkpoint, "card", lambda *_: shutil.rmtree(folder) or "late")
    write_cards(read_run(tmp_path))
    assert not folder.exists()


def test_a_run_without_config_is_saved_all_the_same(tmp_path):
    for content in ("{half", "[]"):
        (tmp_path / "config.json").write_text(content)
        (tmp_path / "metrics.jsonl").write_bytes(b'["hellaswag"]\n\xff"hellaswag"')
        assert problem(save(tmp_path, step=2 + len(content))) is None
    assert checkpoint.read_snapshot(save(tmp_path, step=4)).metrics == snapshot(4).metrics
