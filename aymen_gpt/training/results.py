"""What a step of training found, as a line of metrics.jsonl. Needs no torch."""

import math
from dataclasses import dataclass, fields
from typing import Any


@dataclass
class StepResult:
    """What one update did, and what was measured after it. Not-a-number stands for what is not finite."""

    step: int  # 1 is the first
    tokens: int  # read so far
    loss: float | None = None  # nats per token
    lr: float | None = None
    grad_norm: float | None = None  # before clipping
    skipped: str | None = None  # why the weights did not change
    documents: list[str] | None = None  # of a skipped step
    spike: bool | None = None
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    val_loss: float | None = None
    hellaswag: dict[str, Any] | None = None
    stop: bool = False  # a signal came to some rank
    cannot_save: bool = False  # the first rank has failed to save too often

    def row(self) -> dict[str, Any]:
        """A line of metrics.jsonl: what is there, null for what is not finite (JSON has no NaN)."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("stop", "cannot_save")}
        return {
            key: finite(value) if isinstance(value, float) else value
            for key, value in found.items()
            if value is not None
        }

    @classmethod
    def of(cls, row: dict[str, Any]) -> "StepResult":
        """The result that a line of metrics.jsonl was made of."""
        known = {f.name for f in fields(cls)} & row.keys()
        values: dict[str, Any] = {key: math.nan if row[key] is None else row[key] for key in known}
        return cls(**values)


def finite(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return value if math.isfinite(value) else None
