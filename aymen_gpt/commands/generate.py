"""generate.py: a model and a prompt -> text, streamed to the terminal."""

import argparse
import codecs
import os
import sys

from aymen_gpt.commands import console
from aymen_gpt.data import tokenizer
from aymen_gpt.errors import DataError, UsageError
from aymen_gpt.evaluation.load_model import load_model
from aymen_gpt.model.generation import generate
from aymen_gpt.model.gpt import GPT
from aymen_gpt.training.device import choose_device


def main(options: argparse.Namespace) -> None:
    prompt = text_of(options.prompt)
    device = choose_device(options.device)
    model = load_model(options.model, device.place).model
    for number in range(options.samples):
        if options.samples > 1:
            console.show(f"--- sample {number + 1}")
        stream(model, prompt, options, seed=(options.seed + number) % 2**63)


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


def stream(model: GPT, prompt: str, options: argparse.Namespace, *, seed: int) -> None:
    """Print the prompt and then each piece of text as soon as its bytes make whole characters."""
    encoding = tokenizer.gpt2()
    continuation = generate(
        model,
        encoding.encode_ordinary(prompt) or [tokenizer.EOT],
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
