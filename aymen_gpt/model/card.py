"""The README.md of a checkpoint folder: a model card as the Hugging Face Hub reads it. Plain values in, text out.

card.md.j2 has the words. Above them stands YAML metadata, with a model-index when the checkpoint was scored
(https://huggingface.co/docs/hub/model-cards). What comes from a run stays text: huggingface_hub quotes it as YAML,
Jinja2 escapes HTML, and ``plain`` and ``block`` escape Markdown.
"""

import math
import re
import shlex
from pathlib import Path
from typing import Any

from aymen_gpt.wording import HELLASWAG_EXAMPLES, PROTOCOLS, percent

# Licences of text that we know; of everything else the card says that it does not know.
LICENCES = {"HuggingFaceFW/fineweb-edu": "ODC-By 1.0, and Common Crawl's terms of use"}

Values = dict[str, Any]


def card(step: int, shape: Values, metrics: Values, run: Values, scores: Values) -> str:
    """The card of a checkpoint from its step, GPTConfig as a dict, that step's metrics and the run's config.json.

    ``scores`` are this step's of HellaSwag, by protocol: {"harness": {"n": 250, "acc": 0.3, "acc_stderr": ...}}.
    Any of it may be empty, and any key absent or of another type: what is not known is left out. The text holds no
    time and no host, so the same run gives the same bytes.
    """
    from jinja2 import ChainableUndefined, Environment, FileSystemLoader
    from markupsafe import Markup

    options, data, versions = (run.get(key) or {} for key in ("run", "data", "versions"))
    name, source = Path(options.get("run") or "run").name, data.get("source") or {}
    scores = {protocol: scores[protocol] for protocol in PROTOCOLS if protocol in scores}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=ChainableUndefined,  # what is not known is empty
        finalize=plain,
        trim_blocks=True,
    )
    environment.filters |= {"plain": plain, "percent": percent}
    page = environment.get_template("card.md.j2").render(
        name=name,
        metadata=Markup(metadata(name, step, source.get("repo"), scores).strip()),
        step=step,
        shape=shape,
        metrics=metrics,
        run=run,
        source=source,
        scores=scores,
        all_examples=HELLASWAG_EXAMPLES,
        licence=LICENCES.get(source.get("repo") or ""),
        versions=", ".join(f"{k} {v}" for k, v in versions.items()),
        command=block(shlex.join(map(str, run.get("command") or ["python", "pretrain.py"]))),
    )
    return page.lstrip() + "\n"


def for_hub(text: str, repo: str, *, training: bool) -> str:
    """A card as the Hub shows it: OWNER/NAME in its commands, and loss.png unless a person has put it elsewhere.

    Without ``training`` it says that the files which continue the run are not there.
    """
    text = text.replace('from_pretrained(".")', f'from_pretrained("{repo}")').replace("-m .`", f"-m {repo}`")
    if not training:
        gone = ", which continue the run, were not uploaded;"
        text = text.replace(" beside this file continue the run;", gone)
    if "loss.png" in text:
        return text
    curve = "![Loss of training and validation in nats per token](loss.png)\n\n[All curves](report.html).\n\n"
    before, heading, after = text.partition("## HellaSwag\n")
    return f"{before}## Loss\n\n{curve}{heading}{after}" if heading else f"{text}\n## Loss\n\n{curve}"


def metadata(name: str, step: int, repo: Any, scores: Values) -> str:
    """The YAML of a card."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="Rowan/hellaswag",
            dataset_name=f"HellaSwag, {protocol} protocol",
            dataset_split="validation",
            metric_type=metric,
            metric_value=score[metric],
            metric_name=f"{metric}, step {step}, {score.get('n')} examples",
        )
        for protocol, score in scores.items()
        for metric in ("acc", "acc_norm")
        if score.get(metric) is not None
    ]
    found = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "aymen-gpt"],
        datasets=[repo] if repo else None,
        model_name=name,
        eval_results=results or None,
    )
    return found.to_yaml()


def plain(value: Any, form: str = ",") -> str:
    r"""A number, or a text as one line no letter of which is Markdown (HTML is escaped after this); else nothing.

    >>> print(plain(1024), plain(3.14159, ".2f"), plain("a *b*\n[c](d)"), [plain(float("nan")), plain([1])])
    1,024 3.14 a \*b\* \[c\](d) ['', '']
    """
    if hasattr(value, "__html__"):  # Markup of ours
        return value
    if isinstance(value, str):
        return re.sub(r"([\\`*_\[\]|~$]|:(?=//))", r"\\\1", " ".join(value.split()))
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return format(value, form) if known else ""


def block(code: str) -> Any:
    """A Markdown block of code, with more backticks around it than are in it anywhere."""
    from markupsafe import Markup

    fence = "`" * max([3, *(1 + len(run) for run in re.findall("`+", code))])
    return Markup(f"{fence}bash\n{code}\n{fence}")
