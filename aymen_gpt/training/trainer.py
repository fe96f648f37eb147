"""The training loop: rows of tokens in, checkpoints and curves out.

One update is ``tokens_per_step`` tokens whatever the hardware: the step's rows are dealt over the ranks, each rank
takes them ``micro_batch`` at a time, every token's loss is divided by the same number, and gradients are summed.
So the mean is over tokens, and world size and micro-batch change nothing but the order of additions.
"""

import gc
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

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
from aymen_gpt.training import checkpoint, optim
from aymen_gpt.training import device as devices
from aymen_gpt.training.config import TrainConfig
from aymen_gpt.training.device import Device, is_out_of_memory, memory_in_words
from aymen_gpt.training.distributed import Ranks
from aymen_gpt.training.gradients import GradientSum
from aymen_gpt.training.guard import Guard
from aymen_gpt.training.muon import Muon, zero_residual_projections
from aymen_gpt.training.plan import dealt
from aymen_gpt.training.results import StepResult, finite
from aymen_gpt.training.resume import (
    Resume,
    changes,
    check_identity,
    find_checkpoint,
    identity,
    is_finished,
    options,
)
from aymen_gpt.training.runlog import RunLog

Score = Callable[[GPT], dict[str, Any]]
MAX_FAILED_SAVES = 3  # in a row, before the run ends


