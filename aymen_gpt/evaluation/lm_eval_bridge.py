"""Our models in EleutherAI's lm-evaluation-harness, with all its tasks (pip install 'aymen-gpt[lm-eval]').

    import lm_eval
    from aymen_gpt.evaluation.lm_eval_bridge import AymenLM

    found = lm_eval.simple_evaluate(model=AymenLM("runs/gpt2"), tasks=["lambada_openai", "arc_easy", "hellaswag"])

Likelihoods are computed as HellaSwag's are (scoring.py): requests with the same context, such as the choices of
one question, share its tokens. Texts are generated with the key/value cache, one at a time. The harness's data
comes from the Hub; HellaSwag's, which we have, without it:

    tasks = offline_hellaswag(Path("tasks"))
    found = lm_eval.simple_evaluate(model=AymenLM("runs/gpt2"), tasks=["offline_hellaswag"], task_manager=tasks)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from aymen_gpt.data import tokenizer
from aymen_gpt.errors import UsageError
from aymen_gpt.evaluation.hellaswag_data import Example, json_lines, load_examples
from aymen_gpt.evaluation.load_model import load_model
from aymen_gpt.evaluation.scoring import score
from aymen_gpt.files import replace_text, write_whole
from aymen_gpt.model.generation import generate
from aymen_gpt.model.gpt import GPT

try:
    from lm_eval.api.model import TemplateLM
except ImportError:  # it is an extra
    TemplateLM = object


class AymenLM(TemplateLM):
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
        scoring.score.
        """
        if TemplateLM is object:
            raise UsageError("lm-eval is not installed: pip install 'aymen-gpt[lm-eval]'")
        super().__init__()
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self._device) if isinstance(model, GPT) else load_model(model, self._device)[0]
        self.dtype, self.batch_tokens = dtype, batch_tokens

    @property
    def eot_token_id(self) -> int:
        return tokenizer.EOT

    @property
    def max_length(self) -> int:
        return self.model.config.block_size

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        return tokenizer.gpt2().encode_ordinary(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_options: Any
    ) -> list[tuple[float, bool]]:
        """Of (texts, context, continuation), the latter as tokens: log-likelihood, and whether it is greedy."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm) as bar:
            options: dict[str, Any] = {"dtype": self.dtype, "batch_tokens": self.batch_tokens}
            scores = score(self.model, pairs, greedy=True, progress=bar.update, **options)
        answers = [(s.log_likelihood, s.greedy) for s in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, after <|endoftext|>; those longer than the context in windows that the harness cuts."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        likely = [log_likelihood for log_likelihood, _ in self._loglikelihood_tokens(windows, disable_tqdm)]
        totals = np.bincount(owners, likely, minlength=len(requests)).tolist()
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that go on after others, up to the first of the strings that the task stops at.

        Greedy unless the task samples; a context loses its beginning where the model has no room for it.
        """
        from lm_eval.models.utils import normalize_gen_kwargs

        texts = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm):
            context, how = request.args[0], normalize_gen_kwargs(request.args[1])
            longest, sampling = how["max_gen_toks"], {k: how.get(k) for k in ("temperature", "top_k", "top_p")}
            tokens = (self.tok_encode(context) or [self.eot_token_id])[-max(1, self.max_length - longest) :]
            made, text, ends = [], "", []
            for token in generate(self.model, tokens, longest, stop=self.eot_token_id, **sampling):
                made.append(token)
                text = tokenizer.gpt2().decode(made)
                ends = [text.index(stop) for stop in how["until"] if stop and stop in text]
                if ends:
                    break
            texts.append(text[: min(ends)] if ends else text)
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts


def offline_hellaswag(folder: Path, examples: Sequence[Example] | None = None) -> Any:
    """A TaskManager with the harness's own hellaswag task as ``offline_hellaswag``, its data from our cache.

    ``folder`` gets the files that this takes; ``examples`` are others than the validation set.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    task = Path(lm_eval.__file__).parent / "tasks/hellaswag/hellaswag.yaml"
    data = folder.absolute() / "hellaswag.jsonl"
    write_whole(data, json_lines(load_examples() if examples is None else examples))
    replace_text(
        folder / "offline_hellaswag.yaml",
        f"include: {task}\ntask: offline_hellaswag\ndataset_path: json\ntraining_split: null\n"
        f"dataset_kwargs:\n  cache_dir: {data.parent / 'cache'}\n  data_files:\n    validation: {data}\n",
    )
    return TaskManager(include_path=str(folder), include_defaults=False)
