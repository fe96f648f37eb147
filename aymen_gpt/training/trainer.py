"""The training loop: rows of tokens in, checkpoints and curves out.

One update is ``tokens_per_step`` tokens whatever the hardware: the step's rows are dealt over the ranks, each rank
takes them ``micro_batch`` at a time, every token's loss is divided by the same number, and gradients are summed.
So the mean is over tokens, and world size and micro-batch change nothing but the order of additions.
"""

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aymen_gpt.data import tokenizer
from aymen_gpt.data.loader import TokenRows, deal
from aymen_gpt.errors import AymenError, DataError, Stopped, UsageError
from aymen_gpt.model.folders import latest_valid
from aymen_gpt.model.generation import generate
from aymen_gpt.model.gpt import GPT
from aymen_gpt.model.loss import linear_cross_entropy
from aymen_gpt.training import checkpoint, optim
from aymen_gpt.training.batches import Prefetch
from aymen_gpt.training.config import TrainConfig, flag
from aymen_gpt.training.device import Device
from aymen_gpt.training.distributed import Ranks
from aymen_gpt.training.runlog import RunLog
from aymen_gpt.training.schedule import learning_rate

Score = Callable[[GPT], dict[str, Any]]


@dataclass
class Trainer:
    """The parts of a run, built once; ``fit`` is the story."""

    config: TrainConfig
    device: Device
    ranks: Ranks
    train_rows: TokenRows
    val_rows: TokenRows
    data_sha256: str  # of the token shards' manifest
    score: Score | None = None  # a model -> its HellaSwag, for metrics.jsonl

    def __post_init__(self) -> None:
        c = self.config
        if c.rows_per_step < self.ranks.world_size:
            raise UsageError(
                f"{self.ranks.world_size} processes for {c.rows_per_step} rows a step: use fewer, or raise "
                f"--tokens-per-step to at least {self.ranks.world_size * c.block_size}"
            )
        self.micro_batch = c.micro_batch or (64 if self.device.place.type == "cuda" else 16)
        self.model = GPT(c.model, torch.Generator().manual_seed(c.seed)).to(self.device.place)
        self.parameters = list(self.model.parameters())
        betas = (c.beta1, c.beta2)
        self.optimizer = optim.adamw(self.model, lr=c.learning_rate, betas=betas, weight_decay=c.weight_decay)
        self.compiled = self.device.place.type == "cuda" if c.compile is None else c.compile
        self.loss = torch.compile(self._loss, dynamic=False) if self.compiled else self._loss

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Summed loss of the tokens y (b, T) that follow x (b, T), in nats."""
        with self.device.autocast():
            return linear_cross_entropy(
                self.model.hidden(x), self.model.wte.weight, y, self.model.config.vocab_size
            )

    def batch_loss(self, tokens: Tensor) -> Tensor:
        """Summed loss of a micro-batch (b, T + 1) in host memory."""
        tokens = tokens.to(self.device.place, non_blocking=True)
        return self.loss(tokens[:, :-1], tokens[:, 1:])

    def micro_batches(self, start: int, count: int) -> list[tuple[int, int]]:
        """This rank's share of ``count`` rows from ``start`` on, as (first row, rows); the last may be short."""
        offset, mine = deal(count, self.ranks.rank, self.ranks.world_size)
        begin, end = start + offset, start + offset + mine
        return [(first, min(self.micro_batch, end - first)) for first in range(begin, end, self.micro_batch)]

    def batches(self, rows: TokenRows, start: int, count: int) -> Iterator[Tensor]:
        """This rank's micro-batches of ``count`` rows from ``start`` on, (rows, T + 1) int64 in host memory."""
        for first, n in self.micro_batches(start, count):
            tokens = torch.from_numpy(rows.rows(first, n).astype(np.int64))
            yield tokens.pin_memory() if self.device.place.type == "cuda" else tokens

    def batches_from(self, step: int) -> Iterator[list[Tensor]]:
        """The micro-batches of update ``step``, of the one after it, and so on to the last."""
        c = self.config
        for s in range(step, c.steps):
            yield list(self.batches(self.train_rows, s * c.rows_per_step, c.rows_per_step))

    def train_step(self, step: int, batches: Iterable[Tensor], stop: bool) -> tuple[dict[str, Any], bool]:
        """Update number ``step`` (0 is the first): its row of metrics, and whether any rank was told to stop."""
        c, began = self.config, time.monotonic()
        total = torch.zeros(2, device=self.device.place)  # loss, ranks that want to stop
        total[1] = float(stop)
        for tokens in batches:
            loss = self.batch_loss(tokens) / c.tokens_per_step
            loss.backward()
            total[0] += loss.detach()
        self.ranks.sum_gradients(self.parameters)
        norm = optim.clip_gradients(self.parameters, c.grad_clip).item()
        mean_loss, stops = self.ranks.sum(total).tolist()
        if not math.isfinite(mean_loss) or not math.isfinite(norm):
            raise AymenError(
                f"loss {mean_loss} and gradient norm {norm} in step {step + 1}: no update was made "
                "and no checkpoint taken; try a lower --learning-rate or --dtype float32"
            )
        lr = learning_rate(
            step, peak=c.learning_rate, warmup_steps=c.warmup_steps, steps=c.steps, min_ratio=c.min_lr_ratio
        )
        optim.set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        row = {"step": step + 1, "tokens": (step + 1) * c.tokens_per_step, "loss": mean_loss, "lr": lr}
        return row | {"grad_norm": norm} | self._speed(time.monotonic() - began), stops > 0

    def _speed(self, seconds: float) -> dict[str, Any]:
        speed = self.config.tokens_per_step / max(seconds, 1e-9)
        peak = self.device.peak_flops
        mfu = speed * self.model.config.flops_per_token / (peak * self.ranks.world_size) if peak else None
        return {"step_seconds": round(seconds, 4), "tokens_per_second": round(speed, 1), "mfu": mfu}

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss of the first ``val_tokens`` validation tokens, the same number on any ranks."""
        count = min(max(self.config.val_tokens // self.config.block_size, 1), self.val_rows.rows_per_epoch)
        total = torch.zeros((), dtype=torch.float64 if self.device.place.type != "mps" else torch.float32)
        for tokens in self.batches(self.val_rows, 0, count):
            total += self.batch_loss(tokens).cpu()
        total = self.ranks.sum(total.to(self.device.place))
        return total.item() / (count * self.config.block_size)

    def sample(self, step: int) -> str:
        """A section of samples.md: the model goes on from 16 tokens at three places of the validation text."""
        encoding, places = tokenizer.gpt2(), 3
        section = f"## step {step}\n"
        for place in range(places):
            row = self.val_rows.rows(place * self.val_rows.rows_per_epoch // places, 1)[0]
            prompt = [token for token in row[:16].tolist() if token != tokenizer.EOT] or [tokenizer.EOT]
            continuation = generate(
                self.model, prompt, 64, temperature=0.8, top_k=50, seed=self.config.seed, stop=tokenizer.EOT
            )
            text = encoding.decode(list(continuation))
            section += f"\n> {encoding.decode(prompt).strip().replace(chr(10), ' ')}\n\n````text\n{text}\n````\n"
        return section

    def snapshot(self, row: dict[str, Any]) -> checkpoint.Snapshot:
        step = row["step"]
        return checkpoint.Snapshot(
            step, step * self.config.rows_per_step, self.identity() | asdict(self.config), row
        )

    def identity(self) -> dict[str, Any]:
        """What may not change between the parts of one run."""
        c = self.config
        return {
            "model": asdict(c.model),
            "seed": c.seed,
            "tokens_per_step": c.tokens_per_step,
            "data_sha256": self.data_sha256,
        }

    def resume(self, folder: Path, log: RunLog | None) -> dict[str, Any] | None:
        """Continue from the newest checkpoint that verifies; its row of metrics, None for a fresh start."""
        newest, problems = self.ranks.broadcast(find_checkpoint(folder) if self.ranks.is_first else (None, []))
        if newest is None and problems:
            raise DataError(
                "no checkpoint can be used: "
                + "; ".join(problems)
                + f". Start anew with another --run than {folder}"
            )
        if newest is None:
            return None
        if log:
            for line in problems:
                log.say(f"warning: {line}; using {newest.name}")
        self._check_identity(checkpoint.read_snapshot(newest).run, folder)
        return checkpoint.restore(newest, self.model, self.optimizer).metrics

    def _check_identity(self, saved: dict[str, Any], folder: Path) -> None:
        differing = [
            f"{key} was {saved.get(key)}, is {value}"
            for key, value in self.identity().items()
            if saved.get(key) != value
        ]
        if differing:
            raise UsageError(f"{folder} holds another run ({'; '.join(differing)}): choose a new {flag('run')}")

    def fit(self, folder: Path, log: RunLog | None, stop: "StopSignal", describe: dict[str, Any]) -> None:
        """Train to ``config.steps``, from wherever the folder's newest checkpoint is. ``log`` is the first rank's.

        Raises Stopped, with everything saved, when a signal came to any rank.
        """
        c = self.config
        row = self.resume(folder, log)
        step = 0 if row is None else row["step"]
        if log:
            log.start(describe, None if row is None else step)
            log.say(f"resuming from step {step}" if row else f"starting at step 0 of {c.steps}")
        if row is None:
            self.report(folder, log, {"step": 0, "tokens": 0, "val_loss": self.validation_loss()})
        elif self.ranks.broadcast(log is not None and log.last_step() < step):
            self.report(folder, log, row)  # killed between the checkpoint and its row
        with Prefetch(self.batches_from(step)) as ready:
            for batches in ready:
                row, stopping = self.train_step(step, batches, stop.requested)
                step += 1
                last = step == c.steps
                if last or (c.val_every and step % c.val_every == 0):
                    row["val_loss"] = self.validation_loss()
                if last or stopping or step % c.checkpoint_every == 0:
                    self.save(folder, row)
                self.report(folder, log, row)
                if stopping and not last:
                    raise Stopped(
                        f"stopped by {stop.name} at step {step} of {c.steps} and saved: run the same command "
                        "again to continue"
                    )

    def save(self, folder: Path, row: dict[str, Any]) -> None:
        if self.ranks.is_first:
            checkpoint.save(
                folder, self.model, self.optimizer, self.snapshot(row), keep_last=self.config.keep_last
            )
        self.ranks.wait()

    def report(self, folder: Path, log: RunLog | None, row: dict[str, Any]) -> None:
        """Complete a step's row with what is due after its checkpoint (score, samples), and log it."""
        c, step = self.config, row["step"]
        due = step > 0 and c.hellaswag_every and (step % c.hellaswag_every == 0 or step == c.steps)
        if self.score is not None and due:
            row["hellaswag"] = self.score(self.model)
        if log:
            if "val_loss" in row:
                log.samples(step, self.sample(step))
            log.write(row)


def find_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies and what is wrong with newer ones; sweeps up after killed saves."""
    checkpoint.remove_partial(folder)
    return latest_valid(folder)


class StopSignal:
    """Remembers SIGTERM or SIGINT instead of dying of it; a second one ends the process at once, with 130."""

    def __init__(self) -> None:
        self.requested = False
        self.name = "another rank's signal"
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise SystemExit(130)
        self.requested, self.name = True, signal.Signals(number).name
