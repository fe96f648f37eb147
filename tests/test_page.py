"""report.html: whole and graceful in every state of a run, safe with any text, loading nothing."""

import json
import math
import random
import re
from functools import partial
from html.parser import HTMLParser

import pytest
from run_folders import write_run

from aymen_gpt.__main__ import command
from aymen_gpt.reporting.page import commands, value_text, wall_seconds, write_comparison, write_report
from aymen_gpt.reporting.run_folder import read_run

CONFIG = {
    "format": 1,
    "run": {"preset": "demo", "steps": 300, "tokens_per_step": 4096, "seed": 1337, "learning_rate": 1e-3},
    "command": ["python", "pretrain.py", "--preset", "demo"],
    "model": {"block_size": 256, "vocab_size": 50257, "n_layer": 4, "n_head": 4, "n_embd": 256},
    "n_params": 16080896,
    "data": {"manifest_sha256": "ab" * 32, "source": "builtin", "train_tokens": 1_000_000},
    "versions": {"python": "3.11.7", "torch": "2.13.0", "aymen_gpt": "0.1.0"},
    "git_commit": "c0ffee",
    "host": {"name": "laptop", "cores": 2},
    "device": {"name": "a CPU", "peak_tflops": None},
    "world_size": 1,
    "started": "2026-11-22T15:00:00+00:00",
}
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that every element is closed in order; gathers text, attributes and ids."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.attributes, self.tags = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        ids = [v for _, k, v in self.attributes if k == "id"]
        assert len(ids) == len(set(ids))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


make_run = partial(write_run, config=CONFIG)


def page_of(folder):
    path = write_report(read_run(folder))
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def row(step, **more):
    return {"step": step, "tokens": step * 4096, "loss": 10 - step / 100, "lr": 1e-3, "grad_norm": 1.0} | more


@pytest.mark.fault(61)
def test_an_empty_run_and_the_first_row_have_a_page(tmp_path):
    page = page_of(make_run(tmp_path / "fresh", config={}))
    for said in ("fresh", "No loss yet", "No samples yet", "not scored yet", "No config.json in this run"):
        assert said in page.words
    assert "svg" not in page.tags
    page = page_of(make_run(tmp_path / "one", [row(1)]))
    assert "9.990 nats/token" in page.words
    assert page.tags.count("svg") == 4  # loss for wide windows and for phones, learning rate, gradient norm
    assert "MFU 42" in page_of(make_run(tmp_path / "one", [row(1, tokens_per_second=1.0, mfu=0.42)])).words


def test_a_running_demo_says_what_it_is_and_where_it_stands(tmp_path):
    score = {"n": 1000, "completion": {"acc_norm": 0.261, "acc_norm_stderr": 0.0139}}
    rows = [row(i, step_seconds=2.0, tokens_per_second=2048.0, mfu=None) for i in range(1, 151)]
    rows[149] |= {"val_loss": 5.0, "hellaswag": score}
    status = {"state": "running", "step": 150, "steps": 300, "updated": "2026-11-22T15:05:10+00:00"}
    page = page_of(make_run(tmp_path / "demo", rows, status=status))
    for said in (
        "16.1M parameters, 4 layers, 4 heads, 256 wide",
        "Running",
        "step 150 of 300",
        "614K of 1.23M tokens",
        "22 November 2026, 15:05 UTC",
        "8.500 nats/token",
        "5.000 nats/token perplexity 148.4, step 150",
        "26.10 % ± 1.39 completion, 1,000 examples, step 150; chance is 25 %",
        "2,048 tokens/s",
        "5 min 10 s about 5 min 00 s of training left",
        "GPT-2 124M",
        "ab" * 32,
        "c0ffee",
        "python pretrain.py --preset demo",
    ):
        assert said in page.words, said
    assert "MFU" not in page.words


@pytest.mark.fault(61)
def test_a_log_torn_at_any_byte_has_a_page_with_every_whole_row(tmp_path):
    run = make_run(tmp_path, [row(1, val_loss=9.5), row(2), row(3)])
    log = run / "metrics.jsonl"
    whole = log.read_bytes()
    ends = [position + 1 for position, byte in enumerate(whole) if byte == ord("\n")]
    for kept in range(len(whole)):
        log.write_bytes(whole[:kept])
        found = read_run(run)
        n_rows = sum(end <= kept + 1 for end in ends)  # without its line break a row is whole too
        assert [r["step"] for r in found.rows] == [1, 2, 3][:n_rows]
        torn = kept not in (0, *ends) and kept + 1 not in ends
        assert bool(found.problems) == torn
        if kept % 50 == 0:
            words = page_of(run).words
            assert ("No loss yet" in words) == (n_rows == 0)
            assert ("1 line of metrics.jsonl could not be read" in words) == torn
    log.unlink()
    assert "No loss yet" in page_of(run).words


