"""HellaSwag's examples as the texts, and then the tokens, of the two protocols.

Tokens of a set are kept in our cache under the hash of what they follow from: the examples, the vocabulary and the
protocol.
"""

import hashlib
import io
import re
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np

from aymen_gpt.data import fetch, tokenizer
from aymen_gpt.evaluation.examples import N_ENDINGS, Example, content_sha256
from aymen_gpt.evaluation.packing import TokenizedExample
from aymen_gpt.files import write_whole

Protocol = Literal["completion", "harness"]
PROTOCOLS: tuple[Protocol, ...] = ("completion", "harness")
CACHE_FROM = 1000  # examples; fewer are tokenized sooner than looked up


def render_completion(example: Example) -> tuple[str, list[str]]:
    """Context and endings as they stand."""
    return example.ctx, example.endings


def render_harness(example: Example) -> tuple[str, list[str]]:
    """Context and endings after the harness's cleaning.

    ``capitalize`` also lowers the rest of ctx_b; that is what the published harness scores are made with.

    >>> render_harness(Example(0, "Tea", "[header] A [title] B.", "he Pours", "", ["a [step] b", "c"], 0))
    ('Tea: A. B. He pours', ['a b', 'c'])
    """
    context = f"{example.activity_label}: {example.ctx_a} {example.ctx_b.capitalize()}"
    return _clean(context), [_clean(ending) for ending in example.endings]


def _clean(text: str) -> str:
    """Strip, end a sentence at each title, drop what is in brackets, halve double spaces (once, as written)."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


RENDER: dict[Protocol, Callable[[Example], tuple[str, list[str]]]] = {
    "completion": render_completion,
    "harness": render_harness,
}


def tokenize(example: Example, protocol: Protocol) -> TokenizedExample:
    """The token ids of a rendering. The harness's endings are what the whole text has after the context's tokens;
    blanks that end a context count to the ending there."""
    encode = tokenizer.gpt2().encode_ordinary
    context, endings = RENDER[protocol](example)
    if protocol == "completion":
        return TokenizedExample(encode(context), [encode(f" {ending}") for ending in endings])
    ids = encode(context.rstrip())
    return TokenizedExample(ids, [encode(f"{context} {ending}")[len(ids) :] for ending in endings])


def tokenize_all(examples: Sequence[Example], protocol: Protocol) -> list[TokenizedExample]:
    """The tokens of a set, from the cache if it has them; a cache that cannot be used is done without."""
    if len(examples) < CACHE_FROM:
        return [tokenize(example, protocol) for example in examples]
    identity = f"{content_sha256(examples)} {tokenizer.vocabulary_sha256()} {protocol}"
    cached = fetch.cache_dir() / "hellaswag-tokens" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
    with suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):  # not there yet, or damaged
        return _read_tokens(cached)
    tokenized = [tokenize(example, protocol) for example in examples]
    with suppress(OSError):
        write_whole(cached, _tokens_file(tokenized))
    return tokenized


def _tokens_file(tokenized: Sequence[TokenizedExample]) -> bytes:
    texts = [text for example in tokenized for text in (example.context, *example.endings)]
    out = io.BytesIO()
    lengths = np.array([len(text) for text in texts], dtype=np.int32)
    np.savez(out, tokens=np.concatenate(texts).astype(np.uint16), lengths=lengths)
    return out.getvalue()


def _read_tokens(path: Path) -> list[TokenizedExample]:
    """ValueError or BadZipFile (numpy's archives carry checksums) for a damaged file."""
    with np.load(path, allow_pickle=False) as found:
        tokens, ends = found["tokens"].tolist(), found["lengths"].cumsum().tolist()
    texts = [tokens[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    step = 1 + N_ENDINGS
    return [TokenizedExample(texts[i], texts[i + 1 : i + step]) for i in range(0, len(texts), step)]
