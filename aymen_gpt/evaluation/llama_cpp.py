"""What llama.cpp computes from a GGUF file: a script that gguf_check.py starts.

llama.cpp may abort the process in which it opens a damaged file, so it gets one of its own. The package cyllama
(MIT licence) has llama.cpp in its wheels. In: a JSON object on standard input, see ``read``. Out: one on standard
output, and logits in a .npy file. Imports nothing of ours.
"""

import json
import os
import sys
from importlib.metadata import version
from typing import Any

import numpy as np


def read(
    file: str, out: str, text: str, vocab_size: int, ids: list[int], positions: list[int], prompt: int, n: int
) -> dict[str, Any]:
    """Logits of ``ids`` (T,) at ``positions`` go to ``out`` (P, V) in float32; the rest is returned.

    ``tokens``: the ids of ``text`` by the file's own tokenizer; ``greedy``: the ``n`` likeliest next tokens, one
    after the other, after the first ``prompt`` ids. On the CPU with keys and values in float32.
    """
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()

    class Model(llama_cpp.LlamaModel):
        n_vocab = vocab_size  # cyllama 0.2.18 looks for it here

    on_cpu = llama_cpp.LlamaModelParams()
    on_cpu.n_gpu_layers = 0
    model = Model(file, on_cpu, False)

    def context(length: int) -> Any:
        options = llama_cpp.LlamaContextParams()
        options.n_ctx = options.n_batch = options.n_ubatch = length
        options.n_threads = options.n_threads_batch = os.cpu_count() or 1
        options.type_k = options.type_v = options.flash_attn_type = 0  # float32, and no flash attention
        return llama_cpp.LlamaContext(model, options, False)

    def decode(runner: Any, tokens: list[int], start: int, wanted: set[int]) -> None:
        batch = llama_cpp.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
        for i, token in enumerate(tokens):
            batch.add(token, start + i, [0], i in wanted)
        runner.decode(batch)

    runner = context(len(ids))
    decode(runner, ids, 0, set(positions))
    logits = np.empty((len(positions), vocab_size), np.float32)
    for row, position in zip(logits, positions, strict=True):
        row[:] = runner.get_logits_ith(position)
    np.save(out, logits)
    runner, written, fresh = context(prompt + n), ids[:prompt], ids[:prompt]
    for _ in range(n):
        decode(runner, fresh, len(written) - len(fresh), {len(fresh) - 1})
        fresh = [int(np.argmax(runner.get_logits_ith(len(fresh) - 1)))]
        written = written + fresh
    tokens = list(model.get_vocab().tokenize(text, False, False))
    return {"tokens": tokens, "greedy": written[prompt:], "version": built_from(), "cyllama": version("cyllama")}


def built_from() -> str:
    """The release of llama.cpp that cyllama was built from, such as "b9190"."""
    import cyllama

    with open(os.path.join(os.path.dirname(cyllama.__file__), "build_config.json")) as f:
        return str(json.load(f)["versions"]["llama_cpp_version"])


if __name__ == "__main__":
    print(json.dumps(read(**json.load(sys.stdin))))
