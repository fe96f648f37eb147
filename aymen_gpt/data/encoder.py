"""Documents to GPT-2 ids as fast as this machine can: gigatoken where it is installed, else tiktoken.

gigatoken (https://pypi.org/project/gigatoken) is about ten times faster than tiktoken. It is built from our
vocabulary, without special tokens, so that <|endoftext|> in a text is plain text. tiktoken defines what is
right: while shards are prepared a sample of the documents is encoded by both (prepare.py).
"""

import base64
import functools
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from aymen_gpt import files
from aymen_gpt.data import fetch, tokenizer
from aymen_gpt.errors import CannotWrite

if TYPE_CHECKING:
    import gigatoken

EncoderName = Literal["gigatoken", "tiktoken"]

WHEEL = "gigatoken==0.10.0"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
CHECKED = 2**25  # bytes of text between two looks at the memory
REMEMBERED = 2**28  # bytes that a process may grow by before gigatoken must forget the words it has met


def missing() -> str | None:
    """Why gigatoken cannot be used here, None when it can."""
    try:
        import gigatoken  # noqa: F401

        _rank_file()
    except ImportError:
        return f"`pip install {WHEEL}` makes this several times faster"
    except CannotWrite as error:
        return f"gigatoken would be faster, but {error}"
    return None


def version(name: EncoderName) -> str:
    return metadata.version(name)


def encode_documents(texts: list[bytes], name: EncoderName) -> list[np.ndarray]:
    """The ids of each text (UTF-8), equal to ``tokenizer.encode`` whichever encoder it is; uint16 or uint32."""
    if name == "tiktoken":
        return [tokenizer.encode(text.decode()) for text in texts]
    encoder = _gigatoken()
    return [encoder.encode(text) for text in texts]


@functools.cache
def _gigatoken() -> "Gigatoken":
    return Gigatoken(resident_bytes)


class Gigatoken:
    """gigatoken's encoder in bounded memory.

    It remembers every word it has met: 0.3 bytes for a byte of English, up to 10 for a byte of random letters.
    So it is built anew (0.15 s) when the process has grown too much, or where nobody can tell, every 32 MB.
    """

    def __init__(self, memory: Callable[[], int | None]) -> None:
        self._memory = memory
        self._encoder = build()
        self._at_first = memory()
        self._unchecked = 0  # bytes of text since the last look at the memory

    def encode(self, text: bytes) -> np.ndarray:
        if len(text) <= tokenizer.PIECE:
            return self._encode(text)
        return np.concatenate([self._encode(piece.encode()) for piece in tokenizer.pieces(text.decode())])

    def _encode(self, text: bytes) -> np.ndarray:
        self._unchecked += len(text)
        if self._unchecked > CHECKED:
            self._unchecked = 0
            now = self._memory()
            if now is None or self._at_first is None or now - self._at_first > REMEMBERED:
                self._encoder = build()
        return self._encoder.encode(text)


def build() -> "gigatoken.Tokenizer":
    """A fresh gigatoken encoder with GPT-2's ranks and pattern."""
    import gigatoken

    return gigatoken.Tokenizer.from_tiktoken(_rank_file(), "gpt2", special_tokens={})


def _rank_file() -> Path:
    """Our vocabulary as OpenAI's r50k_base.tiktoken, byte for byte; made in our cache when it is not there."""
    path = fetch.cache_dir() / "r50k_base.tiktoken"
    if not path.is_file() or files.sha256(path) != RANKS_SHA256:
        lines = [b"%s %d\n" % (base64.b64encode(token), id) for token, id in tokenizer.ranks().items()]
        files.write_whole(path, b"".join(lines))
    return path


def resident_bytes() -> int | None:
    """The memory that this process has now; None where it cannot be asked cheaply (all but Linux)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
