"""The README.md of a checkpoint folder: a model card as the Hugging Face Hub reads it. Plain values in, text out.

Above, YAML metadata with a model-index when the checkpoint was scored (https://huggingface.co/docs/hub/model-cards);
below, what the model is, what it was trained on, how it scored by which protocol, and how to make it again.
"""

import json
import shlex
from typing import Any

from aymen_gpt.wording import HELLASWAG_EXAMPLES, PROTOCOLS, percent

# Licences of text that we know; of everything else the card says that it does not know.
LICENCES = {"HuggingFaceFW/fineweb-edu": "ODC-By 1.0, and Common Crawl's terms of use"}


Values = dict[str, Any]


def card(step: int, shape: Values, metrics: Values, run: Values, scored: Values) -> str:
    """The card of a checkpoint from its step, GPTConfig as a dict, that step's metrics and the run's config.json.

    ``scored`` is the newest row of metrics.jsonl with a HellaSwag score. It is of an earlier step: a checkpoint is
    saved before it is scored. ``run`` and ``scored`` may be empty, and any key absent: what is not known is
    left out. The text holds no time and no host, so the same run gives the same bytes.
    """
    name = str(_get(run, "run", "run") or "run").rstrip("/").split("/")[-1]
    parts = [
        f"---\n{_metadata(name, run, scored)}---",
        f"# {name}, step {step:,}",
        "A GPT-2-shaped language model trained by Aymen-GPT. It opens in transformers as it stands:",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".")\ntokenizer = AutoTokenizer.from_pretrained(".")\n```',
        _table({**_shape(shape, run), **_progress(step, metrics, run)}),
        "## HellaSwag",
        _score(scored),
        "## Data",
        _data(run),
        "## To make it again",
        _reproduce(run),
        "## Limits",
        "A base model: it continues text, is not tuned to follow instructions or to be harmless, and repeats what "
        "its training text says, true or not. Overlap of that text with HellaSwag was not measured.",
    ]
    return "\n\n".join(parts) + "\n"


def _get(found: Any, *keys: str) -> Any:
    """A nested value, None where any part is absent."""
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _protocols(scored: Values) -> dict[str, Values]:
    """Accuracies by protocol, of a row like {"hellaswag": {"n": 250, "completion": {"acc": ...}}}."""
    found = scored.get("hellaswag") or {}
    return {protocol: found[protocol] for protocol in PROTOCOLS if protocol in found}


def _metadata(name: str, run: Values, scored: Values) -> str:
    """The YAML; what comes from the run is written as JSON, which is YAML too and cannot break out of it."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [gpt2, aymen-gpt]"]
    repo = _get(run, "data", "source", "repo")
    if repo:
        lines.append(f"datasets: [{json.dumps(repo)}]")
    scores, note = _protocols(scored), f"step {scored.get('step')}, n = {_get(scored, 'hellaswag', 'n')}"
    if scores:
        lines += ["model-index:", f"- name: {json.dumps(name)}", "  results:"]
    for protocol, part in scores.items():
        lines += [
            "  - task: {type: text-generation}",
            f"    dataset: {{type: Rowan/hellaswag, name: 'HellaSwag, {protocol} protocol', split: validation}}",
            "    metrics:",
        ]
        for metric in ("acc", "acc_norm"):
            value = json.dumps(part.get(metric))
            lines.append(f"    - {{type: {metric}, name: '{metric} at {note}', value: {value}}}")
    return "\n".join(lines) + "\n"


def _table(values: Values) -> str:
    rows = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in values.items() if value]
    return "\n".join(["| | |", "|---|---|", *rows])


def _shape(shape: Values, run: Values) -> Values:
    n = run.get("n_params")
    return {
        "parameters": f"{n:,}" if n else None,
        "shape": f"{shape['n_layer']} layers, {shape['n_head']} heads, {shape['n_embd']} wide",
        "context": f"{shape['block_size']:,} tokens",
        "vocabulary": f"GPT-2's, {shape['vocab_size']:,} tokens",
    }


def _progress(step: int, metrics: Values, run: Values) -> Values:
    steps, loss, val = _get(run, "run", "steps"), metrics.get("loss"), metrics.get("val_loss")
    return {
        "steps": f"{step:,}" + (f" of {steps:,}" if steps else ""),
        "tokens read": f"{metrics['tokens']:,}" if metrics.get("tokens") else None,
        "training loss": f"{loss:.4f} nats per token, this step" if loss is not None else None,
        "validation loss": f"{val:.4f} nats per token" if val is not None else None,
    }


def _score(scored: Values) -> str:
    scores, n = _protocols(scored), _get(scored, "hellaswag", "n")
    if not scores:
        return "Not scored yet. `python hellaswag.py -m .` scores this checkpoint by both protocols."
    some = f"{n:,} of {HELLASWAG_EXAMPLES:,} validation examples" if n else "validation examples"
    lines = [f"At step {scored.get('step')}, over {some}, ± one standard error:", ""]
    lines += ["| protocol | acc | acc_norm |", "|---|---|---|"]
    for protocol, part in scores.items():
        cells = (percent(part.get(m), part.get(f"{m}_stderr")) for m in ("acc", "acc_norm"))
        lines.append(f"| {protocol} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            "Scores of different protocols do not compare. Chance is 25 %. `python hellaswag.py "
            "-m .` scores this checkpoint by both.",
        ]
    )


def _data(run: Values) -> str:
    repo, revision = _get(run, "data", "source", "repo"), _get(run, "data", "source", "revision")
    train, manifest = _get(run, "data", "train_tokens"), _get(run, "data", "manifest_sha256")
    licence = LICENCES.get(repo or "", "not known to the program that wrote this card")
    source = f"{repo}, revision {revision}" if repo else "local files or the built-in corpus"
    size = f"{train:,} training tokens, " if train else ""
    hashed = f"sha256 of the shards' manifest `{manifest}`" if manifest else "shards without a manifest"
    return f"{source}: {size}{hashed}. Licence of the text: {licence}."


def _reproduce(run: Values) -> str:
    command, commit, ranks = run.get("command"), run.get("git_commit"), run.get("world_size") or 1
    typed = shlex.join(str(word) for word in command) if isinstance(command, list) else "python pretrain.py"
    versions = ", ".join(f"{k} {v}" for k, v in (run.get("versions") or {}).items())
    made = f"Aymen-GPT at commit `{commit}`" if commit else "Aymen-GPT"
    return (
        f"{made}{f' ({versions})' if versions else ''}, on {ranks} process{'es' * (ranks != 1)}, on the data "
        f"above:\n\n```bash\n{typed}\n```\n\n`state.json` and `optimizer.safetensors` beside this file continue "
        "the run; `manifest.json` has the size and sha256 of every file."
    )
