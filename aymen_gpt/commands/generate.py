"""generate.py: a model and a prompt -> text, streamed to the terminal."""

import argparse
import codecs
import sys
from typing import TYPE_CHECKING

from aymen_gpt.commands import console
from aymen_gpt.errors import UsageError

if TYPE_CHECKING:
    from aymen_gpt.model.gpt import GPT

EXAMPLES = """\
  python generate.py -m runs/demo "The function returns"
  python generate.py -m gpt2 "Hello, I'm a language model," --temperature 0.8 --top-p 0.95 -n 3
  echo "A prompt from a pipe" | python generate.py -m runs/demo -
"""


def parser() -> argparse.ArgumentParser:
    p = console.parser("Continue a text with a trained model.", EXAMPLES)
    p.add_argument("prompt", nargs="?", default="", help="text to continue; - reads it from standard input [none]")
    p.add_argument(
        "-m", "--model", required=True, metavar="NAME", help="a run, a checkpoint, gpt2 or another Hub id"
    )
    p.add_argument("-d", "--device", default="auto", help="auto, cpu, mps, cuda or cuda:N [auto]")
    p.add_argument(
        "--max-tokens", type=console.whole_number, default=200, metavar="N", help="tokens to write [200]"
    )
    p.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 takes the likeliest token [0.8]")
    p.add_argument(
        "--top-k", type=console.whole_number, default=50, metavar="N", help="of the N likeliest tokens [50]"
    )
    p.add_argument(
        "--top-p", type=float, default=None, metavar="X", help="of the likeliest with this probability [all]"
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed writes the same text [0]")
    p.add_argument("-n", "--samples", type=console.whole_number, default=1, metavar="N", help="texts to write [1]")
    return p


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)

    from aymen_gpt.model.generation import check_sampling

    try:
        check_sampling(options.temperature, options.top_k, options.top_p)
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    if options.samples < 1 or options.max_tokens < 1:
        raise UsageError("--samples and --max-tokens must be at least 1")
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt

    from aymen_gpt.evaluation.load_model import load_model
    from aymen_gpt.training.device import choose_device

    device = choose_device(options.device)
    model = load_model(options.model, device.place).model
    for number in range(options.samples):
        if options.samples > 1:
            print(f"--- sample {number + 1}")
        stream(model, prompt, options, seed=options.seed + number)
    return 0


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
    print(prompt, end="", flush=True)
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in continuation:
        print(characters.decode(encoding.decode_single_token_bytes(token)), end="", flush=True)
    print(characters.decode(b"", final=True))
