"""Folders of Hugging Face GPT-2 models, read and refused."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from aymen_gpt.model.gpt import GPT, GPTConfig
from aymen_gpt.model.huggingface import (
    config_from_huggingface,
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


def test_an_untied_output_layer_is_refused():
    tensors = to_huggingface(GPT(CONFIG).state_dict(), 200) | {"lm_head.weight": torch.zeros(200, 32)}
    with pytest.raises(ValueError, match="tied"):
        from_huggingface(tensors, CONFIG)


@pytest.mark.parametrize(
    "change",
    [{"model_type": "llama"}, {"activation_function": "relu"}, {"n_inner": 100}, {"layer_norm_epsilon": 1e-6},
     {"tie_word_embeddings": False}, {"scale_attn_by_inverse_layer_idx": True}],
)  # fmt: skip
def test_a_model_of_another_shape_is_refused_by_the_entry_that_differs(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        config_from_huggingface(config_to_huggingface(CONFIG) | change)


def test_weights_that_do_not_fit_are_named(folder):
    tensors = to_huggingface(GPT(CONFIG).state_dict(), 200)
    del tensors["transformer.ln_f.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing ln_f.bias"):
        load_pretrained(folder)


@pytest.mark.fault(53)
def test_an_index_may_not_lead_outside_the_folder(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"transformer.wte.weight": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="of the same folder"):
        load_pretrained(folder)
