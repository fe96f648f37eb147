"""Scores on the disk as they come, so that a scoring that was killed goes on where it was.

    CACHE/hellaswag-partial/KEY/rank-0.jsonl     one line an example: [protocol, index, log-likelihoods, tokens]

KEY is the hash of all that the scores follow from, the weights included, so what is found there is right
whoever left it, on however many ranks. Lines are flushed batch by batch; a torn one is not read.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

import aymen_gpt
from aymen_gpt.evaluation.scoring import EndingScores
from aymen_gpt.model.gpt import GPT


def key(model: GPT, dtype: torch.dtype, examples_sha256: str) -> str:
    """What tells scorings apart: the weights, how they are used, and the examples in their order."""
    h = hashlib.sha256(f"{aymen_gpt.__version__} {model.config} {dtype} {examples_sha256}".encode())
    for name, t in model.state_dict().items():
        h.update(name.encode())
        h.update(t.float().cpu().reshape(-1).numpy())
    return h.hexdigest()[:32]


class PartialScores:
    """Scores of one rank's examples, by protocol and index among them; without a folder none are kept."""

    def __init__(
        self, folder: Path | None = None, *, rank: int = 0, world_size: int = 1, resume: bool = False
    ) -> None:
        """With ``resume`` what is in the folder is known, and added to; without, this rank's file begins anew."""
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self._known: dict[str, dict[int, EndingScores]] = {}
        self._file: TextIO | None = None
        if folder is None:
            return
        if resume:
            for protocol, i, log_likelihoods, token_counts in _lines(folder):
                if i % world_size == rank:
                    scores = EndingScores(log_likelihoods, token_counts)
                    self._known.setdefault(protocol, {})[i // world_size] = scores
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / f"rank-{rank}.jsonl").open("a" if resume else "w")
        except OSError as error:
            self._give_up(error)
        self._write("\n")  # what a kill tore off stays a line of its own

    @property
    def n_known(self) -> int:
        """Scores known from before, over all protocols."""
        return sum(map(len, self._known.values()))

    def known(self, protocol: str) -> dict[int, EndingScores]:
        return self._known.get(protocol, {})

    def add(self, protocol: str, found: dict[int, EndingScores]) -> None:
        """Keep new scores; they survive the death of this process from here on."""
        lines = [
            json.dumps([protocol, self.rank + i * self.world_size, s.log_likelihoods, s.token_counts])
            for i, s in found.items()
        ]
        self._write("\n".join(lines) + "\n")

    def discard(self) -> None:
        """Delete the folder: everything is scored."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, text: str) -> None:
        if self._file is None:
            return
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Scoring can do without what only a kill would need."""
        self._file = None
        warnings.warn(f"partial scores are not kept: cannot write {self.folder}: {error.strerror}", stacklevel=3)


def _lines(folder: Path) -> Iterator[list[Any]]:
    for path in sorted(folder.glob("rank-*.jsonl")):
        for line in path.read_text(errors="replace").splitlines():
            try:
                found = json.loads(line)
            except ValueError:  # torn, or empty
                continue
            yield found
