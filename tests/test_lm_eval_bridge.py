"""lm-evaluation-harness against us: the same HellaSwag, example by example, and our models in its own tasks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from aymen_gpt.data import tokenizer
from aymen_gpt.evaluation import hellaswag
from aymen_gpt.evaluation.hellaswag_data import evenly_spaced
from aymen_gpt.evaluation.lm_eval_bridge import AymenLM, offline_hellaswag
from aymen_gpt.model.gpt import GPT, GPTConfig
from aymen_gpt.model.huggingface import config_to_huggingface, to_huggingface

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("PARITY_EXAMPLES", "40"))  # make test-parity takes 1,000
CONFIG = GPTConfig(block_size=128, n_layer=2, n_head=2, n_embd=32)
TEXTS = [
    "Two boys walk to the river with a rod and a box of worms. They hope to catch a trout.",
    "Bread needs flour, water, salt and yeast. Knead it well, let it rest for an hour and bake it.",
    "Whoever reads the map holds it upside down, and so we drive to the north for half a day.",
    "Naïve café owners, all of them, paid 3 € for it. 「Why?」 ☕",
]


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install lm-eval accelerate")


@pytest.fixture(scope="module", params=["random", "trained"])
def model(request, real):
    """One with weights ten times as large as they are drawn, and one trained for a minute on what it is asked."""
    model = GPT(CONFIG, torch.Generator().manual_seed(0))
    if request.param == "random":
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(10 if p.dim() == 2 else 1)
        return model.eval()
    text = "\n".join(f"{e.ctx} {e.endings[e.label]}" for e in real[5:2000])
    tokens = torch.tensor(tokenizer.gpt2().encode_ordinary(text))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        starts = torch.randint(0, len(tokens) - 65, (4,), generator=generator)
        rows = torch.stack([tokens[start : start + 65] for start in starts])
        loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 8.5  # from 10.8
    return model.eval()


@pytest.fixture
def theirs(lm_eval, model, tmp_path):
    """The same weights as transformers' model, in the harness's own class."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    twin = GPT2LMHeadModel(GPT2Config(**config_to_huggingface(CONFIG))).eval()
    twin.load_state_dict(to_huggingface(model.state_dict(), CONFIG.vocab_size), strict=False)
    twin.tie_weights()
    tokenizer.write_huggingface_files(tmp_path / "tokenizer", model_max_length=CONFIG.block_size)
    return HFLM(
        pretrained=twin,
        tokenizer=AutoTokenizer.from_pretrained(tmp_path / "tokenizer"),
        batch_size=8,
        device="cpu",
        max_length=CONFIG.block_size,
    )


def test_hellaswag_is_the_harnesses(lm_eval, model, theirs, real, tmp_path):
    """Its own task and model on real examples: every choice, every likelihood, and the totals."""
    examples = evenly_spaced(real, EXAMPLES)
    tasks = {"tasks": ["offline_hellaswag"], "task_manager": offline_hellaswag(tmp_path / "tasks", examples)}
    found = lm_eval.simple_evaluate(model=theirs, log_samples=True, bootstrap_iters=0, **tasks)
    samples = sorted(found["samples"]["offline_hellaswag"], key=lambda sample: sample["doc_id"])
    ours = hellaswag.evaluate(model, examples, protocols=("harness",))
    for sample, example, answer in zip(samples, examples, ours.answers["harness"], strict=True):
        likely = [response[0] for response in sample["filtered_resps"]]
        lengths = [len(argument[1]) - 1 for argument in sample["arguments"]]
        np.testing.assert_allclose(answer.log_likelihoods, likely, atol=1e-3)
        assert answer.choice == np.argmax(likely)
        assert answer.choice_norm == np.argmax(np.divide(likely, lengths))
        right = [choice == example.label for choice in (answer.choice, answer.choice_norm)]
        assert [sample["acc"], sample["acc_norm"]] == right
    totals, scores = found["results"]["offline_hellaswag"], ours.scores("harness")
    assert all(scores[name] == totals[f"{name},none"] for name in ("acc", "acc_norm"))
    bridge = lm_eval.simple_evaluate(model=AymenLM(model), bootstrap_iters=0, **tasks)
    assert bridge["results"]["offline_hellaswag"] == pytest.approx(totals, abs=1e-9)


