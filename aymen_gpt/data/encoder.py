"""Documents to GPT-2 ids as fast as this machine can: gigatoken where it is installed, else tiktoken.

gigatoken (https://pypi.org/project/gigatoken) is about ten times faster than tiktoken. It is built from our
vocabulary, without special tokens, so that <|endoftext|> in a text is plain text. tiktoken defines what is
right. It encodes the few texts with characters that only gigatoken takes for letters or numbers, and while shards
are prepared a sample of the others too (workers.py).
"""

import base64
import functools
import os
import re
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


# Unicode 17 (gigatoken 0.10) has 4,657 letters and numbers that Unicode 16 (tiktoken 0.14) has not: behind one of
# them gigatoken alone cuts off "'s". This is where they are, with few others between them.
UNLIKE = re.compile(
    "[\u088f\u0c5c\u0cdc\ua7ce-\ua7d4\ua7f1\U00010940-\U00010959\U00010ec5-\U00010ec7\U00011db0-\U00011de9"
    "\U00016ea0-\U00016ed3\U00016ff2-\U00016ff6\U000187f8-\U00018df2\U0001e6c0-\U0001e6ff\U0002b73a-\U0002b73f"
    "\U0002cea2-\U0002cead\U000323b0-\U00033479]"
)
# The first two bytes that each of them has in UTF-8.
UNLIKE_BEGIN = np.zeros(2**16, bool)
UNLIKE_BEGIN[
    [0xE0A2, 0xE0B1, 0xE0B3, 0xEA9F, *(0xF000 | byte for byte in b"\x90\x91\x96\x98\x9e\xab\xac\xb2\xb3")]
] = True


def _unlike(text: bytes) -> bool:
    """Whether a text may have characters that gigatoken takes for letters or numbers and tiktoken does not."""
    if not (b"\xe0" in text or b"\xea" in text or b"\xf0" in text):  # of English, 99 texts in 100
        return False
    letters = np.frombuffer(text, np.uint8)
    begins = np.flatnonzero(letters >= 0xE0)
    pairs = letters[begins].astype(np.uint16) << 8 | letters[begins + 1]
    return bool(UNLIKE_BEGIN[pairs].any()) and bool(UNLIKE.search(text.decode()))


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
        if _unlike(text):
            return tokenizer.encode(text.decode())
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
