"""The manifest of a folder of token shards: what the folder holds, of which source, and whether all is there.

It is read strictly: whatever is not as it should be is one DataError.
docs/data-format.md describes the file for people.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from aymen_gpt.data.tokenizer import EOT, vocabulary_sha256
from aymen_gpt.errors import DataError
from aymen_gpt.files import read_json, write_whole

MANIFEST = "manifest.json"
FORMAT = "aymen-gpt shards, version 1"
TOKENIZER = {"name": "gpt2", "vocabulary_sha256": vocabulary_sha256(), "separator": EOT}
NUMBER, SHA256 = range(2**63), re.compile("[0-9a-f]{64}")
PLACE = dict.fromkeys(("file", "part", "row", "token"), NUMBER)
SHAPE = {  # of any manifest; see misfit
    "format": str,
    "complete": bool,
    "tokenizer": dict,
    "shards": [
        {
            "file": str,
            "tokens": NUMBER,
            "sha256": SHA256,
            "documents?": NUMBER,
            "documents_sha256?": SHA256,
            "begin?": PLACE,
            "end?": PLACE,
            "...": object,
        }
    ],
    **dict.fromkeys(("options?", "source?", "encoder?", "shard_tokens?", "totals?", "checksum?"), object),
}
PREPARED_SHAPE = {  # of one that fineweb.py wrote
    "options": {
        "source": [str],
        "shard_tokens": NUMBER,
        "max_tokens": (NUMBER, None),
        "text_column": (str, None),
        "revision": (str, None),
        "...": object,
    },
    "source": {
        "repo": (str, None),
        "revision": (str, None),
        "files": [{"name": str, "bytes": NUMBER, "sha256": (SHA256, None), "modified_ns?": (NUMBER, None)}],
        "...": object,
    },
    "encoder?": (None, {"name": re.compile("gigatoken|tiktoken"), "version": str}),
    "shard_tokens": dict.fromkeys(("val", "train"), range(1, 2**63)),
    "totals": {
        **dict.fromkeys(("tokens", "documents", "bytes"), NUMBER),
        "skipped": {"...": NUMBER},
        "bad?": {"...": str},
        "...": object,
    },
    "shards": [{"documents": NUMBER, "end": PLACE, "...": object}],
    "...": object,
}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    content = manifest | {"checksum": _checksum(manifest)}
    write_whole(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest, None when it has none; DataError when it cannot be used.

    It has the shape that docs/data-format.md describes. Manifests of earlier versions have no checksum.
    """
    path = folder / MANIFEST
    try:
        path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        return _checked(path)
    except DataError as error:
        again = "fineweb.py with the same options prepares the text anew, pretrain.py takes the shards as they are"
        raise DataError(f"{error}: delete it, then {again}") from None


def unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot read {path}: {error.strerror or error}: make it readable, or move it away")


def _checked(path: Path) -> dict[str, Any]:
    manifest = read_json(path)
    if manifest.get("format", FORMAT) != FORMAT:
        raise DataError(f"{path} says {manifest['format']!r}; this version reads {FORMAT!r}")
    wrong = misfit(manifest, SHAPE) or ("options" in manifest and misfit(manifest, PREPARED_SHAPE))
    checksum = manifest.pop("checksum", None)
    if wrong or checksum not in (None, _checksum(manifest)):
        raise DataError(f"{path} is damaged ({wrong or 'checksum'} is not as it should be)")
    for shard in manifest["shards"]:
        if not re.fullmatch(r"\w[\w.-]*\.(bin|npy)", shard["file"]):
            raise DataError(f"{path} lists the unsafe path {shard['file']!r}")
    return manifest


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def misfit(value: Any, shape: Any, place: str = "") -> str | None:
    """Where a value of JSON first differs from its shape, as "shards 3 sha256"; None when it fits.

    A shape is None, a type, a range, a pattern, a tuple of alternatives, a list of one shape, or a dict of shapes:
    of keys that must be there, of keys that need not be (with a ? behind them), of all other keys ("...").
    """
    if isinstance(shape, tuple):
        return None if any(misfit(value, one) is None for one in shape) else place
    if isinstance(shape, dict | list) and type(value) is not type(shape):
        return place
    if isinstance(shape, dict):
        missing = [key for key in shape if not key.endswith("?") and key not in (*value, "...")]
        inner = {key: shape.get(key, shape.get(f"{key}?", shape.get("...", range(0)))) for key in value}
        found = (misfit(value[key], inner[key], f"{place} {key}".lstrip()) for key in value)
        return f"{place} {missing[0]}".lstrip() if missing else next(filter(None, found), None)
    if isinstance(shape, list):
        found = (misfit(item, shape[0], f"{place} {number}") for number, item in enumerate(value))
        return next(filter(None, found), None)
    if isinstance(shape, range):
        return None if type(value) is int and value in shape else place
    if isinstance(shape, re.Pattern):
        return None if isinstance(value, str) and shape.fullmatch(value) else place
    return None if value is shape or (shape is not None and isinstance(value, shape)) else place


def manifest_hash(manifest: dict[str, Any]) -> str:
    """The identity of a folder's tokens, for a run's records: tokenizer, and each shard's name and hash."""
    shards = [[shard["file"], shard["tokens"], shard["sha256"]] for shard in manifest["shards"]]
    return hashlib.sha256(json.dumps([manifest["tokenizer"], shards], sort_keys=True).encode()).hexdigest()
