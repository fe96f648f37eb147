"""The training loop: rows of tokens in, checkpoints and curves out.

One update is ``tokens_per_step`` tokens whatever the hardware: the step's rows are dealt over the ranks, each rank
takes them ``micro_batch`` at a time, every token's loss is divided by the same number, and gradients are summed.
So the mean is over tokens, and world size and micro-batch change nothing but the order of additions.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aymen_gpt.data import tokenizer
from aymen_gpt.data.loader import TokenRows, deal
from aymen_gpt.errors import AymenError, CannotWrite, DataError, Stopped
from aymen_gpt.model import cpu
from aymen_gpt.model.generation import generate
from aymen_gpt.model.gpt import GPT
from aymen_gpt.model.loss import linear_cross_entropy
from aymen_gpt.training import checkpoint, optim, sharding
from aymen_gpt.training import device as devices
from aymen_gpt.training.config import TrainConfig
from aymen_gpt.training.device import Device
from aymen_gpt.training.distributed import Ranks
from aymen_gpt.training.guard import Guard
from aymen_gpt.training.muon import Muon, zero_residual_projections
from aymen_gpt.training.plan import USABLE, dealt, smallest_shard, whole_memory
from aymen_gpt.training.resume import (
    changes,
    check_identity,
    find_checkpoint,
    identity,
    is_finished,
    options,
)
from aymen_gpt.training.runlog import RunLog
from aymen_gpt.training.signals import StopSignal

Row = dict[str, Any]  # of metrics.jsonl: null is a number that is not finite, for JSON has no NaN
MAX_FAILED_SAVES = 3  # in a row, before the run ends
SAMPLES = 3


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass
class Trainer:
    """The parts of a run, built once; ``fit`` is the story."""

    config: TrainConfig
    device: Device
    ranks: Ranks
    train_rows: TokenRows
    val_rows: TokenRows
    data_sha256: str  # of the token shards' manifest
    score: Callable[[GPT], Row] | None = None  # a model -> its HellaSwag, for metrics.jsonl
    initial: Callable[[], GPT] | None = None  # a model of this shape, for the weights of step 0; None: random
    settings: dict[str, Any] = field(default_factory=dict)  # of the machine, to tell what changed on resume

    def __post_init__(self) -> None:
        c = self.config
        c.require_rows(self.ranks.world_size)
        largest = c.largest_micro_batch(on_cuda=self.device.place.type == "cuda")
        self.micro_batch, _ = dealt(c.rows_per_step, self.ranks.world_size, largest)
        self.shard, self.can_be_whole = self.sharing()
        self.model = sharding.new_model(c.model, c.seed, self.shard, self.ranks, self.device.place)
        self.model.residual, self.model.recompute = getattr(torch, c.residual), c.recompute
        self.named = dict(self.model.named_parameters())
        adamw: Any = {"lr": c.learning_rate, "betas": (c.beta1, c.beta2), "weight_decay": c.weight_decay}
        self.optimizer: torch.optim.Optimizer
        if c.optimizer == "muon":
            zero_residual_projections(self.model)
            self.optimizer = Muon(self.model, self.ranks, matrix_rate=c.matrix_rate, **adamw)
        else:
            self.optimizer = optim.adamw(self.model, **adamw)
        optim.start_moments(self.model, self.optimizer)
        self.scaler = torch.amp.GradScaler(self.device.place.type, enabled=self.device.dtype == torch.float16)
        self.guard = Guard(c.skip_spikes)
        self.identity = identity(c, self.data_sha256)
        self.settings = options(c) | {"world_size": self.ranks.world_size} | self.settings
        self.origin = (0, 0)  # a step and its first row of the data order; both move on when a run is continued
        self.compiled = self.device.place.type == "cuda" if c.compile is None else c.compile
        self.loss, self.head = self._loss, linear_cross_entropy
        if self.compiled:
            self.compile()
        elif self.device.place.type == "cpu":
            cpu.use_sparse_gradient(self.model.wte)

    def sharing(self) -> tuple[int, bool]:
        """How many ranks hold one copy of the model between them, and whether this one can hold it whole."""
        c, ranks, auto = self.config, self.ranks, 1
        there = 1e9 * (devices.memory_there(self.device) or math.inf)
        if c.shard == "auto" and there < math.inf and self.device.place.type == "cuda":
            auto = smallest_shard(c, ranks.world_size, ranks.local_world_size, there)
            auto = max(ranks.gather(auto))  # GPUs may differ
        size = sharding.shard_size(c.shard, ranks, auto)
        return size, size == 1 or whole_memory(c.model, c.optimizer, size) < USABLE * there

    def compile(self) -> None:
        """The whole loss of one process; on many the blocks, for what gathers weights between them cannot be."""
        choices: dict[str, Any] | None = {"deterministic": True} if self.config.deterministic else None
        if self.ranks.world_size == 1:  # --deterministic: choose no kernel by timing it
            self.loss = torch.compile(self._loss, dynamic=False, options=choices)
        else:
            self.head = torch.compile(linear_cross_entropy, dynamic=False, options=choices)
            for block in self.model.h:
                block.compile(dynamic=False, options=choices)

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Summed loss of the tokens y (b, T) that follow x (b, T), in nats."""
        vocab_size = self.config.model.vocab_size
        with self.device.autocast(cache=self.ranks.world_size == 1):
            return self.model(x, head=lambda hidden, weight: self.head(hidden, weight, y, vocab_size))

    def batch_loss(self, tokens: Tensor) -> Tensor:
        """Summed loss of a micro-batch (b, T + 1) in host memory; of one without rows 0, which takes as long."""
        if not len(tokens):  # other ranks have rows, and need this one's part of the weights for them
            return 0.0 * self.batch_loss(tokens.new_zeros(1, tokens.size(1)))
        tokens = tokens.to(self.device.place, non_blocking=True)
        return self.loss(tokens[:, :-1], tokens[:, 1:])

    def first_row(self, step: int) -> int:
        """Where update ``step`` begins in the data order."""
        origin_step, origin_row = self.origin
        return origin_row + (step - origin_step) * self.config.rows_per_step

    def micro_batches(self, start: int, count: int) -> list[tuple[int, int]]:
        """This rank's share of ``count`` rows from ``start`` on, as (first row, rows).

        All ranks have as many; one with fewer rows than others may have one without rows.
        """
        offset, mine = deal(count, self.ranks.rank, self.ranks.world_size)
        _, passes = dealt(count, self.ranks.world_size, self.micro_batch)
        shares = [deal(mine, i, passes) for i in range(passes)]
        return [(start + offset + first, rows) for first, rows in shares]

    def batches(self, rows: TokenRows, start: int, count: int) -> Iterator[Tensor]:
        """This rank's micro-batches of ``count`` rows from ``start`` on, (rows, T + 1) int64 in host memory."""
        for first, n in self.micro_batches(start, count):
            read = rows.rows(first, n) if n else np.empty((0, self.config.block_size + 1))
            tokens = torch.from_numpy(read.astype(np.int64))
            yield tokens.pin_memory() if self.device.place.type == "cuda" else tokens

    def batches_of(self, step: int) -> list[Tensor]:
        """This rank's micro-batches of update ``step``, a pure function of the step."""
        return list(self.batches(self.train_rows, self.first_row(step), self.config.rows_per_step))

    def train_step(self, step: int, batches: list[Tensor], *flags: bool) -> tuple[Row, list[bool]]:
        """Make update ``step`` (0 is the first) from this rank's micro-batches.

        Returns its row of metrics.jsonl, and of each flag whether any rank has set it.
        """
        c, began, losses = self.config, time.monotonic(), []
        with self.ranks.meeting():
            for number, tokens in enumerate(batches, 1):
                sharding.accumulate(self.model, last=number == len(batches))
                loss = self.batch_loss(tokens) / c.tokens_per_step  # a token weighs the same on any ranks
                self.scaler.scale(loss).backward()
                losses.append(loss.detach())
            self.scaler.unscale_(self.optimizer)
            norm = optim.clip_gradients(self.named.values(), c.grad_clip) / self.ranks.world_size
        shared = [sum(losses), norm, *(torch.full((), float(flag), device=self.device.place) for flag in flags)]
        numbers = self.ranks.sum(torch.stack(shared))  # type: ignore[arg-type]
        mean_loss, grad_norm, *counts = numbers.cpu().tolist()  # the only place where the host waits for a GPU
        row: Row = {"step": step + 1, "tokens": self.first_row(step + 1) * c.block_size, "loss": finite(mean_loss)}
        row |= {"lr": optim.scheduled_rate(c, step), "grad_norm": finite(grad_norm)}
        wrong, skip = self.judge(mean_loss, grad_norm)
        if skip:
            row |= {"skipped": wrong, "documents": self.documents(step, losses)}
        else:
            optim.set_learning_rate(self.optimizer, row["lr"])
            self.optimizer.step()
            row |= {"spike": True} if wrong else {}
        self.scaler.update()
        if self.guard.skipped <= c.max_skips:  # else give_up looks at the gradients once more
            self.optimizer.zero_grad()
        seconds = max(time.monotonic() - began, 1e-9)
        rate, peak = c.tokens_per_step / seconds, self.device.peak_flops
        row |= {"step_seconds": round(seconds, 4), "tokens_per_second": round(rate, 1)}
        if peak:
            row["mfu"] = rate * self.model.config.flops_per_token / (peak * self.ranks.world_size)
        return row, [count > 0 for count in counts]

    def judge(self, loss: float, norm: float) -> tuple[str | None, bool]:
        """What is wrong with a step, None mostly, and whether it may not touch the weights."""
        overflow = self.scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(norm)
        if overflow and self.scaler.get_scale() > 1.0:
            return "float16 overflow", True  # the scale was too high: it halves, nothing is wrong
        return self.guard.judge(loss, norm)

    def documents(self, step: int, losses: list[Tensor]) -> list[str]:
        """The documents of a skipped step: of the micro-batches whose loss is not finite, if it can be told."""
        places = self.micro_batches(self.first_row(step), self.config.rows_per_step)
        bad = [place for place, loss in zip(places, losses, strict=True) if not torch.isfinite(loss)]
        suspects = [place for of_rank in self.ranks.gather(bad) for place in of_rank]
        suspects = suspects or [(self.first_row(step), self.config.rows_per_step)]
        try:
            reads = [read for first, n in suspects for read in self.train_rows.documents(first, n)]
        except DataError as error:  # no reason to stop training
            return [str(error)]
        return list(dict.fromkeys(read.id or f"{read.shard} document {read.document}" for read in reads))

    def fit_micro_batch(self) -> None:
        """Halve the micro-batch until forward and backward fit in the memory of every rank."""
        while not all(fits := self.ranks.gather(self._fits(self.micro_batch))):
            if self.micro_batch == 1 or any(fits):  # those where it fits wait for the layers of the others
                raise self.too_large("in the first try")
            self.micro_batch = (self.micro_batch + 1) // 2

    def _fits(self, rows: int) -> bool:
        """Whether the first passes of a step work.

        Without a compiler here, and without --compile, the run goes on uncompiled.
        """
        try:
            list(self.try_passes(rows))
        except RuntimeError as error:
            if devices.is_out_of_memory(error):
                devices.forget_failed_try()
                return False
            if self.config.compile or not devices.is_compiler_failure(error):
                raise
            reason = " ".join(str(error).split())[:150]
            warnings.warn(f"torch.compile fails here, so this run is slower without it ({reason})", stacklevel=2)
            self.loss, self.head, self.compiled = self._loss, linear_cross_entropy, False
            for block in self.model.h:
                block._compiled_call_impl = None
            return self._fits(rows)
        finally:
            sharding.forget(self.model)
        return True

    def try_passes(self, rows: int) -> Iterator[None]:
        """The first passes of a step, for their memory; the second one has the first one's gradients beside it."""
        count = len(self.micro_batches(0, self.config.rows_per_step)[:2])
        for number in range(1, count + 1):
            sharding.accumulate(self.model, last=number == count)
            self.batch_loss(torch.zeros(rows, self.config.block_size + 1, dtype=torch.int64)).backward()
            yield

    def too_large(self, when: str) -> AymenError:
        smaller = f"try --micro-batch {self.micro_batch // 2}, the result is the same"
        if self.micro_batch == 1:
            smaller = "try a smaller --preset, a shorter --block-size or another device"
        memory = devices.memory_there(self.device) or math.nan
        return AymenError(f"out of memory ({memory:.0f} GB) {when} with micro-batch {self.micro_batch}: {smaller}")

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss of the first ``val_tokens`` validation tokens, the same number on any ranks."""
        count = min(max(self.config.val_tokens // self.config.block_size, 1), self.val_rows.rows_per_epoch)
        place = self.device.place
        total = torch.zeros((), dtype=torch.float32 if place.type == "mps" else torch.float64, device=place)
        with self.ranks.meeting():
            for tokens in self.batches(self.val_rows, 0, count):
                total += self.batch_loss(tokens)
        sharding.settle(self.model)
        return self.ranks.sum(total).item() / (count * self.config.block_size)

    def sample(self, step: int) -> list[Row]:
        """For samples.jsonl: the model goes on from 16 tokens at a few places of the validation text.

        Ranks that share the model do this together, at one place, for each token takes the time of a pass.
        """
        encoding, written = tokenizer.gpt2(), []
        for place in range(SAMPLES if self.can_be_whole else 1):
            row = self.val_rows.rows(place * self.val_rows.rows_per_epoch // SAMPLES, 1)[0]
            prompt = [token for token in row[:16].tolist() if token != tokenizer.EOT] or [tokenizer.EOT]
            seed = self.config.seed
            more = generate(self.model, prompt, 64, temperature=0.8, top_k=50, seed=seed)
            try:
                text = encoding.decode(list(takewhile(lambda token: token != tokenizer.EOT, list(more))))
            except DataError as error:  # a sample does not end a run, what spoiled the weights will
                text = f"({error})"
            written.append({"step": step, "prompt": encoding.decode(prompt), "text": text})
        return written

    def resume(
        self, folder: Path, log: RunLog | None, mode: str, override: Sequence[str]
    ) -> tuple[Row | None, dict[str, Any]]:
        """Go to the newest checkpoint that verifies: its row (None: a new start), and what changed."""
        newest, notices = self.ranks.first(lambda: find_checkpoint(folder, mode))
        if newest is None and self.initial is not None:
            for name, whole in self.initial().state_dict().items():
                sharding.put(self.named[name], whole)
            notices.append(f"weights of {self.config.init_from}; no optimizer state: the schedule begins anew")
        for notice in notices:
            if log:
                log.say(notice)
        if newest is None:
            return None, {}
        saved = checkpoint.read_snapshot(newest)
        changed = check_identity(saved.identity, self.identity, folder, override)
        checkpoint.restore(newest, self.model, self.optimizer, self.ranks)
        self.guard.restore(saved.guard)
        if saved.scaler:  # none where the steps before were not in float16
            self.scaler.load_state_dict(saved.scaler)
        self.origin = (saved.step, saved.rows)
        known = {key: value for key, value in self.settings.items() if key in saved.settings}  # by that version
        return saved.metrics, changed | changes(saved.settings, known)

    def snapshot(self, row: Row) -> checkpoint.Snapshot:
        return checkpoint.Snapshot(
            step=row["step"],
            updates=optim.updates(self.optimizer),
            rows=self.first_row(row["step"]),
            identity=self.identity,
            settings=self.settings,
            guard=self.guard.state(),
            metrics=dict(row),
            scaler=self.scaler.state_dict(),
        )

    def fit(
        self,
        folder: Path,
        log: RunLog | None,
        stop: StopSignal,
        describe: Callable[[], dict[str, Any]] = dict,
        mode: str = "auto",
        override: Sequence[str] = (),
    ) -> None:
        """Train to ``config.steps``, from wherever the folder's newest checkpoint is. ``log`` is the first rank's.

        A finished run stays as it is. Raises Stopped, with everything saved, when a signal came to any rank;
        AymenError after ``max_skips`` steps in a row without a finite loss and gradient; CannotWrite when no
        checkpoint could be saved.
        """
        c = self.config
        step = self.begin(folder, log, describe, mode, override)
        if step >= c.steps:
            return
        warn = log.say if log else print
        with (
            checkpoint.Saver(folder, warn, c.keep_last, c.is_milestone, self.ranks) as saver,
            ThreadPoolExecutor(1, "batches") as reader,
        ):
            ready = reader.submit(self.batches_of, step)
            while step < c.steps:
                batches = ready.result()
                if step + 1 < c.steps:
                    ready = reader.submit(self.batches_of, step + 1)  # read while this step is computed
                try:
                    flags = stop.requested, saver.failures >= MAX_FAILED_SAVES
                    row, (stopping, cannot_save) = self.train_step(step, batches, *flags)
                except RuntimeError as error:
                    if devices.is_out_of_memory(error):
                        raise self.too_large(f"in step {step + 1}") from error
                    raise
                step += 1
                last = step == c.steps
                if last or (c.val_every and step % c.val_every == 0):
                    row["val_loss"] = finite(self.validation_loss())
                due = step % c.checkpoint_every == 0 or step in c.kept_steps
                if last or stopping or due:
                    saver.start(self.model, self.optimizer, self.snapshot(row))
                if last or stopping or cannot_save:
                    self.wait_for_save(saver)
                self.report(log, row)
                if self.guard.skipped > c.max_skips:
                    self.give_up(log, row)
                if stopping and not last:
                    raise Stopped(
                        f"stopped by {stop.name} at step {step} of {c.steps} and saved: run the same command "
                        "again to continue"
                    )

    def begin(
        self,
        folder: Path,
        log: RunLog | None,
        describe: Callable[[], dict[str, Any]],
        mode: str,
        override: Sequence[str],
    ) -> int:
        """Get ready to train, and return how many steps are done."""
        row, changed = self.resume(folder, log, mode, override)
        step: int = row["step"] if row else 0
        if step >= self.config.steps and self.ranks.first(lambda: is_finished(folder, step)):
            if log:
                log.say(f"{folder} is finished, at step {step}: to train on, raise --steps")
            return step
        self.can_be_whole = all(self.ranks.gather(self.can_be_whole))
        if not self.config.micro_batch:
            self.fit_micro_batch()
        elif self.compiled:
            self._fits(self.micro_batch)  # to find out whether it can be compiled
        if log:
            log.start(describe(), step if row else None, changed)
        if row is None:
            self.report(log, {"step": 0, "tokens": 0, "val_loss": finite(self.validation_loss())})
        elif self.ranks.broadcast(log is not None and log.last_step() < step):
            self.report(log, row)  # killed between the checkpoint and its row
        return step

    def wait_for_save(self, saver: checkpoint.Saver) -> None:
        """Return when the save under way is done; every rank raises CannotWrite when it failed."""
        saver.wait()
        if error := self.ranks.broadcast(str(saver.error or "")):
            raise CannotWrite(f"{error}; make room, then run the same command again")

    def scores_after(self, step: int) -> bool:
        """Whether HellaSwag is scored after update ``step``."""
        every = self.config.hellaswag_every
        return bool(self.score and every and step and (step % every == 0 or step == self.config.steps))

    def report(self, log: RunLog | None, row: Row) -> None:
        """Measure what is due after a step's checkpoint (score, samples), and log the step."""
        samples: list[Row] = []
        if self.scores_after(row["step"]) or "val_loss" in row:
            uncompiled = torch.compiler.set_stance("force_eager")  # nearly every pass has another shape
            with uncompiled, self.ranks.meeting(), sharding.evaluation(self.model, whole=self.can_be_whole):
                if self.score and self.scores_after(row["step"]):
                    row = row | {"hellaswag": self.score(self.model)}
                if "val_loss" in row and (log or not self.can_be_whole):
                    samples = self.sample(row["step"])
        if log:
            log.write(row, samples)

    def give_up(self, log: RunLog | None, row: Row) -> None:
        """AymenError; failure.json has the last skipped step and the norms of all parameters and gradients."""

        def size(t: Tensor) -> Row:
            not_finite = sharding.total((~torch.isfinite(t)).sum())
            return {"norm": finite(sharding.total(t.norm()).item()), "not_finite": int(not_finite)}

        weights = {name: size(p.detach()) for name, p in self.named.items()}
        gradients = {name: size(p.grad) for name, p in self.named.items() if p.grad is not None}
        if log:
            log.replace(
                "failure.json",
                row | {"last_losses": list(self.guard.losses)[-20:], "weights": weights, "gradients": gradients},
            )
        raise AymenError(
            f"{self.guard.skipped} steps in a row were skipped, the last for a {row['skipped']}: the weights are "
            f"those before step {row['step'] - self.guard.skipped + 1}; failure.json has the documents and the "
            "gradients; try a lower --learning-rate or --dtype float32"
        )
