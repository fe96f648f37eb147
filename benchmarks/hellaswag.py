"""HellaSwag examples per second against what others would run, in one alternating run, and what precision costs.

    python benchmarks/hellaswag.py [-m MODEL] [--examples 24] [--rounds 5] [--agreement 1000] [--json FILE]

Every scorer is a live process of its own; the rounds give each the same examples in turn, other ones each round.
All score the harness protocol, tokenizing included. Scorers, each in float32 and bfloat16:

    ours        scoring.py: a row holds a context and its endings, the output layer runs where a token is predicted
    naive       our GPT, one example at a time, as build-nanogpt does in training: four padded rows, autocast,
                all logits, cross-entropy (here in float32)
    lm-eval     lm-evaluation-harness's HFLM on transformers' model of the same weights, by batch size

MODEL is what hellaswag.py -m takes; without it GPT-2 124M with random weights. --agreement N counts the examples
of N that get the same choices from ours in bfloat16 and in float32. lm-eval: pip install 'aymen-gpt[lm-eval]'.
"""

import argparse
import importlib.util
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from alternating import Work, alternate, command

from aymen_gpt.commands.options import whole_number
from aymen_gpt.data import tokenizer
from aymen_gpt.evaluation import hellaswag
from aymen_gpt.evaluation.hellaswag import render, tokenize
from aymen_gpt.evaluation.hellaswag_data import Example, evenly_spaced, load_examples
from aymen_gpt.evaluation.load_model import load_model
from aymen_gpt.model import cpu
from aymen_gpt.model.gpt import GPT, PRESETS
from aymen_gpt.model.huggingface import config_to_huggingface, to_huggingface
from aymen_gpt.training import device as devices

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH_SIZES = (4, 16)  # of lm-eval: the two best of 1, 4 and 16


def the_model(name: str | None) -> GPT:
    place = devices.choose_device("auto").place
    if name is not None:
        return load_model(name, place)[0]
    return GPT(PRESETS["gpt2"], torch.Generator().manual_seed(0)).to(place).eval()


def ours(name: str | None, dtype: str) -> Work:
    if not torch.cuda.is_available():
        cpu.keep_freed_memory()  # as hellaswag.py does
    model = the_model(name)

    def work(examples: list[Example]) -> float:
        found = hellaswag.evaluate(model, examples, protocols=("harness",), dtype=DTYPES[dtype])
        return round(found.scores("harness")["acc_norm"] * len(examples))

    return work


def naive(name: str | None, dtype: str) -> Work:
    model = the_model(name)
    device = devices.choose_device("auto", dtype)
    return lambda examples: sum(naive_choice(model, example, device) == example.label for example in examples)


@torch.no_grad()
def naive_choice(model: GPT, example: Example, device: devices.Device) -> int:
    """The ending with the least loss per character, from four whole rows."""
    texts, (_, endings) = tokenize(example, "harness"), render(example, "harness")
    rows = [context + ending for context, ending in texts]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    scored = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        scored[i, len(texts[0][0]) : len(row)] = 1
    ids, scored = ids.to(device.place), scored.to(device.place)
    with device.autocast():
        logits = model(ids[:, :-1])[..., : tokenizer.VOCAB_SIZE].float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(rows), -1)
    lengths = torch.tensor([len(ending) for ending in endings], device=losses.device)
    return int(((losses * scored[:, 1:]).sum(dim=1) / lengths).argmin())