def test_losses_that_are_not_finite_are_shown_as_such(tmp_path):
    rows = [row(1), row(2, loss=None, grad_norm=None), row(3, loss=float("nan")), row(4)]
    page = page_of(make_run(tmp_path, rows))
    assert "2 of 4 steps not finite" in page.words
    assert "not finite (2)" in page.words
    said = [page.words, *(v for _, _, v in page.attributes if v)]
    assert not [text for text in said if re.search(r"\b(nan|inf)\b", text, re.IGNORECASE)]
    assert "No loss yet" in page_of(make_run(tmp_path, [row(1, loss=None), row(2, loss=None)])).words


def test_text_from_a_run_is_never_markup_and_the_page_loads_nothing(tmp_path):
    evil = '<script>alert("x")</script><img src=http://x.example/a.png onerror=y>'
    config = CONFIG | {
        "run": {"name": evil, "preset": evil, evil: evil},
        "data": {"source": evil},
        "device": {"name": evil},
        "versions": {"aymen_gpt": evil},
        "git_commit": evil,
        "command": ["python", "pretrain.py", evil],
    }
    status = {"state": evil, "message": evil, "updated": evil}
    samples = [{"step": i, "prompt": evil, "text": f"and so {evil}"} for i in (1, 2)]
    rows = [row(1, tokens_per_second=5.0)]
    page = page_of(make_run(tmp_path, rows, config=config, status=status, samples=samples))
    assert not {"script", "img"} & set(page.tags)
    assert page.words.count('alert("x")') > 10
    links = {v for _, k, v in page.attributes if k in ("src", "href", "action", "data", "xlink:href")}
    assert {link for link in links if not link.startswith("#")} == {"data:,"}
    html = (tmp_path / "report.html").read_text().replace("http://x.example", "")
    assert not re.search(r"https?://|url\((?!#)|@import", html)
    policy = next(v for _, k, v in page.attributes if k == "content" and "default-src" in v)
    assert policy.startswith("default-src 'none'")


def test_the_latest_and_largest_score_is_the_one_of_the_page(tmp_path):
    """hellaswag.json, written by hellaswag.py --json, counts beside what training measured."""
    rows = [row(s, hellaswag={"n": 250, "completion": {"acc_norm": s / 100}}) for s in (20, 30)]
    folder = make_run(tmp_path, rows)
    assert "HellaSwag acc_norm 30.00 % completion, 250 examples, step 30" in page_of(folder).words
    part = {"acc_norm": 0.26, "acc_norm_stderr": 0.004}
    (folder / "hellaswag.json").write_text(
        json.dumps({"step": 30, "n": 10042, "completion": part, "harness": part})
    )
    page = page_of(folder)
    assert "HellaSwag acc_norm 26.00 % ± 0.40 completion, 10,042 examples, step 30" in page.words
    assert "HellaSwag while training acc_norm, completion" in page.words
    assert "250 of 10,042 examples. Bars" in page.words
    assert "harness protocol, acc_norm" in page.words


def test_a_very_long_run_stays_small_and_keeps_its_spike(tmp_path):
    rng = random.Random(0)
    steps = 76_292
    lines = ['{"step":0,"val_loss":10.9}\n']
    for s in range(1, steps + 1):
        loss = 9.5 if s == 40_000 else 2.8 + 8 * math.exp(-s / 500) + rng.gauss(0, 0.05)
        lines.append(f'{{"step":{s},"loss":{loss:.4f},"lr":6e-4,"grad_norm":{rng.uniform(0.2, 0.4):.4f}}}\n')
    samples = [{"step": s, "prompt": "p", "text": "word " * 1000} for s in range(0, steps, 250)]
    folder = make_run(tmp_path, config=CONFIG | {"run": {}}, samples=samples, tail="".join(lines))
    path = write_report(read_run(folder))
    assert path.stat().st_size < 1_000_000
    html = path.read_text()
    drawn = re.findall(r'<path d="([^"]*)"', html)
    assert all(len(re.findall("[ML]", d)) <= 1001 for d in drawn)
    each_step = max(drawn[:20], key=len)  # in the loss chart for wide windows
    points = [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", each_step)]
    after = [(y, x) for x, y in points if x > 200]
    assert 560 < min(after)[1] < 600  # the spike is at 52 % of the width, and reaches up
    assert min(after)[0] < 30
    assert "The run begins at 10.90, above the frame" in html
    assert html.count("word ") < 24 * 450
    assert "24 of 306 moments" in html


def test_any_key_may_be_absent(tmp_path):
    for key in [*CONFIG, "history"]:
        for less in ({k: v for k, v in CONFIG.items() if k != key}, CONFIG | {key: None}):
            page_of(make_run(tmp_path, [{"step": 1}], config=less))  # which has no chart to draw


def test_a_report_is_replaced_whole_and_leaves_nothing_beside(tmp_path):
    folder = make_run(tmp_path, [row(1)])
    (folder / "report.html").write_text("old")
    first = write_report(read_run(folder)).read_text()
    assert first.endswith("</html>\n")
    assert write_report(read_run(folder)).read_text() == first
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "metrics.jsonl", "report.html"]


