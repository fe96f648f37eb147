"""builtin.py: docstrings become documents; nothing is imported; the same packages give the same bytes."""

import hashlib
import sys
import textwrap
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from aymen_gpt.data import builtin
from aymen_gpt.data.builtin import Package
from aymen_gpt.errors import DataError

LONG = "This paragraph is long enough to be dropped when it comes a second time, because it says so. " * 3
MODULE = f'''
"""About the module.

{LONG}
"""
import sys
sys.imported_by_the_corpus = True

class Thing:
    """A thing.

        Indented more.
    """

    def method(self, a, *, b):
        """Method's text."""

    def _private(self):
        """Not shown."""

def function(x):
    """The same text as elsewhere."""

def twin(x):
    """The same text as elsewhere."""

add_docstr(function, """compiled(x) -> y

Documented from outside.""")
'''


@pytest.fixture
def package(tmp_path):
    base = tmp_path / "site"
    files = {
        "pack/__init__.py": MODULE,
        "pack/copy.py": f'"""Another module.\n\n{LONG}\n\nWith one new paragraph. {"New words. " * 20}"""\n',
        "pack/short.py": '"""Short."""\n',
        "pack/broken.py": "def :\n",
        "pydoc_data/topics.py": f"topics = {{'if': {'The if statement. ' * 20!r}}}\n",
    }
    for name, content in files.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(content)
    return Package("pack", "1.0", base, tuple(sorted(files)))


@pytest.fixture
def rows(package, tmp_path):
    return {row["url"]: row for row in pq.read_table(builtin.build(tmp_path, packages=[package])).to_pylist()}


def test_a_module_becomes_headings_and_docstrings_in_source_order(rows):
    expected = f"""\
        pack

        About the module.

        {LONG.strip()}

        class Thing
        A thing.

        Indented more.

        Thing.method(a, b)
        Method's text.

        function(x)
        The same text as elsewhere.

        Documented from outside."""
    assert rows["pack:pack"]["text"] == textwrap.dedent(expected)


def test_paragraphs_that_came_before_and_short_or_broken_modules_are_dropped_and_nothing_is_imported(rows):
    assert rows.keys() == {"pack:pack", "pack:pack.copy", "pack:help/if"}
    assert LONG.strip() not in rows["pack:pack.copy"]["text"]
    assert "With one new paragraph." in rows["pack:pack.copy"]["text"]
    assert rows["pack:help/if"]["text"] == ("The if statement. " * 20).strip()
    assert not hasattr(sys, "imported_by_the_corpus")
    assert "pack" not in sys.modules
    assert list(rows) == sorted(rows, key=lambda url: hashlib.sha256(url.encode()).digest())


def test_the_schema_is_fineweb_edus_and_names_no_place_on_this_machine(package, tmp_path):
    table = pq.read_table(builtin.build(tmp_path, packages=[package]))
    names = {"text", "id", "dump", "url", "file_path", "language"}
    kinds = dict.fromkeys(names, "string") | dict.fromkeys(("language_score", "score"), "double")
    assert {field.name: str(field.type) for field in table.schema} == kinds | dict.fromkeys(
        ("token_count", "int_score"), "int64"
    )
    for row in table.to_pylist():
        assert row["id"].startswith("<urn:uuid:")
        assert row["dump"] == "pack-1.0"
        assert row["token_count"] > 20
        assert str(tmp_path) not in str(row)


def test_the_same_packages_give_the_same_bytes_and_other_versions_another_name(package, tmp_path):
    first = builtin.build(tmp_path / "a", packages=[package])
    second = builtin.build(tmp_path / "b", packages=[package])
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()
    before = first.stat().st_mtime_ns
    assert builtin.build(tmp_path / "a", packages=[package]).stat().st_mtime_ns == before  # not built again
    newer = Package("pack", "1.1", package.base, package.files)
    assert builtin.build(tmp_path / "a", packages=[newer]).name != first.name


def test_the_standard_library_and_our_dependencies_are_found():
    packages = {package.name: package for package in builtin.installed_packages()}
    assert {"python", "numpy", "torch", "pyarrow", "tiktoken", "sympy"} <= packages.keys()
    stdlib = packages["python"]
    assert {"json/decoder.py", "pydoc_data/topics.py"} <= set(stdlib.files)
    assert not any("site-packages" in name or name.startswith("test/") for name in stdlib.files)
    assert all((package.base / package.files[0]).is_file() for package in packages.values() if package.files)


def test_a_real_module_reads_as_prose(tmp_path):
    stdlib = next(package for package in builtin.installed_packages() if package.name == "python")
    some = Package("python", stdlib.version, stdlib.base, ("json/__init__.py", "pydoc_data/topics.py"))
    rows = {row["url"]: row["text"] for row in builtin.documents([some])}
    assert rows["python:json"].startswith("json\n\nJSON (JavaScript Object Notation) <")
    assert "\n\ndumps(obj, skipkeys, ensure_ascii, " in rows["python:json"]
    assert "Assert statements are a convenient way" in rows["python:help/assert"]


def test_an_empty_corpus_is_an_error(tmp_path):
    with pytest.raises(DataError, match="built-in corpus is empty"):
        builtin.build(tmp_path, packages=[Package("none", "1", Path("/"), ())])


@pytest.mark.parametrize(
    ("paragraph", "kept"),
    [
        ("Return the list of names, or None.", True),
        ("Parameters\n==========", False),
        (">>> f(1)\nthe one and only result of it", False),
        ("    x = [1, 2]\n    y = f(x)", False),
        ("", False),
    ],
)
def test_prose_is_kept_and_code_is_not(paragraph, kept):
    assert builtin.is_prose(paragraph) == kept


def test_lines_are_joined_inside_sentences_only():
    assert builtin.unwrap("Return the list,\n    or None.\nAn error is raised (\n") == (
        "Return the list, or None.\nAn error is raised ("
    )
