"""Our models in EleutherAI's lm-evaluation-harness, with all its tasks (pip install 'aymen-gpt[lm-eval]').

    import lm_eval
    from aymen_gpt.evaluation.harness import AymenLM

    found = lm_eval.simple_evaluate(model=AymenLM("runs/gpt2"), tasks=["lambada_openai", "arc_easy", "hellaswag"])

Likelihoods are computed as HellaSwag's are (packing.py): requests that begin alike, such as the choices of one
question or prompts with the same examples in front, share the tokens of their beginning. Texts are generated with
the key/value cache, one at a time. The harness's data comes from the Hub; HellaSwag's, which we have, without it:

    tasks = offline_hellaswag(Path("tasks"))
    found = lm_eval.simple_evaluate(model=AymenLM("runs/gpt2"), tasks=["offline_hellaswag"], task_manager=tasks)
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from aymen_gpt.data import tokenizer
from aymen_gpt.errors import DataError, UsageError
from aymen_gpt.evaluation.examples import Example, load_examples, parquet
from aymen_gpt.evaluation.load_model import load_model
from aymen_gpt.evaluation.packing import TokenizedExample
from aymen_gpt.evaluation.scoring import score_batches
from aymen_gpt.files import replace_text, write_whole
from aymen_gpt.model.generation import generate
from aymen_gpt.model.gpt import GPT


def _language_model() -> Any:
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError:
        return object
    return TemplateLM


class AymenLM(_language_model()):  # type: ignore[misc]
    """What the harness asks of a language model, answered by one of ours."""

    def __init__(
        self,
        model: GPT | str,
        *,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_tokens: int | None = None,
    ) -> None:
        """``model`` is a GPT or a name as hellaswag.py -m takes it; ``device`` None is a GPU if there is one.

        ``dtype`` is what likelihoods are computed in, and ``batch_tokens`` how many tokens at a time; see
        scoring.score_batches.
        """
        if type(self).__base__ is object:
            raise UsageError("lm-eval is not installed: pip install 'aymen-gpt[lm-eval]'")
        super().__init__()
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self._device) if isinstance(model, GPT) else load_model(model, self._device)[0]
        self.dtype, self.batch_tokens = dtype, batch_tokens
        if self.model.config.vocab_size < tokenizer.VOCAB_SIZE:
            raise DataError(f"the model knows {self.model.config.vocab_size:,} tokens, GPT-2 has 50,257")

    @property
    def eot_token_id(self) -> int:
        return tokenizer.EOT

    @property
    def tokenizer_name(self) -> str:
        return "gpt2"

    @property
    def max_length(self) -> int:
        return self.model.config.block_size

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        return tokenizer.gpt2().encode_ordinary(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_options: Any
    ) -> list[tuple[float, bool]]:
        """Of (texts, context, continuation), the latter as tokens: log-likelihood, and whether it is greedy."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, _) in enumerate(requests):
            by_context.setdefault(tuple(context), []).append(number)
        groups = list(by_context.values())
        examples = [
            TokenizedExample(list(context), [requests[i][2] for i in group])
            for context, group in by_context.items()
        ]
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm) as bar:
            for found in self._score(examples):
                for e, (log_likelihoods, greedy) in found.items():
                    answers |= zip(groups[e], zip(log_likelihoods, greedy, strict=True), strict=True)
                bar.update(len(answers) - bar.n)
        for number, (texts, _, _) in enumerate(requests):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[number])
        return [answers[i] for i in range(len(requests))]

    def _score(self, examples: list[TokenizedExample]) -> Iterator[dict[int, tuple[list[float], list[bool]]]]:
        options: dict[str, Any] = {"dtype": self.dtype, "batch_tokens": self.batch_tokens}
        for found in score_batches(self.model, examples, vocab_size=tokenizer.VOCAB_SIZE, greedy=True, **options):
            yield {i: (scores.log_likelihoods, scores.greedy or []) for i, scores in found.items()}

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, after <|endoftext|>; those longer than the context in windows that the harness cuts."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, texts = [], []
        for number, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, pairs):
                windows.append((None, context, continuation))
                texts.append(number)
        totals = [0.0] * len(requests)
        for number, (log_likelihood, _) in zip(
            texts, self._loglikelihood_tokens(windows, disable_tqdm), strict=True
        ):
            totals[number] += log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that go on after others, up to the first of the strings that the task stops at."""
        texts = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm):
            texts.append(self._generate(*request.args))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _generate(self, context: str, gen_kwargs: dict[str, Any]) -> str:
        """Greedy unless the task samples; the context loses its beginning where the model has no room for it."""
        from lm_eval.models.utils import normalize_gen_kwargs

        how = normalize_gen_kwargs(gen_kwargs)
        room = max(1, self.max_length - how["max_gen_toks"])
        tokens = (self.tok_encode(context) or [self.eot_token_id])[-room:]
        sampling = {name: how.get(name) for name in ("top_k", "top_p")}
        made: list[int] = []
        text = ""
        for token in generate(
            self.model,
            tokens,
            how["max_gen_toks"],
            temperature=how["temperature"],
            stop=self.eot_token_id,
            **sampling,
        ):
            made.append(token)
            text = tokenizer.gpt2().decode(made)
            ends = [text.index(stop) for stop in how["until"] if stop and stop in text]
            if ends:
                return text[: min(ends)]
        return text


def offline_hellaswag(folder: Path, examples: Sequence[Example] | None = None) -> Any:
    """A TaskManager with the harness's own hellaswag task as ``offline_hellaswag``, its data from our cache.

    ``folder`` gets the files that this takes; ``examples`` are others than the validation set.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    task = Path(lm_eval.__file__).parent / "tasks/hellaswag/hellaswag.yaml"
    data = folder.absolute() / "hellaswag.parquet"
    write_whole(data, parquet(load_examples() if examples is None else examples))
    replace_text(
        folder / "offline_hellaswag.yaml",
        f"include: {task}\ntask: offline_hellaswag\ndataset_path: parquet\ntraining_split: null\n"
        f"dataset_kwargs:\n  cache_dir: {data.parent / 'cache'}\n  data_files:\n    validation: {data}\n",
    )
    return TaskManager(include_path=str(folder), include_defaults=False)
