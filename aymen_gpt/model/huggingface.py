"""Our GPT <-> a Hugging Face GPT-2 folder: names, layout and configuration, with safetensors alone.

Differences from our own state dict: names begin with ``transformer.``; the matrices of the four projections are
stored (in, out) because OpenAI's Conv1D multiplied from the left; the embedding has no padding rows; the tied
output layer is not stored. Folders from the Hub may lack the prefix (openai-community/gpt2 does) and may carry
the causal mask as ``attn.bias``, which is no parameter.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from aymen_gpt.errors import DataError
from aymen_gpt.files import read_json
from aymen_gpt.model.gpt import GPT, GPTConfig

PREFIX = "transformer."
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
SIZES = {"block_size": "n_positions"} | {name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
VOCAB_SIZE = GPTConfig.vocab_size  # rows of an embedding past GPT-2's 50,257 are padding ...
MOST_ROWS = 51_200  # ... up to here, where Megatron-LM pads to on 8 GPUs; with more they are of another tokenizer
EOT = VOCAB_SIZE - 1  # <|endoftext|>, GPT-2's only special token


def to_huggingface(tensors: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Tensors by our names -> the same by GPT-2's (also for optimizer moments, which share names and shapes)."""
    out = {}
    for name, t in tensors.items():
        if name == "wte.weight":
            t = t[:vocab_size]
        out[PREFIX + name] = (t.t() if name.endswith(TRANSPOSED) else t).contiguous()
    return out


def from_huggingface(
    tensors: dict[str, Tensor], config: GPTConfig, transposed: tuple[str, ...] = TRANSPOSED
) -> dict[str, Tensor]:
    """Tensors by GPT-2's names, prefix or not -> a state dict for ``GPT(config)``.

    Rows of the embedding past ``config.vocab_size`` become zeros. Raises ValueError for an output layer that
    differs from the embedding, because our GPT ties the two.
    """
    out = {name.removeprefix(PREFIX): t for name, t in tensors.items()}
    out = {name: t for name, t in out.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    output = out.pop("lm_head.weight", None)
    if "wte.weight" in out:
        if output is not None and not torch.equal(output, out["wte.weight"]):
            raise ValueError("lm_head.weight differs from wte.weight; only tied GPT-2 models are supported")
        wte, vocab_size = out["wte.weight"], config.vocab_size
        if wte.dim() != 2 or not vocab_size <= wte.size(0) <= MOST_ROWS:
            raise ValueError(f"wte.weight has the shape {tuple(wte.shape)}, the model {vocab_size:,} tokens")
        padding = wte.new_zeros(config.padded_vocab_size - vocab_size, wte.size(1))
        out["wte.weight"] = torch.cat([wte[:vocab_size], padding])  # (Vp, C)
    return {name: t.t().contiguous() if name.endswith(transposed) else t for name, t in out.items()}


def gpt(config: GPTConfig, state: dict[str, Tensor]) -> GPT:
    """The GPT with these weights, by our names, in float32; ValueError or RuntimeError says what does not fit."""
    if len(state) < config.n_layer:
        raise ValueError(f"{config.n_layer:,} layers, and only {len(state)} tensors")
    for name, t in state.items():
        if not t.is_floating_point():
            raise ValueError(f"{name} holds {t.dtype}, expected floating point")
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict({name: t.float().contiguous() for name, t in state.items()}, assign=True)
    return model


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


def read_config(folder: Path) -> GPTConfig:
    """The shape of the model in a folder; DataError when config.json is missing, damaged or no GPT-2's."""
    path = folder / "config.json"
    found = read_json(path)
    sizes = {ours: found.get(theirs, getattr(GPTConfig, ours)) for ours, theirs in SIZES.items()}
    for ours, size in sizes.items():
        if type(size) is not int or not 0 < size < 2**31:
            raise DataError(f"{path}: {SIZES[ours]} is {str(size)[:40]!r}, expected a whole number above 0")
    expected = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", None),
        "n_inner": (None, 4 * sizes["n_embd"]),
        "layer_norm_epsilon": (1e-5, None),
        "tie_word_embeddings": (True, None),
        "scale_attn_weights": (True, None),
        "scale_attn_by_inverse_layer_idx": (False, None),
        "add_cross_attention": (False, None),
    }
    for key, allowed in expected.items():
        if found.get(key) not in allowed:
            raise DataError(f"{path}: {key} is {str(found.get(key))[:40]!r}, a GPT-2 has {allowed[0]!r}")
    try:
        return GPTConfig(**sizes)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def weight_files(index: Path) -> list[str]:
    """The files that a model.safetensors.index.json names; DataError unless each lies beside it."""
    places = read_json(index).get("weight_map")
    names = {str(name) for name in places.values()} if isinstance(places, dict) else set()
    if not names or any(Path(name).name != name or Path(name).suffix != ".safetensors" for name in names):
        raise DataError(f"{index}: expected a weight_map that names .safetensors files of the same folder")
    return sorted(names)


def load_pretrained(folder: Path) -> GPT:
    """The GPT of a Hugging Face folder, on the CPU in float32, with GPT-2's tokens and no padding past them.

    Raises DataError when anything is missing, damaged or no GPT-2.
    """
    config, index = read_config(folder), folder / "model.safetensors.index.json"
    config = replace(config, vocab_size=min(config.vocab_size, VOCAB_SIZE))
    one = (folder / "model.safetensors").exists() or not index.exists()
    files = ["model.safetensors"] if one else weight_files(index)
    try:
        tensors = {name: t for file in files for name, t in load_file(folder / file).items()}
        return gpt(config, from_huggingface(tensors, config))
    except FileNotFoundError:
        raise DataError(f"no model in {folder}: model.safetensors, or a part of it, is missing") from None
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise DataError(f"cannot use the model in {folder}: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
