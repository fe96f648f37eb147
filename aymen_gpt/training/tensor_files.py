"""The tensors of a checkpoint: whole ones, under GPT-2's names and in its layout, in files of at most 5 GB.

They are the same bytes whatever the number of ranks that wrote them: ``model.safetensors``, or where that would be
too large ``model-00001-of-00003.safetensors`` and so on with Hugging Face's index of which tensor is where. Files
are dealt over the ranks that hold the first copy of the model, and each rank reads no more than its own rows.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from aymen_gpt.errors import DataError
from aymen_gpt.files import read_json
from aymen_gpt.model.huggingface import PREFIX, TRANSPOSED, to_huggingface
from aymen_gpt.training.distributed import Ranks
from aymen_gpt.training.sharding import first_row, gather_to, local

LIMIT = 5 * 10**9
Tensors = dict[str, Tensor]
Entries = dict[str, dict[str, Any]]  # of the manifest: size and hash, by file


@dataclass
class Writers:
    """The ranks that write a checkpoint together: the ``count`` first, which hold a copy of the model."""

    ranks: Ranks
    count: int = 1
    token: str = ""  # the same on all, and another for each save
    deadline: float = math.inf

    @contextmanager
    def telling(self, step: int) -> Iterator[Entries]:
        """Around the writing of this rank's files: tells the first rank how it ended, and what was written."""
        written: Entries = {}
        ended: dict[str, Any] = {"error": "it stopped"}
        try:
            yield written
            ended = {"written": written}
        except Exception as error:
            ended = {"error": str(error)}
            raise
        finally:
            if not self.ranks.is_first:
                self.ranks.store.set(self._key(step, self.ranks.rank), json.dumps(ended))

    def wait(self, step: int) -> Entries:
        """What the other ranks have written, when all have; OSError where one could not or does not answer."""
        found: Entries = {}
        for rank in range(1, self.count):
            while not self.ranks.store.check([self._key(step, rank)]):
                if time.monotonic() > self.deadline:
                    raise OSError(f"rank {rank} did not write its part")
                time.sleep(0.02)
            ended = json.loads(self.ranks.store.get(self._key(step, rank)))
            if "error" in ended:
                raise OSError(f"rank {rank}: {ended['error']}")
            found |= ended["written"]
        return found

    def hurry(self, seconds: float) -> None:
        """Something waits for the save: wait no longer than so many seconds for a rank that may be dead."""
        self.deadline = min(self.deadline, time.monotonic() + seconds)

    def _key(self, step: int, rank: int) -> str:
        return f"saved {step} {self.token} {rank}"


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


@dataclass(frozen=True)
class Files:
    """Copies in host memory of the tensors that this rank writes, by file; and the file of every tensor."""

    stem: str
    mine: dict[str, Tensors]
    places: dict[str, str]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for tensors in self.mine.values() for t in tensors.values())

    def write(self, folder: Path, *, first: bool) -> list[Path]:
        """What this rank has to write, the ``first`` one the index too; its files."""
        for file, tensors in self.mine.items():
            save_file(tensors, folder / file, metadata={"format": "pt"})
        written = [folder / file for file in self.mine]
        if first and len(set(self.places.values())) > 1:
            written.append(folder / f"{self.stem}.safetensors.index.json")
            write_json(written[-1], {"metadata": {}, "weight_map": self.places})
        return written


def stored_name(name: str) -> str:
    """The name in a file of a tensor: wte.weight -> transformer.wte.weight, and so behind exp_avg/."""
    kind, _, ours = name.rpartition("/")
    return f"{kind}.{PREFIX}{ours}" if kind else PREFIX + ours


def collect(stem: str, tensors: Tensors, vocab_size: int, shard: int, limit: int = LIMIT, first: int = 0) -> Files:
    """Copy what this rank is to write. ``tensors`` have our names, moments as exp_avg/NAME.

    Tensors fill files in their order. Files are dealt over the ``shard`` ranks of a copy of the model, from rank
    ``first`` on.
    """
    places: dict[str, int] = {}
    mine: dict[int, Tensors] = {}
    number, room = -1, 0
    for name, t in tensors.items():
        rows = vocab_size if name.endswith("wte.weight") else t.size(0)
        size = 4 * rows * t.shape[1:].numel()  # a row itself would be fetched from its rank
        if size > room:
            number, room = number + 1, max(limit, size)
        room -= size
        places[name] = number
        whole = gather_to((first + number) % shard, t)
        if whole is not None:
            ours = name.rpartition("/")[2]
            [layout] = to_huggingface({ours: whole}, vocab_size).values()
            mine.setdefault(number, {})[stored_name(name)] = layout
    file = [f"{stem}.safetensors"] if number == 0 else file_names(stem, number + 1)
    return Files(
        stem,
        {file[i]: found for i, found in mine.items()},
        {stored_name(name): file[i] for name, i in places.items()},
    )


def file_names(stem: str, count: int) -> list[str]:
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


@torch.no_grad()
def read(folder: Path, stem: str, tensors: Tensors, vocab_size: int) -> str | None:
    """Fill this rank's rows of the tensors, named as for ``collect``; the first that holds NaN or infinity."""
    index = folder / f"{stem}.safetensors.index.json"
    places = read_json(index)["weight_map"] if index.exists() else {}
    files: dict[str, tuple[safe_open, set[str]]] = {}
    bad = None
    for name, t in tensors.items():
        stored, mine, first = stored_name(name), local(t), first_row(t)
        file = places.get(stored, f"{stem}.safetensors")
        if file not in files:
            opened = safe_open(folder / file, "pt")
            files[file] = opened, set(opened.keys())
        opened, names = files[file]
        if stored not in names:
            raise DataError(f"{folder / file} has no {stored}")
        last = first + mine.size(0)
        if name.endswith("wte.weight"):
            last = max(first, min(last, vocab_size))  # the padding is not stored
        rows = opened.get_slice(stored)
        some = rows[:, first:last].t() if name.endswith(TRANSPOSED) else rows[first:last]
        mine.zero_()
        mine[: last - first] = some
        if bad is None and not torch.isfinite(mine).all():
            bad = stored
    return bad
