"""Folders of Hugging Face GPT-2 models, read and refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from aymen_gpt.model.gpt import GPT, GPTConfig
from aymen_gpt.model.huggingface import (
    config_to_huggingface,
    from_huggingface,
    load_pretrained,
    to_huggingface,
)

CONFIG = GPTConfig(block_size=24, vocab_size=200, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture
def folder(tmp_path):
    """A folder as transformers itself writes it."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**config_to_huggingface(CONFIG))).save_pretrained(tmp_path)
    return tmp_path


def same_logits(folder):
    idx = torch.arange(20)[None] * 7 % 200
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder)(idx).logits
        return torch.allclose(load_pretrained(folder)(idx), theirs, atol=1e-5)


def test_a_folder_written_by_transformers_is_read(folder):
    assert load_pretrained(folder).config == CONFIG
    assert same_logits(folder)


def test_a_folder_in_several_files_is_read(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    assert same_logits(folder)


def test_the_names_of_the_first_release_are_read():
    """openai-community/gpt2 has no prefix, and the causal mask among its tensors."""
    model = GPT(CONFIG, torch.Generator().manual_seed(0))
    old = {n.removeprefix("transformer."): t for n, t in to_huggingface(model.state_dict(), 200).items()}
    old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24) for i in range(2)}
    found = from_huggingface(old, CONFIG)
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in found.items())
