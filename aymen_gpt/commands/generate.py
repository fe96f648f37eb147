"""generate.py: a model and a prompt -> text, streamed to the terminal."""

import argparse
import codecs
import os
import sys
from typing import TYPE_CHECKING

from aymen_gpt.commands import console
from aymen_gpt.errors import DataError, UsageError
from aymen_gpt.training.config import COUNT, SEEDS, Range

if TYPE_CHECKING:
    from aymen_gpt.model.gpt import GPT

EXAMPLES = """\
  python generate.py -m runs/demo "The function returns"
  python generate.py -m gpt2 "Hello, I'm a language model," --temperature 0.8 --top-p 0.95 -n 3
  echo "A prompt from a pipe" | python generate.py -m runs/demo -
"""


def parser() -> argparse.ArgumentParser:
    p = console.parser(
        "Continue a text with a trained model.", EXAMPLES, "python generate.py -m NAME [PROMPT] [-n N] ..."
    )
    p.add_argument("prompt", nargs="?", default="", help="text to continue; - reads it from standard input [none]")
    p.add_argument(
        "-m",
        "--model",
        type=console.name,
        required=True,
        metavar="NAME",
        help="a run, a checkpoint, gpt2 or another Hub id",
    )
    p.add_argument("-d", "--device", default="auto", help="auto, cpu, mps, cuda or cuda:N [auto]")
    numbers = {
        "--max-tokens": (COUNT, True, 200, "tokens to write [200]"),
        "--temperature": (Range(0, 1000), False, 0.8, "0 takes the likeliest token [0.8]"),
        "--top-k": (COUNT, True, 50, "of the N likeliest tokens [50]"),
        "--top-p": (Range(0, 1, without=(0,)), False, None, "of the likeliest with this probability [all]"),
        "--seed": (SEEDS, True, 0, "the same seed writes the same text [0]"),
        "-n/--samples": (COUNT, True, 1, "texts to write [1]"),
    }
    for flags, (range, whole, default, help) in numbers.items():
        p.add_argument(
            *flags.split("/"),
            type=console.number(range, whole=whole),
            default=default,
            metavar="N" if whole else "X",
            help=help,
        )
    return p


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    prompt = text_of(options.prompt)

    from aymen_gpt.evaluation.load_model import load_model
    from aymen_gpt.training.device import choose_device

    device = choose_device(options.device)
    model = load_model(options.model, device.place).model
    for number in range(options.samples):
        if options.samples > 1:
            console.show(f"--- sample {number + 1}")
        stream(model, prompt, options, seed=(options.seed + number) % 2**63)
    return 0


def text_of(prompt: str) -> str:
    """The prompt, from standard input for "-"; UsageError or DataError for bytes that are no UTF-8."""
    if prompt == "-" and sys.stdin is None:
        raise UsageError("the prompt - is standard input, which is closed")
    given = sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt)
    try:
        return given.decode()
    except UnicodeDecodeError as error:
        where = "standard input" if prompt == "-" else "the prompt"
        raise DataError(f"{where} is no UTF-8 text: byte {given[error.start]:#x} at {error.start}") from None


def stream(model: "GPT", prompt: str, options: argparse.Namespace, *, seed: int) -> None:
    """Print the prompt and then each piece of text as soon as its bytes make whole characters."""
    from aymen_gpt.data import tokenizer
    from aymen_gpt.model.generation import generate

    encoding = tokenizer.gpt2()
    tokens = encoding.encode_ordinary(prompt) or [tokenizer.EOT]
    continuation = generate(
        model,
        tokens,
        options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=seed,
        stop=tokenizer.EOT,
    )
    console.show(prompt, end="")
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in continuation:
        console.show(characters.decode(encoding.decode_single_token_bytes(token)), end="")
    console.show(characters.decode(b"", final=True))


if __name__ == "__main__":
    console.run(main)