def test_commands_continue_generate_and_score(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make_run(tmp_path / "runs" / "my run", [row(1)])
    assert [line for _, line in commands(read_run(folder))] == [
        "python pretrain.py --preset demo",
        "python generate.py -m 'runs/my run' \"Once upon a time\"",
        "python hellaswag.py -m 'runs/my run' --json 'runs/my run/hellaswag.json'",
        "python -m aymen_gpt report 'runs/my run'",
    ]
    make_run(folder, config=CONFIG | {"world_size": 8})
    again = commands(read_run(folder))[0][1]
    assert again == "torchrun --standalone --nproc_per_node=8 pretrain.py --preset demo"
    make_run(folder, config={})
    assert commands(read_run(folder))[0][1] == "python pretrain.py --run-dir 'runs/my run'"


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("tokens_per_step", 4096, "4,096 tokens"),
        ("learning_rate", 6e-4, "6e-4"),
        ("weight_decay", 0.1, "0.1"),
        ("compile", False, "no"),
        ("seed", 1337, "1337"),
        ("git_commit", None, "—"),
        ("peak_tflops", 989.0, "989 TFLOP/s"),
        ("memory_gb", 25.2765, "25.28 GB"),
        ("warmup_steps", 1, "1 update"),
        ("source", {"repo": "a/b", "revision": None, "files": [{"name": "x"}]}, "repo: a/b, files: x"),
        ("files", ["a", "b", "c", "d", "e"], "a, b, c and 2 more"),
    ],
)
def test_configuration_values_have_units(key, value, text):
    assert value_text(value, key) == text


def test_several_runs_stand_on_one_page(tmp_path):
    evil = "<script>alert(1)</script>"
    rows = [row(s, val_loss=9.0, step_seconds=1.0, tokens_per_second=4096.0) for s in (1, 2)]
    other = CONFIG | {"run": CONFIG["run"] | {"learning_rate": 6e-4, "init_from": evil}, "git_commit": evil}
    folders = [make_run(tmp_path / "a" / "x", rows), make_run(tmp_path / "b" / "x", rows[:1], config=other)]
    page = Page(write_comparison([*map(read_run, folders)], tmp_path / "compare.html").read_text())
    assert page.tags.count("svg") == 2
    assert "script" not in page.tags
    for said in (
        f"{folders[0]} 9.0000 — 8,192 2 16.1M 4,096 2 s —",
        "learning_rate 1e-3 6e-4",
        f"git_commit c0ffee {evil}",
    ):
        assert said in page.words, said
    assert "tokens_per_step" not in page.words  # they agree
    runs = [read_run(make_run(tmp_path / name, config={})) for name in "cd"]
    page = Page(write_comparison(runs, tmp_path / "compare.html").read_text())
    assert "Nothing in their config.json" in page.words


@pytest.mark.parametrize(("names", "out"), [(["a"], "a/report.html"), (["a", "b"], "compare.html")])
def test_the_command_draws_one_run_or_compares_several(tmp_path, monkeypatch, capsys, names, out):
    monkeypatch.chdir(tmp_path)
    for name in names:
        make_run(tmp_path / name, [row(1)])
    command("report", names)
    assert capsys.readouterr().out == f"{out}\n"
    assert (tmp_path / out).read_text().endswith("</html>\n")
    command("report", [*names, "--out", "my/page.html"])
    assert (tmp_path / "my/page.html").is_file()


def test_the_time_of_a_run_is_that_of_its_parts_without_the_pauses(tmp_path):
    at = "2026-11-24T{}:00+00:00".format
    history = [{"started": at("10:00"), "ended": at("10:05")}, {"step": 5, "started": at("20:00")}]
    config = {**CONFIG, "started": at("10:00"), "history": history}
    status = {"state": "done", "step": 10, "steps": 10, "updated": at("20:02")}
    make_run(tmp_path / "run", [row(10)], config=config, status=status)
    assert wall_seconds(read_run(tmp_path / "run")) == 7 * 60