TOYS = {  # a task of the harness -> its split, and rows for it
    "lambada/lambada_openai": ("test", [{"text": text.rpartition(" ")[0] + " it."} for text in TEXTS]),
    "wikitext/wikitext": ("test", [{"page": text * n} for n, text in enumerate(TEXTS, 1)]),
    "triviaqa/default": (
        "validation",
        [{"question": text[:30], "answer": {"aliases": ["a", "river"]}} for text in TEXTS],
    ),
}


def toy_tasks(lm_eval, folder):
    """The harness's own tasks with a few rows of ours instead of data from the Hub."""
    from lm_eval.tasks import TaskManager

    tasks = Path(lm_eval.__file__).parent / "tasks"
    folder.mkdir()
    for task, (split, rows) in TOYS.items():
        name = task.replace("/", "_")
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        splits = "".join(f"{s}_split: {s if s == split else 'null'}\n" for s in ("training", "validation", "test"))
        (folder / f"{name}.yaml").write_text(
            f"include: {tasks / task}.yaml\ntask: {name}\ndataset_path: json\ndataset_name: null\n{splits}"
            f"dataset_kwargs:\n  cache_dir: {folder}/cache\n  data_files:\n    {split}: {data}\n"
        )
    return TaskManager(include_path=str(folder), include_defaults=False)


def test_our_model_answers_the_harnesses_tasks_as_transformers_does(lm_eval, model, theirs, tmp_path):
    """Last words (likelihood and greedy), perplexity of texts longer than the context, and generated answers."""
    tasks = toy_tasks(lm_eval, tmp_path / "toys")
    both = [
        lm_eval.simple_evaluate(
            model=lm,
            tasks=[task.replace("/", "_") for task in TOYS],
            task_manager=tasks,
            gen_kwargs="max_gen_toks=12",
            log_samples=True,
            bootstrap_iters=0,
        )
        for lm in (AymenLM(model, batch_tokens=100), theirs)
    ]
    for task, answers in both[1]["samples"].items():
        for ours, their in zip(both[0]["samples"][task], answers, strict=True):
            if task == "triviaqa_default":
                assert ours["resps"] == their["resps"]
            else:
                assert ours["resps"][0][0] == pytest.approx(their["resps"][0][0], abs=1e-2)
    assert both[0]["results"].keys() == both[1]["results"].keys()
    for task, results in both[1]["results"].items():
        numbers = {name: value for name, value in results.items() if isinstance(value, float)}
        assert len(numbers) >= 1
        assert {name: both[0]["results"][task][name] for name in numbers} == pytest.approx(numbers, rel=1e-4)


def test_a_run_folder_is_a_model_and_answers_are_kept(lm_eval, real, tmp_path):
    from safetensors.torch import save_file

    model = GPT(CONFIG, torch.Generator().manual_seed(0))
    (tmp_path / "config.json").write_text(json.dumps(config_to_huggingface(CONFIG)))
    save_file(to_huggingface(model.state_dict(), CONFIG.vocab_size), tmp_path / "model.safetensors")
    tasks = offline_hellaswag(tmp_path / "tasks", real[:5])
    kept = {"use_cache": str(tmp_path / "answers"), "task_manager": tasks, "tasks": ["offline_hellaswag"]}
    first = lm_eval.simple_evaluate(model=AymenLM(str(tmp_path), device="cpu"), **kept)
    broken = AymenLM(model)
    broken._loglikelihood_tokens = lambda *_: pytest.fail("asked again")
    again = lm_eval.simple_evaluate(model=broken, **kept)
    assert again["results"] == first["results"]


def test_without_the_harness_the_class_says_what_to_install():
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from aymen_gpt.evaluation import lm_eval_bridge\n"
        "try: lm_eval_bridge.AymenLM('gpt2')\n"
        "except lm_eval_bridge.UsageError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "lm-eval is not installed: pip install 'aymen-gpt[lm-eval]'\n", done.stderr
