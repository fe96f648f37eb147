"""A GPT -> one GGUF file, the format that llama.cpp, Ollama and LM Studio read, by llama.cpp's own package gguf.

Keys, tensor names and layout are those of llama.cpp's convert_hf_to_gguf.py for GPT2LMHeadModel
(https://github.com/ggml-org/llama.cpp; the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):
matrices are stored (out, in) as our GPT holds them, and the tied output layer is not stored.
"""

import errno
import logging
import os
from pathlib import Path

from aymen_gpt.errors import UsageError
from aymen_gpt.model.gpt import GPT
from aymen_gpt.model.huggingface import EOT, PREFIX

FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
BLOCK = 32  # numbers of q8_0 that share a scale


def check(model: GPT, type: str) -> None:
    """UsageError when a model of this shape cannot be written with this type."""
    if type == "q8_0" and model.config.n_embd % BLOCK:
        raise UsageError(
            f"--type q8_0 packs {BLOCK} numbers of a row at a time and n_embd is {model.config.n_embd}: use f16"
        )


def write_gguf(path: Path, model: GPT, type: str, *, name: str, tokens: list[str], merges: list[str]) -> None:
    """Write the model and its tokenizer to ``path``; the same arguments write the same bytes.

    ``type`` is f32, f16 or q8_0; vectors and position embeddings stay float32, as llama.cpp expects. ``tokens``
    are the 50,257 by id and ``merges`` the 50,000 "left right", both in GPT-2's letters. Raises OSError when the
    disk is full.
    """
    import gguf

    logging.getLogger("gguf").setLevel(logging.WARNING)
    config = model.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    writer.add_name(name)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[type]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * EOT + [gguf.TokenType.CONTROL])
    writer.add_token_merges(merges)
    for add_special in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_sep_token_id):
        add_special(EOT)
    writer.add_add_bos_token(False)  # a prompt begins with its own first token, as in generate.py
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for ours, t in model.state_dict().items():
        t = t[: config.vocab_size] if ours == "wte.weight" else t
        whole = t.dim() == 1 or ours == "wpe.weight"
        kind = gguf.GGMLQuantizationType["F32" if whole else type.upper()]
        found = theirs.get_name(PREFIX + ours, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(str(found), gguf.quants.quantize(t.float().cpu().numpy(), kind), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:  # numpy does not say which
        raise OSError(error.errno or errno.ENOSPC, os.strerror(error.errno or errno.ENOSPC)) from error


def modelfile(gguf_name: str, block_size: int) -> str:
    """What ``ollama create NAME -f Modelfile`` reads (https://docs.ollama.com/modelfile): plain continuation of a
    text, without a chat template."""
    return f"""\
FROM ./{gguf_name}
TEMPLATE "{{{{ .Prompt }}}}"
PARAMETER num_ctx {block_size}
PARAMETER temperature 0.8
PARAMETER top_k 50
PARAMETER stop "<|endoftext|>"
"""
