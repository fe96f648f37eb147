"""The learning rate as a pure function of the step."""

import math


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int, min_ratio: float) -> float:
    """Rate of update ``step`` (0 is the first): linear warmup, then half a cosine from peak to min_ratio * peak.

    GPT-3 (arXiv:2005.14165, appendix B). With peak 1.0, 2 warmup steps of 4 and min_ratio 0.1:

    >>> [round(learning_rate(s, peak=1.0, warmup_steps=2, steps=4, min_ratio=0.1), 3) for s in range(5)]
    [0.5, 1.0, 1.0, 0.55, 0.1]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
