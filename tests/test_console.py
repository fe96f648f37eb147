"""The edges of every command: exit codes, one-line errors, numbers as people write them."""

import ast
import io
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

import aymen_gpt
from aymen_gpt import errors
from aymen_gpt.__main__ import COMMANDS, main
from aymen_gpt.commands import console, options
from aymen_gpt.training.config import Range


def code_of(error=None):
    """The exit code of a command that raises this."""

    def work():
        if error:
            raise error

    with pytest.raises(SystemExit) as ended:
        console.run(work)
    return ended.value.code


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [(errors.UsageError("u"), 2, "error: u"), (errors.DataError("d"), 65, "error: d"),
     (errors.NetworkError("n"), 69, "error: n"), (errors.CannotWrite("w"), 73, "error: w"),
     (errors.AymenError("a"), 1, "error: a"), (errors.Stopped("saved"), 75, "saved"),
     (KeyboardInterrupt(), 130, "interrupted"), (None, 0, "")],
)  # fmt: skip
def test_errors_that_speak_to_the_user_are_one_line_and_a_code(capsys, monkeypatch, error, code, line):
    assert code_of(error) == code
    assert capsys.readouterr().err.strip() == line
    if line.startswith("error"):
        monkeypatch.setenv("AYMEN_GPT_DEBUG", "1")
        assert code_of(error) == code
        assert "Traceback" in capsys.readouterr().err
    if code == 2:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.delenv("AYMEN_GPT_DEBUG")
        assert code_of(error) == code
        assert capsys.readouterr().err == ""


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        console.run(lambda: 1 / 0)


@pytest.mark.parametrize("text", ["", "x", "1.5", "1e-3", "2**x", "2**-1", "2**9999999999", "nan", "1e999", "0"])
def test_other_numbers_are_refused_in_a_line(text):
    parser = options.parser("", "")
    parser.add_argument("-n", "--number", **options.number(Range(1, 10**6), whole=True))
    with pytest.raises(errors.UsageError) as refused:
        parser.parse_args(["--number", text])
    assert str(refused.value) == f"--number {text}: expected a whole number from 1 to 1,000,000"
    parser.add_argument("--every", **options.number(Range(5, 9), whole=True, unset="none"))
    with pytest.raises(errors.UsageError, match="expected a whole number from 5 to 9, or 0$"):
        parser.parse_args(["--every", "-3"])


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--numbr", "3"], "there is no option --numbr; did you mean --number?"),
     (["--numbr=3"], "there is no option --numbr=3; did you mean --number?"),
     (["-x"], "there is no option -x"),
     (["more"], "more belongs to no option"),
     (["--nor=3"], "there is no option --nor=3; did you mean --number-of-rows?"),
     ([], "the following arguments are required: -n/--number")],
)  # fmt: skip
def test_an_unknown_option_is_answered_with_the_nearest_and_the_usage(words, message):
    parser = options.parser("", "", "python x.py [--number N] ...")
    parser.add_argument("-n", "--number", required=not words)
    parser.add_argument("--number-of-rows")
    with pytest.raises(errors.UsageError) as refused:
        parser.parse_args(words)
    assert str(refused.value) == f"{message}\nusage: python x.py [--number N] ... (--help lists all)"


def test_a_secret_is_hidden_and_a_path_is_not(monkeypatch):
    for name in ("HF_TOKEN", "MY_API_KEYS", "PGPASSWORD"):
        monkeypatch.setenv(name, f'{name}-"quoted\\')
    for name in ("TIKTOKEN_CACHE_DIR", "TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH"):
        monkeypatch.setenv(name, f"/home/me/{name}")
    shown = {"a": ["/home/me/TIKTOKEN_CACHE_DIR/x", "/home/me/TOKENIZERS_PARALLELISM", "/home/me/HF_TOKEN_PATH"]}
    secret = {"b": 'HF_TOKEN-"quoted\\', "c": ('x MY_API_KEYS-"quoted\\ y', 'PGPASSWORD-"quoted\\'), "d": 1.5}
    found = json.loads(json.dumps(errors.redact(shown | secret)))
    assert found == shown | {"b": "***", "c": ["x *** y", "***"], "d": 1.5}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_only_a_terminal_is_protected_from_control_characters(monkeypatch):
    controls = [chr(c) for c in (*range(32), *range(127, 160), 0x202E, 0x2066) if chr(c) not in "\t\n"]
    text = "\té\n深" + "".join(controls)
    for stream, printable in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stdout", stream)
        console.show(text, end="")
        said = stream.getvalue()
        assert (said == text) is not printable
        assert said.startswith("\té\n深")
        assert set(controls).isdisjoint(said) is printable


