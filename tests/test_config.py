"""The defaults are the published run; presets bring the papers' recipes; nonsense is refused by its flag."""

import json
import math
import re
import shlex
from dataclasses import asdict, fields, replace

import pytest

from aymen_gpt.errors import DataError, UsageError
from aymen_gpt.model.gpt import PRESETS, GPTConfig
from aymen_gpt.training.config import (
    RECIPES,
    TrainConfig,
    check,
    doubts,
    fitting,
    flag,
    kind,
    read_options,
    resolve,
)


def test_without_options_it_is_the_published_run():
    c = resolve({})
    assert c.model == PRESETS["gpt2"]
    assert (c.steps, c.tokens_per_step, c.block_size) == (76_292, 524_288, 1024)
    assert (c.learning_rate, c.min_lr_ratio, c.warmup_steps) == (6e-4, 0.1, 715)
    assert (c.beta1, c.beta2, c.weight_decay, c.grad_clip) == (0.9, 0.95, 0.1, 1.0)
    assert c.steps * c.tokens_per_step == pytest.approx(40e9, rel=1e-4)
    assert (c.run, c.data) == ("runs/gpt2", "edu_fineweb10B")


def test_every_preset_resolves_and_sizes_are_stated_once():
    assert RECIPES.keys() == PRESETS.keys()
    for preset in RECIPES:
        c = resolve({"preset": preset})
        assert (c.model, c.run) == (PRESETS[preset], f"runs/{preset}")
        assert 0 < c.warmup_steps <= c.steps / 20
        assert not asdict(c.model).keys() & RECIPES[preset].keys()


@pytest.mark.parametrize(
    ("preset", "rate", "tokens"),
    [("gpt3-small", 6e-4, 2**19), ("gpt3-medium", 3e-4, 2**19), ("gpt3-large", 2.5e-4, 2**19),
     ("gpt3-xl", 2e-4, 2**20), ("gpt3-2.7b", 1.6e-4, 2**20), ("gpt3-6.7b", 1.2e-4, 2**21),
     ("gpt3-13b", 1e-4, 2**21), ("gpt3-175b", 0.6e-4, 3 * 2**20)],
)  # fmt: skip
def test_gpt3_rates_and_batches_are_those_of_table_2_1(preset, rate, tokens):
    c = resolve({"preset": preset})
    assert (c.learning_rate, c.tokens_per_step, c.block_size) == (rate, tokens, 2048)
    assert c.steps * c.tokens_per_step == pytest.approx(300e9, rel=1e-4)


