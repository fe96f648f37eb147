"""Which steps may not touch the weights: those without a finite loss and gradient, and spikes if asked.

A spike is a loss or a gradient norm more than SIGMAS standard deviations above the mean of the last WINDOW steps,
the rule of OLMo's SkipStepOptimizer (https://github.com/allenai/OLMo-core).
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any

WINDOW, SIGMAS = 128, 6.0


@dataclass
class Guard:
    """Judges each step by numbers that all ranks share, so that all ranks decide alike."""

    skip_spikes: bool = False
    skipped: int = 0  # steps in a row
    losses: deque[float] = field(default_factory=partial(deque, maxlen=WINDOW))
    norms: deque[float] = field(default_factory=partial(deque, maxlen=WINDOW))

    def judge(self, loss: float, norm: float) -> tuple[str | None, bool]:
        """What is wrong with a step of this loss and gradient norm (None: nothing), and whether to skip it."""
        why = None
        if not math.isfinite(loss) or not math.isfinite(norm):
            why = f"non-finite {'gradient' if math.isfinite(loss) else 'loss'}"
        else:
            if is_spike(self.losses, loss) or is_spike(self.norms, norm):
                why = "spike"
            self.losses.append(loss)
            self.norms.append(norm)
        skip = why is not None and (why != "spike" or self.skip_spikes)
        self.skipped = self.skipped + 1 if skip else 0
        return why, skip

    def state(self) -> dict[str, Any]:
        """As JSON can hold it, for a checkpoint."""
        return {"skipped": self.skipped, "losses": list(self.losses), "norms": list(self.norms)}

    def restore(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]
        self.losses, self.norms = deque(state["losses"], WINDOW), deque(state["norms"], WINDOW)


def is_spike(past: deque[float], value: float) -> bool:
    """Whether ``value`` is far above a full window of past values."""
    if len(past) < WINDOW:
        return False
    return value > statistics.fmean(past) + SIGMAS * statistics.pstdev(past)
