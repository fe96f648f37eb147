"""The built-in corpus: the English documentation that every machine with this project already has.

Docstrings of Python's standard library and of the packages we depend on, one document a module, and the
topics of Python's own help(). Sources are parsed, never imported; of a docstring the paragraphs of prose
are kept, not its examples of code. The result is one parquet file in FineWeb-Edu's schema, so it takes the
same way to shards as FineWeb-Edu does. It is a small corpus (about 11 MB): enough to see a GPT learn, not
enough to make it wise.
"""

import ast
import hashlib
import inspect
import multiprocessing
import os
import platform
import re
import sysconfig
import uuid
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from aymen_gpt.data import tokenizer
from aymen_gpt.data.fetch import cache_dir
from aymen_gpt.errors import DataError
from aymen_gpt.files import whole_file

EDITION = 2  # of the rules below: raise it when the same packages would give another text
PACKAGES = ("torch", "numpy", "pyarrow", "huggingface_hub", "safetensors", "tiktoken", "tqdm")
SHORTEST = 200  # characters of a document; and of a paragraph that is dropped when it comes again
NOT_PROSE = {"test", "tests", "testing", "site-packages", "dist-packages", "_vendor"}
ADDED_DOCS = ("add_docstr", "_add_docstr", "add_newdoc")  # how torch and numpy document compiled functions


@dataclass(frozen=True)
class Package:
    """A name, a version, and the Python files (relative to ``base``) whose docstrings are read."""

    name: str
    version: str
    base: Path
    files: tuple[str, ...]


def build(folder: Path | None = None, *, packages: list[Package] | None = None) -> Path:
    """The corpus as a parquet file in ``folder`` (default: our cache), built unless it is there already.

    The file's name carries a fingerprint of the packages' versions. The same versions give the same bytes.
    """
    packages = installed_packages() if packages is None else packages
    versions = [(package.name, package.version) for package in packages]
    fingerprint = hashlib.sha256(repr((EDITION, versions)).encode()).hexdigest()[:12]
    path = (folder or cache_dir()) / f"builtin-{fingerprint}.parquet"
    if not path.is_file():
        _write_parquet(path, documents(packages))
    return path


def installed_packages() -> list[Package]:
    """The standard library, then our dependencies and theirs, as far as they are installed, by name."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files = tuple(path.relative_to(stdlib).as_posix() for path in stdlib.rglob("*.py"))
    found = {"python": Package("python", platform.python_version(), stdlib, _prose(files))}
    waiting = list(PACKAGES)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if name not in found:
            listed = tuple(file.as_posix() for file in distribution.files or ())
            base = Path(str(distribution.locate_file("")))
            found[name] = Package(name, distribution.version, base, _prose(listed))
            needs = [line for line in distribution.requires or () if "extra ==" not in line]
            waiting += [match[0] for line in needs if (match := re.match(r"[\w.-]+", line))]
    return [found[name] for name in sorted(found)]


def _prose(files: tuple[str, ...]) -> tuple[str, ...]:
    """The modules among the files, without tests and copies of other packages."""
    kept = [name for name in files if name.endswith(".py") and not NOT_PROSE & set(PurePosixPath(name).parts)]
    return tuple(sorted(name for name in kept if ".." not in name))


def documents(packages: list[Package]) -> list[dict[str, Any]]:
    """The corpus as rows of FineWeb-Edu's columns, in an order fixed by a hash of their names.

    That order mixes the packages, so any stretch of it, such as the validation shard, is a fair sample.
    """
    modules = [(package, name) for package in packages for name in package.files]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        read = pool.map(_read_module, [package.base / name for package, name in modules], chunksize=32)
        found = [(package, name, parts) for (package, name), parts in zip(modules, read, strict=True)]
    rows, seen = [], set[str]()
    for package, name, sections in found:
        for title, parts in sections:
            text = "\n\n".join(_unseen(parts, seen))
            if len(text) >= SHORTEST:
                rows.append(_row(package, name, title, text))
    return sorted(rows, key=lambda row: hashlib.sha256(row["url"].encode()).digest())


def _unseen(parts: list[tuple[str, str]], seen: set[str]) -> Iterator[str]:
    """The (heading, text) parts as readable text, without texts and long paragraphs that came before."""
    for heading, text in parts:
        if text in seen:
            continue
        paragraphs = [unwrap(p) for p in text.split("\n\n") if is_prose(p)]
        kept = [p for p in paragraphs if len(p) < SHORTEST or p not in seen]
        seen.update([text], (p for p in paragraphs if len(p) >= SHORTEST))
        if kept:
            yield f"{heading}\n" * bool(heading) + "\n\n".join(kept)


WORD = re.compile(r"[\"'(`*]*[A-Za-z][a-z'-]*[.,;:!?)\"'`*]*")


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is sentences rather than code: 70% of its words are written in letters alone."""
    words = paragraph.split()
    plain = sum(bool(WORD.fullmatch(word)) for word in words)
    return bool(words) and ">>>" not in paragraph and plain >= 0.7 * len(words)


