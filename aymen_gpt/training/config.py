"""Everything that defines a run, in one frozen dataclass; the flags of pretrain.py are made from its fields."""

import json
import os
import shlex
import tomllib
from collections.abc import Iterable
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from aymen_gpt.errors import DataError, UsageError, nearest

if TYPE_CHECKING:  # importing torch takes seconds that --help should not
    from aymen_gpt.model.gpt import GPTConfig

WARMUP_TOKENS = 375_000_000  # of the published run: 715 steps of 2**19 tokens
# arXiv:2305.16264: four epochs are nearly as good as new text, forty are worth little.
FEW_EPOCHS, MANY_EPOCHS = 4, 50
LONGEST_NAME = 255  # bytes between two slashes of a path, on all common disks


@dataclass(frozen=True)
class Range:
    """Which numbers an option may have: ``low`` to ``high``, but not those in ``without``. NaN is in none.

    >>> print(Range(1, 1000), "/", Range(0, 1, without=(0,)), "/", Range(0, 1, without=(1,)))
    from 1 to 1,000 / above 0 and up to 1 / from 0 to below 1
    """

    low: float
    high: float
    without: tuple[float, ...] = ()

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and value not in self.without

    def __str__(self) -> str:
        if self.low in self.without:
            return f"above {self.low:,} and up to {self.high:,}"
        return f"from {self.low:,} to {'below ' if self.high in self.without else ''}{self.high:,}"


OVERRIDABLE = ("seed", "data", "tokens_per_step")  # of what makes a run, with --override-resume
OPTIMIZERS, SCHEDULES, RESIDUALS = ("adamw", "muon"), ("cosine", "linear"), ("float32", "bfloat16")
RECOMPUTE = "none", "attention", "block"
TRACKERS = ("tensorboard", "wandb", "trackio")
COUNT, WHOLE, CLIP = Range(1, 10**9), Range(0, 10**9), Range(0, 10**9, without=(0,))
SEEDS = Range(0, 2**63 - 1)
RATE, DECAY = Range(0, 100, without=(0,)), Range(0, 1, without=(1,))


