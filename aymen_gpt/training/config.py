"""Everything that defines a run, in one frozen dataclass; the flags of pretrain.py are made from its fields."""

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from aymen_gpt.errors import UsageError

if TYPE_CHECKING:  # importing torch takes seconds that --help should not
    from aymen_gpt.model.gpt import GPTConfig

WARMUP_TOKENS = 375_000_000  # of the published run: 715 steps of 2**19 tokens


def option(default: Any, help: str, group: str) -> Any:
    """A dataclass field that is also a flag; ``help`` is its text in --help, %s stands for the default."""
    return field(default=default, metadata={"help": help, "group": group})


@dataclass(frozen=True)
class TrainConfig:
    """One run. The defaults are the published one: GPT-2 124M, 40B tokens of FineWeb-Edu in four epochs."""

    preset: str = option("gpt2", "model size and the recipe that goes with it", "run")
    run: str = option("", "folder of the run, made or continued [runs/PRESET]", "run")
    data: str = option("edu_fineweb10B", "folder of token shards, made by fineweb.py", "run")
    seed: int = option(1337, "of the initial weights, the data order and the samples", "run")
    init_from: str = option("", "start from this model's weights: gpt2, a run, a checkpoint, a .pt file", "run")

    steps: int = option(76_292, "updates in all: 76,292 x 524,288 tokens = 40B = 4 epochs of 10B", "recipe")
    tokens_per_step: int = option(2**19, "tokens of one update, over all devices", "recipe")
    block_size: int = option(1024, "tokens of one row, the model's context", "recipe")
    learning_rate: float = option(6e-4, "peak of the cosine schedule", "recipe")
    min_lr_ratio: float = option(0.1, "the schedule ends at this share of the peak", "recipe")
    warmup_steps: int = option(715, "linear warmup; 375M tokens, at most 5%% of the steps", "recipe")
    weight_decay: float = option(0.1, "of matrices and embeddings", "recipe")
    beta1: float = option(0.9, "AdamW's decay of the mean gradient", "recipe")
    beta2: float = option(0.95, "AdamW's decay of the mean square", "recipe")
    grad_clip: float = option(1.0, "largest L2 norm of the gradient", "recipe")

    device: str = option("auto", "auto, cpu, mps, cuda or cuda:N", "machine")
    dtype: str = option("auto", "of matrix products: auto, float32, bfloat16 or float16", "machine")
    micro_batch: int = option(
        0, "rows per forward pass, or auto: the most that fit of 64 (16 on a CPU), 32, 16, ...", "machine"
    )
    compile: bool | None = option(None, "torch.compile the model [only on CUDA]", "machine")
    deterministic: bool = option(False, "the same bits on every run of a GPU too, at some speed", "machine")
    timeout: float = option(600.0, "seconds that ranks wait for one another before they give up", "machine")

    max_skips: int = option(
        5, "steps skipped in a row, for a loss or gradient not finite, before the end", "safety"
    )
    skip_spikes: bool = option(
        False, "skip steps whose loss or gradient norm is 6 sigma above the last 128", "safety"
    )

    val_every: int = option(250, "steps between validations (and samples); 0: only at the end", "watching")
    val_tokens: int = option(20 * 2**19, "tokens of one validation", "watching")
    hellaswag_every: int = option(1000, "steps between HellaSwag scores; 0: never", "watching")
    hellaswag_limit: int = option(0, "examples of one score, evenly spaced; 0: all 10,042", "watching")
    checkpoint_every: int = option(1000, "steps between checkpoints; the last step always has one", "watching")
    keep_last: int = option(3, "checkpoints kept, the oldest is deleted first; 2 or more", "watching")
    keep_every: int = option(
        0, "keep the checkpoints of these steps for good (every 10,000th, say); 0: none", "watching"
    )
    track: str = option("", "also send the numbers to tensorboard, wandb or trackio", "watching")

    def __post_init__(self) -> None:
        positive = "steps tokens_per_step block_size learning_rate grad_clip val_tokens checkpoint_every timeout"
        for name in positive.split():
            if not getattr(self, name) > 0:
                raise UsageError(f"{flag(name)} must be above 0, got {getattr(self, name)}")
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, int | float) and value < 0:
                raise UsageError(f"{flag(f.name)} must not be negative, got {value}")
        if self.keep_last < 2:
            raise UsageError(
                f"--keep-last {self.keep_last}: 2 or more, so that a damaged checkpoint is never the only one"
            )
        if self.tokens_per_step % self.block_size:
            raise UsageError(
                f"--tokens-per-step {self.tokens_per_step} is not a multiple of --block-size {self.block_size}: "
                f"try {max(self.tokens_per_step // self.block_size, 1) * self.block_size}"
            )

    @property
    def model(self) -> "GPTConfig":
        """The preset's shape at this run's context length."""
        from aymen_gpt.model.gpt import PRESETS

        return replace(PRESETS[self.preset], block_size=self.block_size)

    @property
    def rows_per_step(self) -> int:
        return self.tokens_per_step // self.block_size

    def largest_micro_batch(self, *, on_cuda: bool) -> int:
        """Rows of one forward pass where a rank has as many and they fit in memory."""
        return self.micro_batch or (64 if on_cuda else 16)


def flag(name: str) -> str:
    """The command-line spelling of a field: val_every -> --val-every."""
    return "--" + name.replace("_", "-")


def _gpt3(learning_rate: float, tokens_per_step: int) -> dict[str, Any]:
    """A row of GPT-3's Table 2.1 (arXiv:2005.14165); every size was trained on 300B tokens."""
    return {
        "learning_rate": learning_rate,
        "tokens_per_step": tokens_per_step,
        "block_size": 2048,
        "steps": 300_000_000_000 // tokens_per_step,
    }


# What each preset changes of TrainConfig's defaults. OpenAI never published GPT-2's own rates: its larger sizes
# take those of the GPT-3 model of the same size.
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
        "block_size": 256,
        "steps": 1000,
        "tokens_per_step": 1024,
        "learning_rate": 3e-3,
        "val_every": 200,
        "val_tokens": 2**15,
        "hellaswag_every": 500,
        "hellaswag_limit": 250,
        "checkpoint_every": 100,
    },
    "tiny": {
        "data": "data/builtin",
        "block_size": 64,
        "steps": 20,
        "tokens_per_step": 512,
        "learning_rate": 3e-3,
        "val_every": 10,
        "val_tokens": 2**10,
        "hellaswag_every": 0,
        "checkpoint_every": 10,
    },
}


def resolve(given: dict[str, Any]) -> TrainConfig:
    """The run that a preset and the explicitly given options describe; UsageError for one that makes no sense."""
    preset = given.get("preset", "gpt2")
    if preset not in RECIPES:
        raise UsageError(f"--preset {preset}: expected one of {', '.join(RECIPES)}")
    chosen = {"run": f"runs/{preset}"} | RECIPES[preset] | given
    if "warmup_steps" not in chosen:
        steps = chosen.get("steps", TrainConfig.steps)
        tokens = chosen.get("tokens_per_step", TrainConfig.tokens_per_step)
        chosen["warmup_steps"] = min(WARMUP_TOKENS // max(tokens, 1), steps // 20)
    return TrainConfig(**chosen)
