"""What every command does at its edges: words in, errors out as one line and an exit code."""

import argparse
import atexit
import errno
import io
import math
import os
import re
import shlex
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import aymen_gpt
from aymen_gpt.errors import AymenError, CannotWrite, Stopped, UsageError, nearest, printable, redact
from aymen_gpt.training.config import Range

ROOT = Path(aymen_gpt.__file__).absolute().parent.parent
OUTPUT_ENDS = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
DOORS = ("fineweb", "pretrain", "hellaswag", "generate")


def run(main: Callable[[], int]) -> NoReturn:
    """Run a command to its exit code: errors that speak to the user print one line, bugs keep their traceback.

    AYMEN_GPT_DEBUG=1 shows the traceback of the former too.
    """
    # GNU's OpenMP lets a thread that waits for another spin for milliseconds. On a machine that also does other
    # work, it spins on the core the other one needs: training ran 6 times slower (docs/experiments.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    warnings.formatwarning = lambda message, *_: f"warning: {printable(str(message))}\n"
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal or file that cannot show a letter gets its number
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = finish(main)
    except AymenError as error:
        if os.environ.get("AYMEN_GPT_DEBUG"):
            traceback.print_exc()
        say(error)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except OSError as error:
        code = output_failed(error)
    except Exception:  # a bug
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        traceback.print_exc()  # now: at its end Python would wait for the other ranks first
        code = 1
    leave(code)


def finish(main: Callable[[], int]) -> int:
    """The exit code of a command whose output is all written."""
    try:
        code = main()
    except SystemExit as ended:  # of --help
        code = int(ended.code or 0)
    sys.stdout.flush()
    return code


def output_failed(error: OSError) -> int:
    """The exit code when standard output takes nothing more; any other error is a bug and keeps its traceback."""
    if error.filename is not None or error.errno not in OUTPUT_ENDS:
        raise error
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is not tried again at the end
    if error.errno == errno.EPIPE:  # the reader of our output went away, as head does
        return 1
    say(CannotWrite(f"cannot write standard output: {error.strerror}"))
    return CannotWrite.exit_code


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
    text = printable(redact(as_typed(str(error))))
    if rank == 0:
        print(text if isinstance(error, Stopped) else f"error: {text}", file=sys.stderr)
    elif not isinstance(error, Stopped | UsageError):
        print(f"rank {rank}: error: {text}", file=sys.stderr)


def show(text: str, end: str = "\n") -> None:
    """Print what may come from anywhere (a model, a file's name): a terminal gets control characters escaped."""
    print(printable(text) if sys.stdout.isatty() else text, end=end, flush=True)


def below(path: Path) -> str:
    """A path as one would type it: from here on where it lies below this folder."""
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def python() -> str:
    """How to type the interpreter that runs this."""
    found = shutil.which("python")
    same = found is not None and Path(found).parent == Path(sys.executable).parent
    return "python" if same else below(Path(sys.executable))


def as_script() -> tuple[str, str]:
    """(script, command) of "aymen-gpt COMMAND" or "python -m aymen_gpt COMMAND": sys.argv[0] holds both then."""
    started, _, name = sys.argv[0].rpartition(" ")
    return (started, name) if name.isidentifier() else ("", "")


def program(name: str) -> str:
    """How to type another of our commands, in the way that this one was started."""
    started, _ = as_script()
    if started and not started.endswith(".py"):
        short = os.path.basename(started)
        return f"{short if shutil.which(short) == started else below(Path(started))} {name}"
    door = ROOT / f"{name}.py"
    return f"{python()} -m aymen_gpt {name}" if started or not door.is_file() else f"{python()} {below(door)}"


def command_line() -> list[str]:
    """The words of this command, for a record of what was typed."""
    started, name = as_script()
    if not started:
        return ["python", *sys.argv]
    first = ["python", "-m", "aymen_gpt"] if started.endswith(".py") else [os.path.basename(started)]
    return [*first, name, *sys.argv[1:]]


