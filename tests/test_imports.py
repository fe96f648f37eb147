"""The arrows of docs/architecture.md: which room may import which, and that importing does nothing else."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "aymen_gpt"
LEAVES = {"errors", "files", "wording"}  # every room may import these; files imports errors
ARROWS = {
    "model": set(),
    "data": set(),
    "training": {"model", "data"},
    "evaluation": {"model", "data"},
    "reporting": set(),
    "play": {"model", "data", "evaluation"},
    "commands": {"training", "evaluation", "reporting", "play", "data", "model"},
    "__main__": {"commands"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def local_imports(path):
    """Modules of this package that a file imports anywhere, as dotted names below aymen_gpt."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [
                f"{node.module}.{alias.name}" if node.module == "aymen_gpt" else node.module
                for alias in node.names
            ]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("aymen_gpt."):
                yield name.removeprefix("aymen_gpt.")


def room(path):
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    here = room(path)
    allowed = {"errors": set(), "files": {"errors"}, "wording": set(), "__init__": set()}.get(here)
    if allowed is None:
        allowed = ARROWS[here] | LEAVES | {here}
    found = {name.split(".")[0] for name in local_imports(path)}
    assert found <= allowed, f"{path.relative_to(ROOT)} imports {sorted(found - allowed)}"


def test_every_room_has_its_arrows():
    assert {room(path) for path in MODULES} == ARROWS.keys() | LEAVES | {"__init__"}


def test_no_modules_import_each_other():
    """A cycle would show as a module that can reach itself."""
    names = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in MODULES}
    graph = {name: {t for t in local_imports(path) if t in names} for name, path in names.items()}

    def reach(name, seen):
        for target in graph[name] - seen:
            seen.add(target)
            reach(target, seen)
        return seen

    assert [name for name in graph if name in reach(name, set())] == []


def modules_after(code):
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()), done.stdout


def test_data_and_reporting_need_no_torch():
    names = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in MODULES
        if room(p) in ("data", "reporting", "files", "wording")
    ]
    loaded, _ = modules_after("\n".join(f"import {name}" for name in names))
    assert "torch" not in loaded


@pytest.mark.parametrize(
    "script", ["fineweb", "pretrain", "hellaswag", "generate", "report", "play", "export", "push"]
)
def test_help_is_answered_before_anything_heavy_is_imported(script):
    code = f"""
import contextlib
from aymen_gpt.__main__ import command
with contextlib.suppress(SystemExit):
    command("{script}", ["--help"])"""
    loaded, text = modules_after(code)
    assert not loaded & {
        "torch",
        "numpy",
        "pyarrow",
        "huggingface_hub",
        "transformers",
        "matplotlib",
        "jinja2",
        "fastapi",
    }
    assert "examples:" in text


def test_importing_everything_prints_and_writes_nothing(tmp_path):
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in MODULES if p.name != "__init__.py"]
    code = "\n".join(f"import {name}" for name in names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    assert list(tmp_path.iterdir()) == []


def test_nothing_unsafe_is_called():
    """No pickle, no eval, no shell, no code from the Hub, no archive unpacked (faults: security bar)."""
    banned = [
        "import pickle",
        "pickle.",
        "torch.load(",
        "eval(",
        "exec(",
        "shell=True",
        "trust_remote_code",
        "extractall",
        "torch.hub",
    ]
    for path in MODULES:
        text = path.read_text()
        for harmless in (
            "allow_pickle=False",
            ".eval(",
            'torch.load(path, map_location="cpu", weights_only=True)',
        ):
            text = text.replace(harmless, "")
        for word in banned:
            assert word not in text, f"{path}: {word}"
