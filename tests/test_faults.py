"""make test-faults: its table says of each row what its tests said, from however many processes they ran in."""

import os
import re
import subprocess
import sys

import faults
from conftest import ROOT

TESTS = """
import pytest
@pytest.mark.fault(1, 2)
def test_right(): pass
@pytest.mark.fault(2)
def test_wrong(): assert False
@pytest.mark.fault(3)
@pytest.mark.parametrize("n", range(3))
def test_thrice(n): n == 2 and pytest.skip("no third")
@pytest.mark.fault(4)
def test_nowhere(): pytest.skip("not here")
@pytest.mark.fault(5)
def test_setup(nothing_of_this_name): pass
def test_of_no_row(): assert False
"""


def run(path, *words):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.faults", "-m", "fault", str(path), *words]
    few_plugins = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # they take most of the time
    return subprocess.run(command, cwd=ROOT, env=few_plugins, capture_output=True, text=True)


def test_the_table_says_what_the_tests_said_in_two_processes(tmp_path):
    (tmp_path / "test_rows.py").write_text(TESTS)
    done = run(tmp_path, "-p", "xdist", "-n", "2")
    assert done.returncode == 1
    table = re.findall(r"^ *(\d+)  .{50} +(\d+) +\d+\.\d  (.*)$", done.stdout, re.MULTILINE)
    said = {int(row): (int(tests), outcome) for row, tests, outcome in table}
    assert said.keys() == set(range(1, 62))
    assert said[1] == (1, "passed")
    assert said[2] == (2, "failed")
    assert said[3] == (3, "passed (1 skipped: no third)")
    assert said[4] == (1, "skipped: not here")
    assert said[5] == (1, "failed")
    assert said[6] == (0, "no test")
    assert done.stdout.splitlines()[-1] == "2 of 61 rows green"


def test_a_row_without_a_test_fails_though_all_tests_pass(tmp_path):
    for left_out, code in ((None, 0), (17, 1)):
        marked = ", ".join(str(row) for row in faults.ROWS if row != left_out)
        (tmp_path / "test_rows.py").write_text(
            f"import pytest\n@pytest.mark.fault({marked})\ndef test_all(): pass"
        )
        done = run(tmp_path)
        assert done.returncode == code
        assert done.stdout.endswith(f"{61 - code} of 61 rows green\n")


def test_a_row_that_does_not_exist_is_an_error(tmp_path):
    (tmp_path / "test_rows.py").write_text("import pytest\n@pytest.mark.fault(62)\ndef test_it(): pass")
    done = run(tmp_path)
    assert done.returncode == 4
    assert "test_it is marked fault(62); there is no such row" in done.stdout + done.stderr
