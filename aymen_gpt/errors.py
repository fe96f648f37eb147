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

import os
import re


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


SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY", re.IGNORECASE)


def redact(text: str) -> str:
    """Text without what must never be shown or kept: passwords in addresses, secrets of the environment.

    >>> redact("https://user:hunter2@example.org/data")
    'https://***@example.org/data'
    """
    text = re.sub(r"(://)[^/@\s\"']+@", r"\1***@", text)
    for name, value in os.environ.items():
        if SECRET_NAMES.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    return text
