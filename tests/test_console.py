"""The edges of every command: exit codes, one-line errors, numbers as people write them."""

import argparse

import pytest

from aymen_gpt import errors
from aymen_gpt.commands import console


def code_of(main):
    with pytest.raises(SystemExit) as ended:
        console.run(main)
    return ended.value.code


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code"),
    [(errors.UsageError("u"), 2), (errors.DataError("d"), 65), (errors.NetworkError("n"), 69),
     (errors.CannotWrite("w"), 73), (errors.AymenError("a"), 1)],
)  # fmt: skip
def test_errors_that_speak_to_the_user_are_one_line_and_a_code(capsys, error, code):
    assert code_of(raising(error)) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_run_that_stopped_and_saved_is_no_error(capsys):
    assert code_of(raising(errors.Stopped("stopped and saved"))) == 75
    assert capsys.readouterr().err == "stopped and saved\n"


def test_debug_adds_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("AYMEN_GPT_DEBUG", "1")
    assert code_of(raising(errors.DataError("d"))) == 65
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        console.run(raising(ZeroDivisionError()))


def test_ctrl_c_is_130(capsys):
    assert code_of(raising(KeyboardInterrupt())) == 130


def test_success_is_0():
    assert code_of(lambda: 0) == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [("12", 12), ("524_288", 524288), ("1e8", 10**8), ("2.5e3", 2500), ("2**19", 524288), ("-1", -1)],
)
def test_whole_numbers_as_people_write_them(text, value):
    assert console.whole_number(text) == value


@pytest.mark.parametrize("text", ["", "x", "1.5", "1e-3", "2**x", "nan", "1e999"])
def test_other_numbers_are_refused(text):
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=console.whole_number)
    with pytest.raises(SystemExit):
        parser.parse_args(["--n", text])