def _gpt3(rate: float, tokens: int) -> dict[str, Any]:
    """A row of GPT-3's Table 2.1 (arXiv:2005.14165); every size was trained on 300B tokens."""
    return {"learning_rate": rate, "tokens_per_step": tokens, "steps": 300_000_000_000 // tokens}


# What each preset changes of TrainConfig's defaults; its shape stands in model/gpt.py. OpenAI never published
# GPT-2's own rates: its larger sizes take those of the GPT-3 model of the same size.
RECIPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-medium": {"learning_rate": 3e-4},
    "gpt2-large": {"learning_rate": 2.5e-4},
    "gpt2-xl": {"learning_rate": 2e-4, "tokens_per_step": 2**20, "steps": 76_292 // 2},
    "gpt3-small": _gpt3(6e-4, 2**19),
    "gpt3-medium": _gpt3(3e-4, 2**19),
    "gpt3-large": _gpt3(2.5e-4, 2**19),
    "gpt3-xl": _gpt3(2e-4, 2**20),
    "gpt3-2.7b": _gpt3(1.6e-4, 2**20),
    "gpt3-6.7b": _gpt3(1.2e-4, 2**21),
    "gpt3-13b": _gpt3(1e-4, 2**21),
    "gpt3-175b": _gpt3(0.6e-4, 3 * 2**20),
    "demo": {
        "data": "data/builtin",
        "steps": 1000,
        "tokens_per_step": 1024,
        "learning_rate": 3e-3,
        "val_every": 200,
        "val_tokens": 2**15,
        "hellaswag_every": 500,
        "hellaswag_limit": 250,
        "checkpoint_every": 100,
        "keep_also": "30,100,300",
    },
    "tiny": {
        "data": "data/builtin",
        "steps": 20,
        "tokens_per_step": 512,
        "learning_rate": 3e-3,
        "val_every": 10,
        "val_tokens": 2**10,
        "hellaswag_every": None,
        "checkpoint_every": 10,
    },
}


# What --optimizer muon changes of any preset. The rates suit a small model: benchmarks/recipe.py tunes them.
MUON: dict[str, Any] = {"learning_rate": 3e-3, "weight_decay": 0.025, "schedule": "linear", "min_lr_ratio": 0.0}


def option(
    help: str,
    group: str,
    default: Any,
    range: Range | None = None,
    unset: str = "",
    *,
    choices: Iterable[str] = (),
) -> Any:
    """A dataclass field that is also a flag; ``unset`` is the word for None, beside 0."""
    known = {"help": help, "group": group, "range": range, "unset": unset, "choices": tuple(choices)}
    return field(default=default, metadata=known)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. The defaults are the published one: GPT-2 124M, 40B tokens of FineWeb-Edu in four epochs.

    None stands for what is not wanted, or is for the program to choose. UsageError for a value out of its range.
    """

    preset: str = option("model size and the recipe that goes with it", "run", "gpt2", choices=RECIPES)
    run: str = option("folder of the run, made or continued [runs/PRESET]", "run", "runs/gpt2")
    data: str = option("folder of token shards, made by fineweb.py", "run", "edu_fineweb10B")
    seed: int = option("of the initial weights, the data order and the samples", "run", 1337, SEEDS)
    init_from: str | None = option("weights to start from: gpt2, a run, a checkpoint, a .pt file", "run", None)

    n_layer: int = option("layers [the preset's, as are the next three]", "model", MISSING, Range(1, 1000))
    n_head: int = option("attention heads of a layer", "model", MISSING, Range(1, 1000))
    n_embd: int = option("columns of the embedding, the model's width", "model", MISSING, Range(1, 2**17))
    block_size: int = option("tokens of one row, the model's context", "model", MISSING, Range(1, 2**20))

    steps: int = option("updates; 76,292 x 524,288 tokens = 40B = 4 epochs of 10B", "recipe", 76_292, COUNT)
    tokens_per_step: int = option("tokens of one update, over all devices", "recipe", 2**19, COUNT)
    optimizer: str = option("adamw, or muon with its own defaults", "recipe", "adamw", choices=OPTIMIZERS)
    learning_rate: float = option("peak of AdamW's rate", "recipe", 6e-4, RATE)
    matrix_rate: float = option("peak of Muon's, for the matrices of the blocks", "recipe", 0.02, RATE)
    schedule: str = option("cosine, or linear over the last 60%%", "recipe", "cosine", choices=SCHEDULES)
    min_lr_ratio: float = option("the schedule ends at this share of the peak", "recipe", 0.1, Range(0, 1))
    warmup_steps: int = option("375M tokens, at most 5%% of the steps (muon: 2%%)", "recipe", 715, WHOLE)
    weight_decay: float = option("of matrices and embeddings", "recipe", 0.1, Range(0, 100))
    beta1: float = option("AdamW's decay of the mean gradient", "recipe", 0.9, DECAY)
    beta2: float = option("AdamW's decay of the mean square", "recipe", 0.95, DECAY)
    grad_clip: float | None = option("largest norm of the gradient; 0: any", "recipe", 1.0, CLIP, "off")

    device: str = option("auto, cpu, mps, cuda or cuda:N", "machine", "auto")
    dtype: str = option("of matrix products: auto, float32, bfloat16 or float16", "machine", "auto")
    micro_batch: int | None = option("rows per pass; auto: the most that fit", "machine", None, COUNT, "auto")
    shard: str = option("ranks that share a copy of the model: auto, N, node or all", "machine", "auto")
    recompute: str = option(
        "in backward, to keep less for it: attention or block", "machine", "none", choices=RECOMPUTE
    )
    residual: str = option(
        "of the sums between blocks: float32 or bfloat16", "machine", "float32", choices=RESIDUALS
    )
    compile: bool | None = option("torch.compile the model [only on CUDA]", "machine", None)
    deterministic: bool = option("the same bits on every run of a GPU too, slower", "machine", False)
    timeout: float = option("seconds that ranks wait for one another", "machine", 600.0, Range(1e-3, 10**7))

    max_skips: int = option("steps in a row that may be skipped before the end", "safety", 5, WHOLE)
    skip_spikes: bool = option("skip steps 6 sigma above the last 128 in loss or norm", "safety", False)

    val_every: int | None = option("steps between validations; 0: only at the end", "watching", 250, COUNT, "end")
    val_tokens: int = option("tokens of one validation", "watching", 20 * 2**19, Range(1, 10**12))
    hellaswag_every: int | None = option("steps between scores; 0: never", "watching", 1000, COUNT, "never")
    hellaswag_limit: int | None = option("examples of a score; 0: all 10,042", "watching", None, COUNT, "all")
    checkpoint_every: int = option("steps between checkpoints; the last step has one", "watching", 1000, COUNT)
    keep_last: int = option("newest checkpoints that are kept", "watching", 3, Range(2, 10**9))
    keep_every: int | None = option(
        "steps between checkpoints that are kept for good; 0: none", "watching", None, COUNT, "none"
    )
    keep_also: str | None = option(
        "write and keep checkpoints of these steps too, as 20,100,500, for play", "watching", None
    )
    forecast: bool = option("at validations, forecast the loss of the last step", "watching", False)
    track: str | None = option(
        "also send the numbers to tensorboard, wandb or trackio", "watching", None, choices=TRACKERS
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            check(f, getattr(self, f.name))
        self.kept_steps  # noqa: B018  # or its UsageError
        for name, divisor in (("tokens_per_step", "block_size"), ("n_embd", "n_head")):
            value, unit = getattr(self, name), getattr(self, divisor)
            if value % unit:
                raise UsageError(
                    f"{flag(name)} {value} is not a multiple of {flag(divisor)} {unit}: "
                    f"try {max(value // unit, 1) * unit}"
                )

    @property
    def model(self) -> "GPTConfig":
        """The shape of this run's GPT."""
        from aymen_gpt.model.gpt import GPTConfig

        return GPTConfig(block_size=self.block_size, n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd)

    @property
    def kept_steps(self) -> frozenset[int]:
        """The steps of --keep-also. UsageError when they are no whole numbers with commas between them."""
        words = self.keep_also.split(",") if self.keep_also else []
        if not all(word.strip().isdecimal() for word in words):
            raise UsageError(
                f"--keep-also {self.keep_also}: expected steps with commas between them, as 20,100,500"
            )
        return frozenset(map(int, words))

    def is_milestone(self, step: int) -> bool:
        """Whether the checkpoint of a step is kept for good."""
        return step in self.kept_steps or bool(self.keep_every and step % self.keep_every == 0)

    @property
    def rows_per_step(self) -> int:
        return self.tokens_per_step // self.block_size

    def require_rows(self, world_size: int) -> None:
        """UsageError when a step has fewer rows than there are processes to share them."""
        if self.rows_per_step < world_size:
            raise UsageError(
                f"{world_size} processes for {self.rows_per_step} rows a step: use fewer, or raise "
                f"--tokens-per-step to at least {world_size * self.block_size}"
            )

    def largest_micro_batch(self, *, on_cuda: bool) -> int:
        """Rows of one forward pass where a rank has as many and they fit in memory."""
        return self.micro_batch or (64 if on_cuda else 16)


def kind(f: Field[Any]) -> type:
    """The type of an option's value, when it is not None."""
    return next(t for t in get_args(f.type) or (f.type,) if t is not type(None))


def check(f: Field[Any], value: Any) -> None:
    """UsageError, naming the option and what it may be, for a value that is of another type or out of range."""
    if value is None and type(None) in get_args(f.type):
        return
    wanted, range, choices = kind(f), f.metadata["range"], f.metadata["choices"]
    if choices:
        right, words = value in choices, ", ".join(choices) + nearest(str(value), choices)
    elif wanted is bool:
        right, words = isinstance(value, bool), "true or false"
    elif wanted is str:
        right, words = isinstance(value, str) and is_name(value), f"a name of 1 to {LONGEST_NAME} bytes"
    else:
        right = isinstance(value, int if wanted is int else int | float) and not isinstance(value, bool)
        right, words = right and value in range, f"a {'whole ' if wanted is int else ''}number {range}"
    if not right:
        raise UsageError(f"{flag(f.name)} {(value if choices else repr(value))!s:.60}: expected {words}")


def is_name(text: str) -> bool:
    """Whether a text can name a file, or something on the Hub."""
    try:
        path = os.fsencode(text)
    except UnicodeEncodeError:  # half of a letter, from JSON
        return False
    fits = len(path) <= 4 * LONGEST_NAME and all(len(part) <= LONGEST_NAME for part in path.split(b"/"))
    return fits and path.strip() != b"" and b"\0" not in path


def flag(name: str) -> str:
    """The command-line spelling of a field: val_every -> --val-every, and run -> --run-dir.

    On Python 3.11 to 3.13 torchrun takes --run for an abbreviation of options of its own.
    """
    return "--" + {"run": "run-dir"}.get(name, name.replace("_", "-"))


def resolve(given: dict[str, Any]) -> TrainConfig:
    """The run that a preset and the explicitly given options describe; UsageError for one that makes no sense."""
    from aymen_gpt.model.gpt import PRESETS

    preset = given.get("preset", TrainConfig.preset)
    check(fields(TrainConfig)[0], preset)
    shape = {name: size for name, size in asdict(PRESETS[preset]).items() if name != "vocab_size"}
    muon = MUON if given.get("optimizer") == "muon" else {}
    chosen = {"run": f"runs/{preset}"} | shape | RECIPES[preset] | muon | given
    for f in fields(TrainConfig):
        value = chosen.get(f.name)
        if f.metadata["unset"] and value in (0, f.metadata["unset"]):
            chosen[f.name] = None
        elif kind(f) is int and isinstance(value, float) and value.is_integer():  # 1e8 in a TOML file
            chosen[f.name] = int(value)
    config = TrainConfig(**chosen)
    if "warmup_steps" in chosen:
        return config
    longest = config.steps // (50 if muon else 20)
    return replace(config, warmup_steps=min(WARMUP_TOKENS // config.tokens_per_step, longest))


def read_options(path: Path) -> dict[str, Any]:
    """The options that a TOML file gives by their names, or those of a run, from its config.json.

    DataError for a file that cannot be read, UsageError for a name that is no option.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise DataError(f"--config {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"--config {path} is no {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"--config {path}: expected options by their names")
    if isinstance(found.get("run"), dict):  # a run's; until November 2026 "" stood for None there
        found = {name: value for name, value in found["run"].items() if value != ""}
    found = {name.replace("-", "_"): value for name, value in found.items()}
    known = [f.name for f in fields(TrainConfig)]
    for name in found.keys() - set(known):
        raise UsageError(f"--config {path}: there is no option {name}{nearest(name, known)}")
    return found


def fitting(tokens: int, data: str) -> str:
    """The command of a run that suits ``data`` of so many training tokens, and reads them a few times."""
    preset = "gpt2" if tokens >= 10**9 else "demo"
    recipe = {name: getattr(TrainConfig, name) for name in ("steps", "tokens_per_step", "data")} | RECIPES[preset]
    steps = int(float(f"{max(FEW_EPOCHS * tokens // recipe['tokens_per_step'], 20):.2g}"))
    words = [] if preset == TrainConfig.preset else ["--preset", preset]
    words += [] if data == recipe["data"] else ["--data", data]
    words += [] if steps > 0.9 * recipe["steps"] else ["--steps", str(steps)]
    return shlex.join(["python", "pretrain.py", *words])


def doubts(c: TrainConfig, tokens: int | None) -> list[str]:
    """Warnings about a run on so many training tokens (None: not known): what its user can hardly have meant."""
    found = []
    if c.warmup_steps > c.steps:
        found.append(
            f"warning: --warmup-steps {c.warmup_steps:,} is more than --steps {c.steps:,}: the rate ends at "
            f"{c.learning_rate * c.steps / c.warmup_steps:.2g} and never reaches its peak, {c.learning_rate:g}"
        )
    if c.optimizer == "adamw" and c.matrix_rate != TrainConfig.matrix_rate:
        found.append(f"warning: --matrix-rate {c.matrix_rate:g} changes nothing without --optimizer muon")
    epochs = c.steps * c.tokens_per_step / tokens if tokens else 0
    if tokens and epochs > MANY_EPOCHS:
        found.append(
            f"warning: this run reads the {tokens:,} tokens of {c.data} {epochs:,.0f} times, but learns little "
            f"after the first {FEW_EPOCHS}; a run that suits them: {fitting(tokens, c.data)}"
        )
    return found