class Stop(Protocol):
    """What ``fit`` asks at each step: see signals.StopSignal."""

    name: str

    @property
    def requested(self) -> bool: ...


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
    initial: Callable[[], GPT] | None = None  # a model of this shape, for the weights of step 0; None: random
    settings: dict[str, Any] = field(default_factory=dict)  # of the machine, to tell what changed on resume

    def __post_init__(self) -> None:
        c = self.config
        c.require_rows(self.ranks.world_size)
        largest = c.largest_micro_batch(on_cuda=self.device.place.type == "cuda")
        self.micro_batch, _ = dealt(c.rows_per_step, self.ranks.world_size, largest)
        self.model = GPT(c.model, torch.Generator().manual_seed(c.seed)).to(self.device.place)
        self.model.residual = devices.residual(c.residual)
        self.parameters = list(self.model.parameters())
        self.sum = GradientSum(self.ranks, self.parameters)
        betas = (c.beta1, c.beta2)
        self.optimizer: torch.optim.Optimizer
        if c.optimizer == "muon":
            zero_residual_projections(self.model)
            self.optimizer = Muon(
                self.model,
                self.ranks,
                lr=c.learning_rate,
                matrix_rate=c.matrix_rate,
                betas=betas,
                weight_decay=c.weight_decay,
            )
        else:
            self.optimizer = optim.adamw(self.model, lr=c.learning_rate, betas=betas, weight_decay=c.weight_decay)
        optim.start_moments(self.model, self.optimizer)
        self.scaler = torch.amp.GradScaler(self.device.place.type, enabled=self.device.dtype == torch.float16)
        self.guard = Guard(c.skip_spikes)
        self.origin = (0, 0)  # a step and its first row of the data order; both move on when a run is continued
        self.compiled = self.device.place.type == "cuda" if c.compile is None else c.compile
        self.loss = self._loss
        if self.compiled:  # --deterministic: choose no kernel by timing it
            options: dict[str, Any] | None = {"deterministic": True} if c.deterministic else None
            self.loss = torch.compile(self._loss, dynamic=False, options=options)
        if self.device.place.type == "cpu" and not self.compiled:
            cpu.use_sparse_gradient(self.model.wte)

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

    def batches_of(self, step: int) -> list[Tensor]:
        """This rank's micro-batches of update ``step``, a pure function of the step."""
        return list(self.batches(self.train_rows, self.first_row(step), self.config.rows_per_step))

    def first_row(self, step: int) -> int:
        """Where update ``step`` begins in the data order."""
        origin_step, origin_row = self.origin
        return origin_row + (step - origin_step) * self.config.rows_per_step

    def fit_micro_batch(self) -> None:
        """Halve the micro-batch until forward and backward fit in the memory of every rank."""
        while not self.ranks.all(self._fits(self.micro_batch)):
            if self.micro_batch == 1:
                raise AymenError(f"one row does not fit in memory ({memory_in_words(self.device)}): {SMALLER}")
            self.micro_batch = (self.micro_batch + 1) // 2

    def _fits(self, rows: int) -> bool:
        """Whether the first passes of a step work; the second one has the first one's gradients beside it.

        Without a compiler here, and without --compile, the run goes on uncompiled.
        """
        try:
            for _ in self.micro_batches(0, self.config.rows_per_step)[:2]:
                self.batch_loss(torch.zeros(rows, self.config.block_size + 1, dtype=torch.int64)).backward()
        except RuntimeError as error:
            if is_out_of_memory(error):
                devices.forget_failed_try()
                return False
            if self.config.compile or not devices.is_compiler_failure(error):
                raise
            reason = " ".join(str(error).split())[:150]
            warnings.warn(f"torch.compile fails here, so this run is slower without it ({reason})", stacklevel=2)
            self.loss, self.compiled = self._loss, False
            return self._fits(rows)
        finally:
            self.sum.clear()
        return True

    def train_step(
        self, step: int, batches: Iterable[Tensor], *, stop: bool = False, cannot_save: bool = False
    ) -> StepResult:
        """Make update ``step`` (0 is the first) from this rank's micro-batches; ranks share their two verdicts."""
        c, began = self.config, time.monotonic()
        batches, losses = list(batches), []
        with self.advice_when_out_of_memory(step):
            for number, tokens in enumerate(batches, 1):
                if number == len(batches):
                    self.sum.coming()
                loss = (
                    self.batch_loss(tokens) / c.tokens_per_step
                )  # a token weighs the same on any number of ranks
                self.scaler.scale(loss).backward()
                losses.append(loss.detach())
        self.sum.complete()
        self.scaler.unscale_(self.optimizer)
        norm = optim.clip_gradients(self.parameters, c.grad_clip)
        numbers = self.ranks.sum(self._numbers(sum(losses), norm / self.ranks.world_size, stop, cannot_save))
        mean_loss, norm, *verdicts = numbers.cpu().tolist()  # the only place where the host waits for a GPU
        wrong, skip = self._judge(mean_loss, norm)
        lr = optim.learning_rate(
            step,
            peak=c.learning_rate,
            warmup_steps=c.warmup_steps,
            steps=c.steps,
            min_ratio=c.min_lr_ratio,
            schedule=c.schedule,
        )
        if not skip:
            optim.set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
        self.scaler.update()
        result = StepResult(step + 1, self.first_row(step + 1) * c.block_size, mean_loss, lr, norm)
        result.stop, result.cannot_save = (count > 0 for count in verdicts)
        if skip:
            result.skipped, result.documents = wrong, self._documents(step, losses)
        elif wrong:
            result.spike = True
        if self.guard.skipped <= c.max_skips:  # else failure_report looks at the gradients once more
            self.sum.clear()
        self._measure_speed(result, time.monotonic() - began)
        return result

    def _numbers(self, *values: float | Tensor) -> Tensor:
        """Values as one float32 tensor on the device, so that one sum over the ranks serves all."""
        scalars = [v if isinstance(v, Tensor) else torch.full((), v, device=self.device.place) for v in values]
        return torch.stack([scalar.float() for scalar in scalars])

    @contextmanager
    def advice_when_out_of_memory(self, step: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            smaller = f"try --micro-batch {self.micro_batch // 2}, the result is the same"
            raise AymenError(
                f"out of memory in step {step + 1} with micro-batch {self.micro_batch} "
                f"({memory_in_words(self.device)}): {smaller if self.micro_batch > 1 else SMALLER}"
            ) from error

    def _judge(self, loss: float, norm: float) -> tuple[str | None, bool]:
        """What is wrong with this step, None mostly, and whether it may not touch the weights."""
        overflow = self.scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(norm)
        if overflow and self.scaler.get_scale() > 1.0:
            return "float16 overflow", True  # the scale was too high: it halves, nothing is wrong
        return self.guard.judge(loss, norm)

    def _documents(self, step: int, losses: list[Tensor]) -> list[str]:
        """The documents of a skipped step: of the micro-batches whose loss is not finite, if it can be told."""
        places = self.micro_batches(self.first_row(step), self.config.rows_per_step)
        bad = [place for place, loss in zip(places, losses, strict=True) if not torch.isfinite(loss)]
        suspects = [tuple(p) for of_rank in self.ranks.gather(bad) for p in of_rank]
        rows = suspects or [(self.first_row(step), self.config.rows_per_step)]
        try:
            reads = [read for first, n in rows for read in self.train_rows.documents(first, n)]
        except DataError as error:  # no reason to stop training
            return [str(error)]
        return list(dict.fromkeys(read.id or f"{read.shard} document {read.document}" for read in reads))

    def _measure_speed(self, result: StepResult, seconds: float) -> None:
        speed, peak = self.config.tokens_per_step / max(seconds, 1e-9), self.device.peak_flops
        result.step_seconds, result.tokens_per_second = round(seconds, 4), round(speed, 1)
        if peak:
            result.mfu = speed * self.model.config.flops_per_token / (peak * self.ranks.world_size)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss of the first ``val_tokens`` validation tokens, the same number on any ranks."""
        count = min(max(self.config.val_tokens // self.config.block_size, 1), self.val_rows.rows_per_epoch)
        place = self.device.place
        total = torch.zeros((), dtype=torch.float32 if place.type == "mps" else torch.float64, device=place)
        for tokens in self.batches(self.val_rows, 0, count):
            total += self.batch_loss(tokens)
        return self.ranks.sum(total).item() / (count * self.config.block_size)

    def sample(self, step: int) -> list[dict[str, Any]]:
        """For samples.jsonl: the model goes on from 16 tokens at three places of the validation text.

        The ranks take the places in turn; every rank gets all samples.
        """
        places, world = 3, self.ranks.world_size
        parts = self.ranks.gather([self._continued(i, places) for i in range(self.ranks.rank, places, world)])
        return [{"step": step} | parts[i % world][i // world] for i in range(places)]

    def _continued(self, place: int, places: int) -> dict[str, Any]:
        encoding = tokenizer.gpt2()
        row = self.val_rows.rows(place * self.val_rows.rows_per_epoch // places, 1)[0]
        prompt = [token for token in row[:16].tolist() if token != tokenizer.EOT] or [tokenizer.EOT]
        continuation = generate(
            self.model, prompt, 64, temperature=0.8, top_k=50, seed=self.config.seed, stop=tokenizer.EOT
        )
        try:
            text = encoding.decode(list(continuation))
        except DataError as error:  # a sample does not end a run, what spoiled the weights will
            text = f"({error})"
        return {"prompt": encoding.decode(prompt), "text": text}

    def snapshot(self, result: StepResult) -> checkpoint.Snapshot:
        return checkpoint.Snapshot(
            step=result.step,
            updates=optim.updates(self.optimizer),
            rows=self.first_row(result.step),
            identity=identity(self.config, self.data_sha256),
            settings=self.all_settings(),
            guard=self.guard.state(),
            metrics=result.row(),
            scaler=self.scaler.state_dict(),
        )

    def all_settings(self) -> dict[str, Any]:
        """What may change between the parts of a run, and is told when it does."""
        return options(self.config) | {"world_size": self.ranks.world_size} | self.settings

    def resume(self, folder: Path, log: RunLog | None, how: Resume) -> tuple[StepResult | None, dict[str, Any]]:
        """Go to the newest checkpoint that verifies: its result (None: a new start), and what changed."""
        newest, notices = self.ranks.first(lambda: find_checkpoint(folder, how.mode))
        if log:
            for notice in notices:
                log.say(f"warning: {notice}")
        if newest is None:
            if self.initial is not None:
                self.model.load_state_dict(self.initial().state_dict())
                if log:
                    log.say(f"weights of {self.config.init_from}; no optimizer state: the schedule begins anew")
            return None, {}
        saved = checkpoint.read_snapshot(newest)
        now = identity(self.config, self.data_sha256)
        changed = check_identity(saved.identity, now, folder, how)
        checkpoint.restore(newest, self.model, self.optimizer)
        self.guard.restore(saved.guard)
        if saved.scaler:  # none where the steps before were not in float16
            self.scaler.load_state_dict(saved.scaler)
        self.origin = (saved.step, saved.rows)
        return StepResult.of(saved.metrics), changed | changes(saved.settings, self.all_settings())

    def fit(
        self,
        folder: Path,
        log: RunLog | None,
        stop: Stop,
        describe: Callable[[], dict[str, Any]] = dict,
        how: Resume | None = None,
    ) -> None:
        """Train to ``config.steps``, from wherever the folder's newest checkpoint is. ``log`` is the first rank's.

        A finished run stays as it is. Raises Stopped, with everything saved, when a signal came to any rank;
        AymenError after ``max_skips`` steps in a row without a finite loss and gradient; CannotWrite when no
        checkpoint could be saved.
        """
        c = self.config
        result, changed = self.resume(folder, log, how or Resume())
        step = 0 if result is None else result.step
        if step >= c.steps and self.ranks.first(lambda: is_finished(folder, step)):
            if log:
                log.say(f"{folder} is finished, at step {step}: to train on, raise --steps")
            return
        if not c.micro_batch:
            self.fit_micro_batch()
        elif self.compiled:
            self._fits(self.micro_batch)  # to find out whether it can be compiled
        if log:
            log.start(describe(), None if result is None else step, changed)
        if result is None:
            self.report(log, StepResult(0, 0, val_loss=self.validation_loss()))
        elif self.ranks.broadcast(log is not None and log.last_step() < step):
            self.report(log, result)  # killed between the checkpoint and its row
        warn = log.say if log else print
        with (
            checkpoint.Saver(folder, keep_last=c.keep_last, keep_every=c.keep_every, warn=warn) as saver,
            ThreadPoolExecutor(1, "batches") as reader,
            no_garbage_collection(),
        ):
            ready = reader.submit(self.batches_of, step)
            while step < c.steps:
                batches = ready.result()
                if step + 1 < c.steps:
                    ready = reader.submit(self.batches_of, step + 1)  # read while this step is computed
                cannot_save = saver.failures >= MAX_FAILED_SAVES
                result = self.train_step(step, batches, stop=stop.requested, cannot_save=cannot_save)
                step += 1
                last = step == c.steps
                if last or (c.val_every and step % c.val_every == 0):
                    result.val_loss = self.validation_loss()
                if self.ranks.is_first and (last or result.stop or step % c.checkpoint_every == 0):
                    saver.start(self.model, self.optimizer, self.snapshot(result))
                if step % c.checkpoint_every == 0:
                    gc.collect()  # now, and on all ranks at once
                must_be_saved = last or result.stop or result.cannot_save
                if must_be_saved or self.scores_after(step):
                    self.wait_for_save(saver, required=must_be_saved)
                self.report(log, result)
                if self.guard.skipped > c.max_skips:
                    if log:
                        log.failure(self.failure_report(result))
                    raise AymenError(self._hopeless(result))
                if result.stop and not last:
                    raise Stopped(
                        f"stopped by {stop.name} at step {step} of {c.steps} and saved: run the same command "
                        "again to continue"
                    )

    def wait_for_save(self, saver: checkpoint.Saver, *, required: bool) -> None:
        """Wait until the save under way is done; if it is ``required``, every rank raises when it failed."""
        saver.wait()
        error = self.ranks.broadcast(str(saver.error) if saver.error else None) if required else None
        if error:
            raise CannotWrite(f"{error}; make room, then run the same command again")

    def failure_report(self, result: StepResult) -> dict[str, Any]:
        """failure.json: the last skipped step, with every parameter's size and that of its gradient."""

        def size(t: Tensor | None) -> dict[str, Any]:
            if t is None:
                return {}
            return {"norm": finite(t.norm().item()), "not_finite": int((~torch.isfinite(t)).sum())}

        return result.row() | {
            "last_losses": list(self.guard.losses)[-20:],
            "weights": {name: size(p.detach()) for name, p in self.model.named_parameters()},
            "gradients": {name: size(p.grad) for name, p in self.model.named_parameters()},
        }

    def _hopeless(self, result: StepResult) -> str:
        return (
            f"{self.guard.skipped} steps in a row were skipped, the last for a {result.skipped}: the weights are "
            f"those before step {result.step - self.guard.skipped + 1}; failure.json has the documents and the "
            "gradients; try a lower --learning-rate or --dtype float32"
        )

    def scores_after(self, step: int) -> bool:
        """Whether HellaSwag is scored after update ``step``."""
        c = self.config
        if self.score is None or c.hellaswag_every is None:
            return False
        return step % c.hellaswag_every == 0 or step == c.steps

    def report(self, log: RunLog | None, result: StepResult) -> None:
        """Measure what is due after a step's checkpoint (score, samples), and log the step."""
        if self.score is not None and result.step > 0 and self.scores_after(result.step):
            result.hellaswag = self.score(self.model)
        written = self.sample(result.step) if result.val_loss is not None else None
        if log:
            if written:
                log.samples(written)
            log.write(result.row())


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Python's collector of cycles stops a rank when it likes, and then all ranks wait for that one."""
    gc.collect()
    gc.freeze()  # what is there now is never looked at again
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


SMALLER = "try a smaller --preset, a shorter --block-size or another device"
