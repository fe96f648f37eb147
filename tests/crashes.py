"""Death at a chosen point, as kill -9 brings it: no ``finally``, no ``atexit``, nothing flushed.

A point is MOMENT:N:FUNCTION, before or after the N-th call of a function that is named where the product looks
it up: ``before:3:os.replace``, ``after:1:aymen_gpt.training.checkpoint:save_file``. With ``stop`` for ``before``
the process does not die there but hangs (SIGSTOP), until somebody sends SIGCONT.

    door("tests/crashes.py", "before:3:os.replace", "pretrain.py", "--steps", 8)      exit code 137
    door("tests/crashes.py", "after:1:os.replace", "RANK=1", "pretrain.py", ..., processes=3)

runs a door that dies there; with VAR=VALUE words, only where the environment says so (one rank of torchrun,
TORCHELASTIC_RESTART_COUNT=0 for its first attempt). ``killed`` does the same to a function of a test, in a forked
child, in milliseconds.
"""

import functools
import importlib
import itertools
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
CODE = 137  # what a shell says of a process that kill -9 ended


def arm(point):
    """From now on this process dies when it comes to the point."""
    moment, nth, target = point.split(":", 2)
    assert moment in ("before", "after", "stop"), point
    module, _, attribute = target.rpartition(":" if ":" in target else ".")
    *path, name = attribute.split(".")
    owner = functools.reduce(getattr, path, importlib.import_module(module))
    real, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(real)
    def dying(*args, **more):
        last = next(calls) == int(nth)
        if last and moment == "before":
            os._exit(CODE)
        if last and moment == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        result = real(*args, **more)
        if last and moment == "after":
            os._exit(CODE)
        return result

    setattr(owner, name, dying)


def killed(point, work):
    """Whether the work, done in a forked child, died at the point. It is finished when it did not."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            arm(point)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:  # the test's time is up
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    assert code in (0, CODE), f"the work failed before {point}: exit code {code}"
    return code == CODE


def points(function):
    """before:1:..., after:1:..., before:2:... without end."""
    for nth in itertools.count(1):
        yield f"before:{nth}:{function}"
        yield f"after:{nth}:{function}"


def main(point, *words):
    conditions = list(itertools.takewhile(lambda word: "=" in word, words))
    script, *sys.argv[1:] = words[len(conditions) :]
    sys.argv[0] = str(ROOT / script)
    sys.path[0] = str(ROOT)
    if all(os.environ.get(name) == value for name, _, value in (word.partition("=") for word in conditions)):
        arm(point)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
