"""What can go wrong for a user, and the exit code each kind has (after BSD's sysexits.h).

Raise one of these with one line that says what, where and what to do next; the commands print it
without a traceback. A bug of ours stays an ordinary exception and keeps its traceback.

    AymenError
    ├── UsageError     2   an option or a combination of options makes no sense   (also a ValueError)
    ├── DataError     65   a shard, parquet file or checkpoint is missing or bad  (also a ValueError)
    ├── NetworkError  69   a download failed after its retries                    (also an OSError)
    ├── CannotWrite   73   disk full, read-only, or the folder is in use          (also an OSError)
    └── Stopped       75   a signal came, the work is saved: run the same command again

Every room may import this module; it imports none of them.
"""

import difflib
import os
import re
from collections.abc import Iterable
from typing import Any


class AymenError(Exception):
    """Base of all errors that speak to the user."""

    exit_code = 1


class UsageError(AymenError, ValueError):
    exit_code = 2


class DataError(AymenError, ValueError):
    exit_code = 65


class NetworkError(AymenError, OSError):
    exit_code = 69


class CannotWrite(AymenError, OSError):
    exit_code = 73


class Stopped(AymenError):
    exit_code = 75


def nearest(word: str, known: Iterable[str]) -> str:
    """
    >>> nearest("gtp2", ["gpt2", "demo"]), nearest("x", ["gpt2"])
    ('; did you mean gpt2?', '')
    """
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


CONTROLS = {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if chr(c) not in "\t\n"}
CONTROLS |= {c: f"\\u{c:04x}" for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}  # they turn text around


def printable(text: str) -> str:
    """Text that cannot command a terminal: control characters but tabs and line ends become their numbers.

    >>> print(printable("\\x1b[2J red"))
    \\x1b[2J red
    """
    return text.translate(CONTROLS)


SECRET_NAMES = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY)S?(?![A-Z])(?!.*(PATH|DIR|FILE|HOME)$)", re.I
)


def redact(value: Any) -> Any:
    """A text, or all texts in lists and dicts, without what must never be shown or kept: passwords in addresses,
    secrets of the environment.

    >>> redact(["https://user:hunter2@example.org/data", 1])
    ['https://***@example.org/data', 1]
    """
    if isinstance(value, dict):
        return {redact(key): redact(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(v) for v in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"(://)[^/@\s\"']+@", r"\1***@", value)
    for name, secret in os.environ.items():
        if SECRET_NAMES.search(name) and len(secret) >= 8:
            value = value.replace(secret, "***")
    return value
