"""A small model and three questions, which the tests of HellaSwag share."""

import json

import torch
from safetensors.torch import save_file

from aymen_gpt.evaluation.hellaswag_data import Example
from aymen_gpt.model.gpt import GPT, GPTConfig
from aymen_gpt.model.huggingface import config_to_huggingface, to_huggingface

CONFIG = GPTConfig(block_size=64, n_layer=1, n_head=2, n_embd=16)

VIDEO = Example(
    ind=24,
    activity_label="Roof work",
    ctx_a="A man is sitting on a roof.",
    ctx_b="he Slowly",
    ctx="A man is sitting on a roof. he Slowly",
    endings=["pulls up tiles.", "wraps  skis.", "sings to a cat [step] twice.", " leaves, naïvely."],
    label=2,
)
HOW_TO = Example(
    ind=7,
    activity_label="Food and Entertaining",
    ctx_a="[header] How to make tea [title] Boil water. [step] Use a kettle.",
    ctx_b="",
    ctx="[header] How to make tea [title] Boil water. [step] Use a kettle.",
    endings=["[substeps] Wait.", "Pour it [title] Drink. [step] Slowly.", "[title] Stop.", "Add  [a]  milk."],
    label=0,
)
ODD = Example(
    ind=8,
    activity_label="Odd [things] here",
    ctx_a="One  two   three [title] [step]",
    ctx_b="ÉCOLE ends [here]",
    ctx="One  two   three [title] [step] ÉCOLE ends [here]",
    endings=["[all of it]", " [title]", "a [title]", "x"],
    label=1,
)
EXAMPLES = [VIDEO, HOW_TO, ODD]


def make_model(config=CONFIG):
    model = GPT(config, torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() == 2 else 1)
    return model


def write_model(folder):
    """The model as Hugging Face keeps one; its folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_huggingface(CONFIG)))
    save_file(to_huggingface(make_model().state_dict(), CONFIG.vocab_size), folder / "model.safetensors")
    return folder