def test_given_options_win_over_the_preset_and_warmup_is_at_most_a_twentieth_of_a_short_run():
    c = resolve({"preset": "tiny", "n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 32, "run": "elsewhere"})
    assert (c.model, c.run) == (GPTConfig(block_size=32, n_layer=3, n_head=4, n_embd=64), "elsewhere")
    assert resolve({"steps": 200}).warmup_steps == 10
    assert resolve({"steps": 200, "warmup_steps": 50}).warmup_steps == 50


def test_muon_brings_its_recipe_to_every_preset_and_given_options_win():
    c = resolve({"optimizer": "muon", "steps": 200, "min_lr_ratio": 0.2})
    assert (c.schedule, c.min_lr_ratio, c.learning_rate, c.weight_decay) == ("linear", 0.2, 3e-3, 0.025)
    assert (c.warmup_steps, c.model, c.tokens_per_step) == (4, PRESETS["gpt2"], 2**19)
    assert doubts(c, None) == []
    (line,) = doubts(resolve({"matrix_rate": 0.1}), None)
    assert line == "warning: --matrix-rate 0.1 changes nothing without --optimizer muon"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"preset": "gpt5"}, "--preset gpt5: expected gpt2, gpt2-medium"),
     ({"preset": "gtp2"}, "did you mean gpt2?"),
     ({"preset": 5}, "--preset 5: expected gpt2, "),
     ({"optimizer": "moun"}, "--optimizer moun: expected adamw, muon; did you mean muon?"),
     ({"track": "wb"}, "--track wb: expected tensorboard, wandb, trackio"),
     ({"residual": "half"}, "--residual half: expected float32, bfloat16"),
     ({"n_embd": 100, "n_head": 3}, "--n-embd 100 is not a multiple of --n-head 3: try 99"),
     ({"run": ""}, "--run-dir '': expected a name"),
     ({"data": " "}, "--data ' ': expected a name"),
     ({"init_from": ""}, "--init-from '': expected a name"),
     ({"run": "runs/" + "r" * 256}, "expected a name of 1 to 255 bytes"),
     ({"run": "r/" * 3000}, "expected a name of 1 to 255 bytes"),
     ({"run": "\ud800"}, "expected a name of 1 to 255 bytes"),
     ({"run": "a\0b"}, "--run-dir 'a"),
     ({"steps": "3"}, "--steps '3': expected a whole number from 1 to 1,000,000,000"),
     ({"steps": 3.5}, "--steps 3.5: expected a whole number"),
     ({"steps": True}, "--steps True: expected a whole number"),
     ({"steps": None}, "--steps None: expected a whole number"),
     ({"compile": "yes"}, "--compile 'yes': expected true or false"),
     ({"tokens_per_step": 1000}, "--tokens-per-step 1000 is not a multiple of --block-size 1024: try 1024"),
     ({"schedule": "flat"}, "--schedule flat: expected cosine, linear"),
     ({"learning_rate": math.nan}, "--learning-rate nan: expected a number above 0 and up to 100")],
)  # fmt: skip
def test_nonsense_is_refused_by_its_flag(options, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        resolve(options)


@pytest.mark.parametrize("f", [f for f in fields(TrainConfig) if kind(f) in (int, float)], ids=lambda f: f.name)
def test_a_number_out_of_its_range_is_refused_and_its_ends_are_not(f):
    allowed = f.metadata["range"]
    wrong = [allowed.low - 1, allowed.high + 1, *allowed.without]
    wrong += [] if kind(f) is int else [math.nan, math.inf, -math.inf]
    for value in wrong:
        if value == 0 and f.metadata["unset"]:
            continue  # a word for None
        with pytest.raises(UsageError, match=re.escape(f"{flag(f.name)} {value}: expected a ")):
            check(f, value)
        with pytest.raises(UsageError, match=re.escape(flag(f.name))):
            resolve({f.name: value})
    for value in {allowed.low, allowed.high} - set(allowed.without):
        check(f, value)


def test_steps_to_keep_are_whole_numbers_with_commas_between():
    assert resolve({"keep_also": "20, 100,5"}).kept_steps == {5, 20, 100}
    for wrong in ("a", "1;2", "1,,2", "-1", "1.5"):
        with pytest.raises(UsageError, match=f"--keep-also {wrong}: expected steps with commas between them"):
            resolve({"keep_also": wrong})


@pytest.mark.parametrize(
    ("name", "word"),
    [("micro_batch", "auto"), ("grad_clip", "off"), ("val_every", "end"), ("hellaswag_every", "never"),
     ("hellaswag_limit", "all"), ("keep_every", "none")],
)  # fmt: skip
def test_none_has_a_word_and_zero_is_another(name, word):
    assert [getattr(resolve({name: value}), name) for value in (None, 0, word)] == [None] * 3
    assert getattr(resolve({name: 7}), name) == 7


@pytest.mark.parametrize("old", [False, True])
def test_options_come_from_a_file_by_their_names_or_from_the_record_of_a_run(tmp_path, old):
    path = tmp_path / "mine.toml"
    path.write_text('preset = "tiny"\ntokens-per-step = 1e3\nblock_size = 50\nval_every = 0\nbeta1 = 0.5\n')
    c = resolve(read_options(path) | {"block_size": 100})
    assert (c.preset, c.tokens_per_step, c.block_size, c.val_every, c.beta1) == ("tiny", 1000, 100, None, 0.5)
    record = asdict(c)
    if old:  # as the first versions wrote what was not set
        record |= {"init_from": "", "track": "", "keep_every": 0, "val_every": 0}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"format": 1, "run": record}))
    assert resolve(read_options(path)) == (replace(c, val_every=None) if old else c)


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [("a.toml", b"stpes = 3", UsageError, "a.toml: there is no option stpes; did you mean steps?"),
     ("a.toml", b"steps = [3", DataError, "a.toml is no TOML: Unclosed array"),
     ("a.toml", b"\xff", DataError, "a.toml is no TOML: "),
     ("a.json", b"[" * 100_000, DataError, "a.json is no JSON: maximum recursion depth"),
     ("a.json", b"[1]", DataError, "a.json: expected options by their names"),
     ("a.toml", b"steps = '3'", UsageError, "--steps '3': expected a whole number"),
     ("a.toml", b"micro_batch = [1]", UsageError, "--micro-batch [1]: expected a whole number"),
     ("a.toml", b"[run]\nsteps = 3\nn = 4", UsageError, "a.toml: there is no option n"),
     ("a.toml", None, DataError, "a.toml: No such file")],
)  # fmt: skip
def test_a_file_that_says_nonsense_or_is_not_there_is_refused_by_its_name(tmp_path, name, text, error, message):
    if text is not None:
        (tmp_path / name).write_bytes(text)
    with pytest.raises(error, match=re.escape(message)):
        resolve(read_options(tmp_path / name))


@pytest.mark.parametrize("tokens", [100, 145_000, 10**6, 10**8, 2 * 10**9, 10**10, 10**12])
def test_what_is_advised_for_a_corpus_reads_it_a_few_times_and_raises_no_doubt(tokens):
    program, door, *words = shlex.split(fitting(tokens, "my data"))
    assert (program, door) == ("python", "pretrain.py")
    given = zip(words[::2], words[1::2], strict=True)
    c = resolve({key.removeprefix("--"): int(v) if v.isdigit() else v for key, v in given})
    assert c.data == "my data"
    assert c.steps * c.tokens_per_step <= max(4.3 * tokens, 20 * c.tokens_per_step)
    assert doubts(c, max(tokens, 1000)) == []


def test_a_run_of_many_epochs_and_a_warmup_without_end_are_doubted():
    c = resolve({"data": "small", "warmup_steps": 99_999, "steps": 30_000})
    warmup, epochs = doubts(c, 145_000)
    assert "--warmup-steps 99,999 is more than --steps 30,000" in warmup
    assert "reads the 145,000 tokens of small 108,473 times" in epochs
    assert epochs.endswith("python pretrain.py --preset demo --data small --steps 570")
    assert doubts(resolve({"warmup_steps": 100, "steps": 100}), None) == []
