"""The faults this project survives, and a pytest plugin that says which of them have been proven just now.

A test that shows what is promised for a row carries ``@pytest.mark.fault(row)``. ``make test-faults`` runs those
tests (pytest -p tests.faults -m fault) and ends with one line a row; it fails when a row has no test.
"""

from collections import defaultdict

import pytest

ROWS = {
    1: "kill -9 between two steps",
    2: "kill -9 inside the saving of a checkpoint",
    3: "SIGTERM to one process",
    4: "SIGTERM to torchrun",
    5: "SIGTERM to one rank alone",
    6: "Ctrl-C, once and twice",
    7: "kill -9 of one rank",
    8: "one rank hangs",
    9: "torchrun starts a crashed run again",
    10: "resumed on another number of processes",
    11: "processes that do not divide the rows",
    12: "resumed with another rate, schedule or log",
    13: "resumed as another run: model, data, seed, batch",
    14: "checkpoint file cut short",
    15: "one bit of a checkpoint flipped",
    16: "checkpoint with a file missing, or one too many",
    17: "no checkpoint can be trusted",
    18: "resuming where there is nothing yet",
    19: "pickle that would run a command",
    20: "checkpoint of the project's first version",
    21: "disk full at a checkpoint",
    22: "disk full at a shard",
    23: "disk full at the log",
    24: "run folder is read-only",
    25: "two trainings in one folder",
    26: "two preparations in one folder",
    27: "loss not finite",
    28: "gradient not finite",
    29: "loss jumps",
    30: "weights in a checkpoint not finite",
    31: "token id outside the vocabulary",
    32: "shard of other integers than uint16",
    33: "shard cut, empty, or no shard at all",
    34: "one bit of a shard flipped",
    35: "shards of another tokenizer",
    36: "too little to validate on",
    37: "corpus too small for two splits",
    38: "shard about as long as a row",
    39: "document longer than a shard",
    40: "texts that are empty, endless or odd",
    41: "parquet rows without usable text",
    42: "parquet file cut short",
    43: "download with wrong bytes",
    44: "server fails once",
    45: "server fails for ever, no network, offline",
    46: "file not on the server, or not for us",
    47: "download cut off or stalled",
    48: "error page instead of HellaSwag",
    49: "kill -9 of a preparation or one of its workers",
    50: "other numbers of workers",
    51: "model files damaged or of another shape",
    52: "model with rows beyond the vocabulary",
    53: "name that leads out of its folder",
    54: "secrets in what we write",
    55: "experiment tracker fails",
    56: "out of memory",
    57: "clock set back",
    58: "blanks and letters of all kinds in paths",
    59: "server open to the network",
    60: "server asked too much",
    61: "report of an empty or torn run",
}

reports = defaultdict(list)  # row: the reports of its tests, three a test (setup, call, teardown)


def pytest_collection_modifyitems(items):
    for item in items:
        for row in {row for mark in item.iter_markers("fault") for row in mark.args}:
            if row not in ROWS:
                raise pytest.UsageError(f"{item.nodeid} is marked fault({row!r}); there is no such row")
            item.user_properties.append(("fault", row))


def pytest_runtest_logreport(report):
    for name, value in report.user_properties:  # as the workers of pytest-xdist send them
        if name == "fault":
            reports[value].append(report)


def outcome(row):
    """passed, failed, or why it is neither."""
    if not reports[row]:
        return "no test"
    if any(report.failed for report in reports[row]):
        return "failed"
    skipped = [report.longrepr[2].removeprefix("Skipped: ") for report in reports[row] if report.skipped]
    if any(report.passed and report.when == "call" for report in reports[row]):
        return f"passed ({len(skipped)} skipped: {skipped[0]})" if skipped else "passed"
    return f"skipped: {skipped[0]}"


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput") and any(outcome(row) == "no test" for row in ROWS):
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config):
    """The table, below all that pytest says."""
    if hasattr(config, "workerinput") or not reports:
        return
    print(f"\n{'row':>3}  {'fault':<50} {'tests':>5} {'seconds':>7}  outcome")
    for row, fault in ROWS.items():
        tests = len({report.nodeid for report in reports[row]})
        print(f"{row:>3}  {fault:<50} {tests:>5} {sum(r.duration for r in reports[row]):>7.1f}  {outcome(row)}")
    green = sum(outcome(row).startswith("passed") for row in ROWS)
    print(f"{green} of {len(ROWS)} rows green")