def lm_eval(name: str | None, dtype: str, batch_size: int) -> Work:
    """The harness's class of Hugging Face models, told what its task would tell it."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    model = the_model(name)
    twin = GPT2LMHeadModel(GPT2Config(**config_to_huggingface(model.config)))
    twin.load_state_dict(to_huggingface(model.state_dict(), model.config.vocab_size), strict=False)
    twin.tie_weights()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.write_huggingface_files(Path(folder))
        lm = HFLM(
            pretrained=twin.to(model.wte.weight.device, DTYPES[dtype]).eval(),
            tokenizer=AutoTokenizer.from_pretrained(folder),
            batch_size=batch_size,
            max_length=model.config.block_size,
        )

    def work(examples: list[Example]) -> float:
        texts = [render(example, "harness") for example in examples]
        requests = [
            Instance("loglikelihood", {}, (context, f" {ending}"), number)
            for context, endings in texts
            for number, ending in enumerate(endings)
        ]
        answers = iter(lm.loglikelihood(requests, disable_tqdm=True))
        right = 0
        for example, (_, endings) in zip(examples, texts, strict=True):
            scores = [next(answers)[0] / len(ending) for ending in endings]
            right += scores.index(max(scores)) == example.label
        return right

    return work


def speed(name: str | None, count: int, rounds: int) -> list[dict[str, Any]]:
    scorers: dict[str, Any] = {}
    for dtype in DTYPES:
        scorers[f"ours, {dtype}"] = partial(ours, name, dtype)
        scorers[f"naive, {dtype}"] = partial(naive, name, dtype)
        if importlib.util.find_spec("lm_eval"):
            for size in BATCH_SIZES:
                scorers[f"lm-eval, {dtype}, {size} rows"] = partial(lm_eval, name, dtype, size)
    chosen = evenly_spaced(load_examples(), count * (rounds + 1))
    tasks = [chosen[r :: rounds + 1] for r in range(rounds + 1)]
    timings = alternate(scorers, tasks[1:], warm_up=tasks[:1])
    return [
        {
            "scorer": scorer,
            "examples_per_second": count / timing.median,
            "best": count / min(timing.seconds),
            "ours_is_times": {dtype: timing.times_slower(timings[f"ours, {dtype}"]) for dtype in DTYPES},
            "peak_gb": timing.peak_gb,
            "right_in_last_round": timing.value,
            "seconds": timing.seconds,
        }
        for scorer, timing in timings.items()
    ]


def agreement(name: str | None, count: int) -> dict[str, Any]:
    """How many of ``count`` examples get the same choices in bfloat16 as in float32, by protocol."""
    model, examples = the_model(name), evenly_spaced(load_examples(), count)
    exact, rough = (hellaswag.evaluate(model, examples, dtype=dtype).answers for dtype in DTYPES.values())
    return {"n": len(examples)} | {
        protocol: {
            measure: sum(
                getattr(a, measure) == getattr(b, measure)
                for a, b in zip(exact[protocol], rough[protocol], strict=True)
            )
            for measure in ("choice", "choice_norm")
        }
        for protocol in hellaswag.PROTOCOLS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="HellaSwag examples per second against others, alternating")
    parser.add_argument("-m", "--model", metavar="NAME")
    parser.add_argument("--examples", type=whole_number, default=24, help="of a round [24]")
    parser.add_argument("--rounds", type=whole_number, default=5)
    parser.add_argument("--agreement", type=whole_number, default=0, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    device = devices.choose_device("auto")
    model = args.model or "GPT-2 124M, random weights"
    machine = f"{model}; {device.name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}, {args.rounds} rounds of {args.examples} examples\n")
    record: dict[str, Any] = {"command": command(), "machine": machine}
    if args.rounds:
        record["speed"] = speed(args.model, args.examples, args.rounds)
        print("| scorer | examples/s (best) | ours, float32, is | ours, bfloat16, is | peak GB |")
        print("|---|---|---|---|---|")
    for r in record.get("speed", []):
        times = " | ".join(f"{r['ours_is_times'][dtype]:.2f}x" for dtype in DTYPES)
        print(
            f"| {r['scorer']} | {r['examples_per_second']:.2f} ({r['best']:.2f}) | {times} | {r['peak_gb']:.2f} |"
        )
    if args.agreement:
        record["agreement"] = agreement(args.model, args.agreement)
        print(f"\nsame choices in bfloat16 as in float32: {record['agreement']}")
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
