"""The defaults are the published run; presets bring the papers' recipes; nonsense is refused by its flag."""

import pytest

from aymen_gpt.errors import UsageError
from aymen_gpt.model.gpt import PRESETS
from aymen_gpt.training.config import RECIPES, resolve


def test_without_options_it_is_the_published_run():
    c = resolve({})
    assert c.model == PRESETS["gpt2"]
    assert (c.steps, c.tokens_per_step, c.block_size) == (76_292, 524_288, 1024)
    assert (c.learning_rate, c.min_lr_ratio, c.warmup_steps) == (6e-4, 0.1, 715)
    assert (c.beta1, c.beta2, c.weight_decay, c.grad_clip) == (0.9, 0.95, 0.1, 1.0)
    assert c.steps * c.tokens_per_step == pytest.approx(40e9, rel=1e-4)
    assert (c.run, c.data) == ("runs/gpt2", "edu_fineweb10B")


@pytest.mark.parametrize("preset", RECIPES)
def test_every_preset_resolves(preset):
    c = resolve({"preset": preset})
    assert c.model == PRESETS[preset]
    assert c.run == f"runs/{preset}"
    assert 0 < c.warmup_steps <= c.steps / 20


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


def test_presets_and_recipes_name_the_same_models():
    assert RECIPES.keys() == PRESETS.keys()


def test_given_options_win_over_the_preset():
    c = resolve({"preset": "demo", "steps": 10, "block_size": 128, "run": "elsewhere"})
    assert (c.steps, c.model.block_size, c.run) == (10, 128, "elsewhere")


def test_warmup_is_at_most_a_twentieth_of_a_short_run():
    assert resolve({"steps": 200}).warmup_steps == 10
    assert resolve({"steps": 200, "warmup_steps": 50}).warmup_steps == 50


@pytest.mark.parametrize(
    ("options", "message"),
    [({"preset": "gpt5"}, "--preset gpt5: expected one of gpt2"),
     ({"steps": 0}, "--steps must be above 0, got 0"),
     ({"tokens_per_step": 1000}, "--tokens-per-step 1000 is not a multiple of --block-size 1024: try 1024"),
     ({"val_every": -1}, "--val-every must not be negative, got -1"),
     ({"learning_rate": float("nan")}, "--learning-rate must be above 0, got nan"),
     ({"micro_batch": -4}, "--micro-batch must not be negative")],
)  # fmt: skip
def test_nonsense_is_refused_by_its_flag(options, message):
    with pytest.raises(UsageError, match=message):
        resolve(options)