def test_progress_is_a_bar_on_a_terminal_and_else_a_line_now_and_then(monkeypatch):
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with console.Progress() as progress:
            progress.move(0.25, "a quarter")
            progress.say("an event")
            progress.move(1.0, "all", last=True)
    assert stream.getvalue() == "an event\n100%  all\n"
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("argv0", "path", "cwd", "typed"),
    [("/x/bin/aymen-gpt", "/x/bin", ROOT, "aymen-gpt generate -m x"),
     (".venv/bin/aymen-gpt", "/x/bin", ROOT, ".venv/bin/aymen-gpt generate -m x"),
     ("/y/aymen_gpt/__main__.py", "{bin}", ROOT, "python -m aymen_gpt generate -m x"),
     ("pretrain.py", "{bin}", ROOT, "python generate.py -m x"),
     ("/my dir/pretrain.py", "{bin}", ROOT, "python generate.py -m x"),
     ("pretrain.py", "{bin}", "/", f"python {str(ROOT)[1:]}/generate.py -m x"),
     ("pretrain.py", "/x/bin", ROOT, "{bin}/python generate.py -m x")],
)  # fmt: skip
def test_the_next_command_works_as_it_is_printed(monkeypatch, argv0, path, cwd, typed):
    here = Path(sys.executable).parent
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", [argv0])
    monkeypatch.setattr(console.shutil, "which", lambda name: f"{path.format(bin=here)}/{name}")
    assert console.as_typed("next python generate.py -m x") == f"next {typed.format(bin=console.below(here))}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_answers_a_wrong_option(refused, command):
    name = "pretrain" if command == "plan" else command
    refused(2, "there is no option --no-such-option", f"{name}.py", "--no-such-option")


# ---- in processes of their own -----------------------------------------------------------------------


@pytest.fixture
def start(tmp_path):
    def run(command, **environment):
        environment = {"PYTHONPATH": str(ROOT)} | environment
        return subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)

    return run


@pytest.mark.slow
def test_one_command_leads_to_all_others(start, monkeypatch, capsys):
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["aymen-gpt"]
    assert entry == "aymen_gpt.__main__:main"
    done = start([sys.executable, "-m", "aymen_gpt", "plan", "--preset", "tiny"])
    assert done.stdout.startswith("model     tiny: 1,635,744 parameters"), done.stderr
    for words, code in (([], 0), (["--version"], 0), (["generate", "--version"], 0), (["generat"], 2)):
        monkeypatch.setattr(sys, "argv", ["/usr/bin/aymen-gpt", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
        said = capsys.readouterr()
        assert said.out.startswith("" if code else f"aymen-gpt {aymen_gpt.__version__}\n")
        assert words or all(f"\n  {command} " in said.out for command in COMMANDS)
    assert said.err.endswith("; did you mean generate?\n")


@pytest.mark.parametrize(("venv", "missing"), [(False, "torch"), (True, "safetensors")])
def test_without_its_packages_a_door_says_what_to_type(start, tmp_path, venv, missing):
    (tmp_path / "aymen_gpt").symlink_to(ROOT / "aymen_gpt")
    (tmp_path / "requirements.txt").touch()
    (tmp_path / "generate.py").write_bytes((ROOT / "generate.py").read_bytes())
    (tmp_path / "hidden").mkdir()
    (tmp_path / f"hidden/{missing}.py").write_text(f"raise ModuleNotFoundError(name={missing!r})")
    if venv:
        (tmp_path / ".venv/bin").mkdir(parents=True)
        (tmp_path / ".venv/bin/activate").touch()
    done = start([sys.executable, "generate.py", "-m", "runs/x"], PYTHONPATH="hidden")
    install = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt -e ."
    advice = ". .venv/bin/activate" if venv else install
    assert done.stderr == f"error: the package {missing} is not installed for {sys.executable}: type {advice}\n"
    assert done.returncode == 1


def test_an_old_python_can_read_the_doors_and_is_told_of_a_newer(start):
    for path in (*(ROOT / f"{name}.py" for name in console.DOORS), *(ROOT / "aymen_gpt").glob("__*__.py")):
        ast.parse(path.read_text(), feature_version=(3, 6))
    code = "import sys; sys.version_info = (3, 8, 0); from aymen_gpt.__main__ import main; main('pretrain')"
    done = start([sys.executable, "-c", code])
    assert done.returncode == 1
    assert done.stderr.startswith("error: Python 3.11 or newer is needed, this is 3.8: type ")
    assert done.stderr.count("\n") == 1


def test_a_command_started_as_a_module_of_its_own_says_what_to_type():
    command = [sys.executable, "-m", "aymen_gpt.commands.pretrain", "--steps", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: type python -m aymen_gpt pretrain\n"
