"""Our GPT <-> a Hugging Face GPT-2 folder: names, layout and configuration, with safetensors alone.

Differences from our own state dict: names begin with ``transformer.``; the matrices of the four projections are
stored (in, out) because OpenAI's Conv1D multiplied from the left; the embedding has no padding rows; the tied
output layer is not stored. Folders from the Hub may lack the prefix (openai-community/gpt2 does) and may carry
the causal mask as ``attn.bias``, which is no parameter.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from aymen_gpt.model.gpt import GPT, GPTConfig

PREFIX = "transformer."
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
EOT = GPTConfig.vocab_size - 1  # <|endoftext|>, GPT-2's only special token


def to_huggingface(tensors: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Tensors by our names -> the same by GPT-2's (also for optimizer moments, which share names and shapes)."""
    out = {}
    for name, t in tensors.items():
        if name == "wte.weight":
            t = t[:vocab_size]
        out[PREFIX + name] = (t.t() if name.endswith(TRANSPOSED) else t).contiguous()
    return out


def from_huggingface(tensors: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Tensors by GPT-2's names, prefix or not -> a state dict for ``GPT(config)``.

    Raises ValueError for an output layer that differs from the embedding: our GPT ties the two.
    """
    out = {}
    for name, t in tensors.items():
        name = name.removeprefix(PREFIX)
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        if name == "lm_head.weight":
            wte = tensors.get(PREFIX + "wte.weight", tensors.get("wte.weight"))
            if wte is not None and not torch.equal(t, wte):
                raise ValueError("lm_head.weight differs from wte.weight; only tied GPT-2 models are supported")
            continue
        if name == "wte.weight":
            t = torch.cat([t, t.new_zeros(config.padded_vocab_size - t.size(0), t.size(1))])
        out[name] = t.t().contiguous() if name.endswith(TRANSPOSED) else t
    return out


def config_to_huggingface(config: GPTConfig) -> dict[str, Any]:
    """The config.json that transformers, vLLM and llama.cpp's converter read for this model."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": EOT,
        "eos_token_id": EOT,
        "dtype": "float32",
    }


def config_from_huggingface(found: dict[str, Any]) -> GPTConfig:
    """GPTConfig of a config.json; ValueError naming the first entry that is not GPT-2 as we compute it."""
    n_embd = found.get("n_embd", 768)
    expected = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", None),
        "n_inner": (None, 4 * n_embd),
        "layer_norm_epsilon": (1e-5, None),
        "tie_word_embeddings": (True, None),
        "scale_attn_weights": (True, None),
        "scale_attn_by_inverse_layer_idx": (False, None),
        "add_cross_attention": (False, None),
    }
    for key, allowed in expected.items():
        if found.get(key) not in allowed:
            raise ValueError(f"{key} is {found.get(key)!r}, a GPT-2-shaped model has {allowed[0]!r}")
    return GPTConfig(
        block_size=found.get("n_positions", 1024),
        vocab_size=found.get("vocab_size", GPTConfig.vocab_size),
        n_layer=found.get("n_layer", 12),
        n_head=found.get("n_head", 12),
        n_embd=n_embd,
    )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the files that model.safetensors.index.json names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return load_file(folder / "model.safetensors")
    files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if any(Path(name).name != name for name in files):
        raise ValueError(f"{index} names files outside its own folder")
    return {name: t for file in files for name, t in load_file(folder / file).items()}


def load_pretrained(folder: Path) -> GPT:
    """The GPT of a Hugging Face folder, on the CPU in float32.

    Raises FileNotFoundError when config.json or the weights are missing, ValueError when they are not a GPT-2.
    """
    config = config_from_huggingface(json.loads((folder / "config.json").read_text()))
    state = from_huggingface(read_tensors(folder), config)
    with torch.device("meta"):
        model = GPT(config)
    missing, unknown = set(model.state_dict()) - set(state), set(state) - set(model.state_dict())
    if missing or unknown:
        raise ValueError(
            f"weights of {folder} do not fit: missing {sorted(missing)[:3]}, unknown {sorted(unknown)[:3]}"
        )
    model.load_state_dict({name: t.float() for name, t in state.items()}, assign=True)
    return model