def unwrap(paragraph: str) -> str:
    """A paragraph without the line breaks that fall inside a sentence.

    >>> unwrap("Return the list\\n    of names.\\nNone is first.")
    'Return the list of names.\\nNone is first.'
    """
    return re.sub(r"(?<=[a-z,;)])\n *(?=[a-z(])", " ", paragraph).rstrip()


def _row(package: Package, name: str, title: str, text: str) -> dict[str, Any]:
    module = re.sub(r"(/__init__)?\.py$", "", name).replace("/", ".")
    url = f"{package.name}:{title or module}"
    text = text if title else f"{module}\n\n{text}"
    text = text.encode("utf-8", "replace").decode()  # parquet refuses lone surrogates
    return {
        "text": text,
        "id": f"<urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, url)}>",
        "dump": f"{package.name}-{package.version}",
        "url": url,
        "file_path": name,
        "language": "en",
        "token_count": len(tokenizer.encode(text)),
    }


def _read_module(path: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    """[(document title, [(heading, text)])] of one source file; nothing when it cannot be read or parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the sources' own, such as invalid escapes
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    if path.parts[-2:] == ("pydoc_data", "topics.py"):
        return [(f"help/{title}", [("", text)]) for title, text in _help_topics(tree)]
    return [("", [("", _docstring(tree)), *_sections(tree, "")])]


def _help_topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    yield str(key.value), str(value.value).strip()


def _sections(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str]]:
    """(heading, docstring) of the public classes and functions in a module or class, in source order."""
    for node in parent.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield from _added_docs(node.value)
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name[0] == "_":
            continue
        if isinstance(node, ast.ClassDef):
            heading = f"class {prefix}{node.name}"
        else:
            arguments = [a.arg for a in (*node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
            heading = f"{prefix}{node.name}({', '.join(arguments)})"
        if text := _docstring(node):
            yield heading, text
        if isinstance(node, ast.ClassDef):
            yield from _sections(node, f"{prefix}{node.name}.")


def _added_docs(call: ast.Call) -> Iterator[tuple[str, str]]:
    """The text that add_docstr(function, text) or add_newdoc(module, name, text) gives a compiled function."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if function in ADDED_DOCS:
        for node in ast.walk(call):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value:
                yield "", inspect.cleandoc(node.value)


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return (ast.get_docstring(node) or "").strip()


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows in FineWeb-Edu's schema. Its scores stay null: no classifier has rated these texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not rows:
        raise DataError("the built-in corpus is empty: this Python has no source files of its own library")
    strings = [(name, pa.string()) for name in ("text", "id", "dump", "url", "file_path", "language")]
    scores = [("token_count", pa.int64()), ("score", pa.float64()), ("int_score", pa.int64())]
    schema = pa.schema([*strings, ("language_score", pa.float64()), *scores])
    with whole_file(path) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema), file, compression="zstd", row_group_size=500)