def as_typed(text: str) -> str:
    """A text with its commands, written as README does ("python generate.py"), as they work here."""
    return re.sub(rf"\bpython ({'|'.join(DOORS)})\.py\b", lambda found: program(found[1]), text)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with an argument; for an unknown one the nearest, and the usage."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it, but what nobody knows is said before what is missing: it may be what is missing."""
        for word in sys.argv[1:] if args is None else args:
            if word == "--":
                break
            name = word.partition("=")[0]
            like_an_option = word.startswith("--") and " " not in word
            if like_an_option and not any(known.startswith(name) for known in self._option_string_actions):
                self.error(f"unrecognized arguments: {word}")
        return super().parse_known_args(args, namespace)

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file)  # argparse's own keeps silent about a full disk

    def error(self, message: str) -> NoReturn:
        of_one = re.match(r"argument (?:\S+/)?(-[\w-]+): (.*)", message, re.DOTALL)
        if of_one:
            raise UsageError(f"{of_one[1]} {of_one[2]}")
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            word, _, _ = unknown[1].partition("=")
            options = {initials(option): option for option in self._option_string_actions}
            near = (
                f"; did you mean {options[word]}?"
                if word in options
                else nearest(word, self._option_string_actions)
            )
            is_option = word.startswith("-")
            message = (
                f"there is no option {unknown[1]}{near}" if is_option else f"{unknown[1]} belongs to no option"
            )
        raise UsageError(f"{message}\nusage: {self.usage or self.prog} (--help lists all)")


def initials(option: str) -> str:
    """
    >>> initials("--learning-rate")
    '--lr'
    """
    return "--" + "".join(part[:1] for part in option.strip("-").split("-"))


def parser(description: str, examples: str, usage: str = "") -> argparse.ArgumentParser:
    """An argument parser whose help ends with examples; ``usage`` is what is typed most, after the command."""
    p = Parser(
        usage=as_typed(usage) or None,
        description=description,
        epilog=f"examples:\n{as_typed(examples)}" if examples else None,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=110),
    )
    p.add_argument("--version", action="version", version=f"aymen-gpt {aymen_gpt.__version__}")
    return p


def number(range: Range, *, whole: bool = False, unset: str = "") -> Callable[[str], Any]:
    """For argparse: text -> a number in the range, or None for 0 and the word ``unset``."""

    def read(text: str) -> float | None:
        if unset and text in ("0", unset):
            return None
        try:
            value = whole_number(text) if whole else float(text)
        except (ValueError, OverflowError):
            value = math.nan
        if value in range:
            return value
        zero = ", or 0" if unset and 0 not in range else ""
        raise argparse.ArgumentTypeError(f"{text}: expected a {'whole ' if whole else ''}number {range}{zero}")

    return read


def choice(words: Iterable[str]) -> Callable[[str], str]:
    """For argparse: one of some words."""
    known = list(words)

    def read(text: str) -> str:
        if text in known:
            return text
        raise argparse.ArgumentTypeError(f"{text}: expected {', '.join(known)}{nearest(text, known)}")

    return read


def name(text: str) -> str:
    """For argparse: text that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("'': expected a name")
    return text


def path(text: str) -> Path:
    """For argparse: a path, which "" is not."""
    return Path(name(text))


def whole_number(text: str) -> int:
    """A whole number as people write large ones: 524288, 524_288, 5e5, 2**19.

    >>> [whole_number(t) for t in ("12", "524_288", "1e8", "2**19")]
    [12, 524288, 100000000, 524288]
    """
    base, power, exponent = text.partition("**")
    if power and not 0 <= int(exponent) <= 64:
        raise ValueError(f"{text} is out of all ranges")
    value = int(base) ** int(exponent) if power else float(text) if "e" in text.lower() else int(text)
    if not math.isfinite(value) or value != int(value):
        raise ValueError(f"{text} is not a whole number")
    return int(value)
