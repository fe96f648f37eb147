"""What every command does at its edges: errors become one line and an exit code, flags speak of tokens."""

import argparse
import atexit
import io
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from aymen_gpt.errors import AymenError, Stopped, UsageError, redact


def run(main: Callable[[], int]) -> NoReturn:
    """Run a command to its exit code: errors that speak to the user print one line, bugs keep their traceback.

    AYMEN_GPT_DEBUG=1 shows the traceback of the former too.
    """
    # GNU's OpenMP lets a thread that waits for another spin for milliseconds. On a machine that also does other
    # work, it spins on the core the other one needs: training ran 6 times slower (docs/experiments.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal or file that cannot show a letter gets its number
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main()
    except AymenError as error:
        if os.environ.get("AYMEN_GPT_DEBUG"):
            traceback.print_exc()
        say(error)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our output went away, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    leave(code)


def leave(code: int) -> NoReturn:
    """End the process. One of several does not wait for the C++ destructors of torch.distributed.

    They abort a rank now and then when all is done and saved (torch 2.13 with Gloo, "terminate called without an
    active exception": 2 of about 80 runs of several ranks), and torchrun then calls the run failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "torch.distributed" in sys.modules:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def say(error: AymenError) -> None:
    """The one line of an error. Under torchrun what every rank finds alike is said by the first one only."""
    rank = int(os.environ.get("RANK", 0))
    text = redact(str(error))
    if rank == 0:
        print(text if isinstance(error, Stopped) else f"error: {text}", file=sys.stderr)
    elif not isinstance(error, Stopped | UsageError):
        print(f"rank {rank}: error: {text}", file=sys.stderr)


def parser(description: str, examples: str) -> argparse.ArgumentParser:
    """An argument parser whose help ends with examples."""
    return argparse.ArgumentParser(
        description=description,
        epilog="examples:\n" + examples,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=110),
    )


def whole_number(text: str) -> int:
    """A whole number as people write large ones: 524288, 524_288, 5e5, 2**19.

    >>> [whole_number(t) for t in ("12", "524_288", "1e8", "2**19")]
    [12, 524288, 100000000, 524288]
    """
    base, power, exponent = text.partition("**")
    value = int(base) ** int(exponent) if power else float(text) if "e" in text.lower() else int(text)
    if not math.isfinite(value) or value != int(value):
        raise ValueError(f"{text} is not a whole number")
    return int(value)


whole_number.__name__ = "whole number"  # argparse names the type in its message
