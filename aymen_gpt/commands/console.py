"""What every command does at its edges: errors as one line and an exit code, progress, what to type next."""

import atexit
import errno
import io
import os
import re
import shlex
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from aymen_gpt.errors import AymenError, CannotWrite, Stopped, UsageError, printable, redact

ROOT = Path(__file__).absolute().parents[2]
OUTPUT_ENDS = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
DOORS = ("fineweb", "pretrain", "hellaswag", "generate")


def run(main: Callable[[], object]) -> NoReturn:
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
    code = 0
    try:
        with suppress(SystemExit):  # of --help
            main()
        sys.stdout.flush()
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


class Progress:
    """Shows on stderr how far a work is: a bar on a terminal, else a line every ten seconds."""

    def __init__(self) -> None:
        self.shown = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def say(self, line: str) -> None:
        """Print a line, above the bar."""
        if self.bar is not None:
            self.bar.write(printable(line), file=sys.stderr)
        else:
            print(printable(line), file=sys.stderr, flush=True)

    def move(self, share: float, line: str, *, last: bool = False) -> None:
        """Show that a share of the work (0 to 1) is done, and a line about it; the last one is always shown."""
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = self.bar or tqdm(total=1.0, bar_format="{percentage:3.0f}%|{bar:20}| {desc}", leave=False)
            self.bar.set_description_str(line, refresh=False)
            self.bar.update(min(share, 1) - self.bar.n)
        elif last or time.monotonic() - self.shown >= 10:
            self.shown = time.monotonic()
            self.say(f"{share:4.0%}  {line}")


# ---- commands as one would type them -----------------------------------------------------------------


def below(path: Path) -> str:
    """A path as one would type it: from here on where it lies below this folder."""
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def started() -> list[str]:
    """How this was started, where that is as "aymen-gpt COMMAND" or "python -m aymen_gpt COMMAND", else []."""
    path = Path(sys.argv[0])
    if path.parts[-2:] == ("aymen_gpt", "__main__.py"):
        return ["python", "-m", "aymen_gpt"]
    return [path.name] if path.name == "aymen-gpt" else []


def program(name: str) -> str:
    """How to type another of our commands, in the way that this one was started."""
    how, door = started(), ROOT / f"{name}.py"
    if how == ["aymen-gpt"]:
        return f"{how[0] if shutil.which(how[0]) == sys.argv[0] else below(Path(sys.argv[0]))} {name}"
    found = shutil.which("python")
    same = found is not None and Path(found).parent == Path(sys.executable).parent
    python = "python" if same else below(Path(sys.executable))
    return f"{python} {below(door)}" if door.is_file() and not how else f"{python} -m aymen_gpt {name}"


def command_line() -> list[str]:
    """The words of this command, for a record of what was typed."""
    return [*started(), *sys.argv[1:]] if started() else ["python", *sys.argv]


def as_typed(text: str) -> str:
    """A text with its commands, written as README does ("python generate.py"), as they work here."""
    return re.sub(rf"\bpython ({'|'.join(DOORS)})\.py\b", lambda found: program(found[1]), text)
