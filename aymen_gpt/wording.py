"""Numbers and names in words, alike in every table, page and paper. Imports nothing of ours, and no torch."""

from collections.abc import Mapping
from typing import Any

# HellaSwag's two protocols, and how they read a question. Their scores do not compare.
PROTOCOLS = {
    "completion": "context and ending as they are, loss per token of the ending",
    "harness": "as lm-evaluation-harness: cleaned text, log-likelihood per character of the ending",
}
HELLASWAG_EXAMPLES = 10_042  # of its validation set


def human(value: float) -> str:
    """Three digits and a letter: 40e9 -> "40B", 16_080_896 -> "16.1M", 2600 -> "2,600", 0.0006 -> "6e-4"."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        scaled = value / size
        if abs(scaled) >= (9.995 if letter == "K" else 0.9995):
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            text = f"{scaled:,.{digits}f}"
            return (text.rstrip("0").rstrip(".") if digits else text) + letter
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.3g}"


def percent(share: float | None, error: float | None = None, *, digits: int = 2) -> str:
    """0.2955 -> "29.55 %"; with its standard error 0.261, 0.0139 -> "26.10 % ± 1.39"; None -> "-"."""
    if share is None:
        return "-"
    text = f"{100 * share:.{digits}f} %"
    return text if error is None else f"{text} ± {100 * error:.{digits}f}"


def forecast(expected: Mapping[str, float]) -> str:
    """ "3.210 (3.150 to 3.290)", and where a score goes with it ", HellaSwag 28.5 % (27.0 % to 30.0 %)"."""
    text = "{loss:.3f} ({low:.3f} to {high:.3f})".format(**expected)
    scores = [expected[key] for key in ("hellaswag", "hellaswag_low", "hellaswag_high") if key in expected]
    return text + (", HellaSwag {} ({} to {})".format(*(percent(s, digits=1) for s in scores)) if scores else "")


def duration(seconds: float) -> str:
    """42 -> "42 s", 500 -> "8 min 20 s", 11100 -> "3 h 05 min", 187200 -> "2 d 4 h"."""
    s = max(0, round(seconds))
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 2 * 86400:
        return f"{s // 3600} h {s % 3600 // 60:02d} min"
    return f"{s // 86400} d {s % 86400 // 3600} h"


def shape(model: Mapping[str, Any], n_params: Any) -> str:
    """ "16.1M parameters, 4 layers, 4 heads, 256 wide, 1,024 tokens of context"; what is no number is left out."""
    named = (("n_layer", "layers"), ("n_head", "heads"), ("n_embd", "wide"), ("block_size", "tokens of context"))
    parts = [f"{human(n_params)} parameters"] if isinstance(n_params, int | float) else []
    return ", ".join(parts + [f"{model[key]:,} {word}" for key, word in named if isinstance(model.get(key), int)])
