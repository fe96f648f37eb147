"""What a run takes, by arithmetic alone: parameters, micro-steps, memory, disk. Needs no torch, allocates nothing.

Memory is the sum of the tensors that the code of model/gpt.py and model/loss.py makes autograd keep, layer by
layer (see ``saved_by_layer``); ``python pretrain.py --plan --probe`` sets it beside what a process really took. On
a CPU that is all memory of the process. For CUDA the same tensors are counted, which would compare with
torch.cuda.max_memory_allocated; torch.compile keeps fewer of them. The latter is not measured.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aymen_gpt.data.loader import deal

if TYPE_CHECKING:
    from aymen_gpt.model.gpt import GPTConfig

FLOAT = 4  # bytes of weights, gradients, moments, sums and norms, whatever matrix products are in
PROCESS = 350_000_000  # a CPU process after one step of a model of 8 columns: Python, torch, MKL or oneDNN
# glibc's malloc never fills its heap quite: what it holds above what is in use at the peak, as a share of all that
# comes and goes in a step. Measured on GPTs of 8M to 124M; blocks of products in 16 bits fall into other places.
HOLES = {4: 0.45, 2: 0.2}
TOKENIZER_FILES = 3_020_000  # tokenizer.json, vocab.json, merges.txt, the same beside every checkpoint


def parameters(m: "GPTConfig") -> dict[str, int]:
    """How many parameters each part has; they add up to ``n_params``."""
    C, L = m.n_embd, m.n_layer
    return {
        "token embedding": m.vocab_size * C,
        "positions": m.block_size * C,
        "attention": L * (4 * C + 4) * C,
        "MLP": L * (8 * C + 5) * C,
        "norms": (4 * L + 2) * C,
    }


def dealt(rows_per_step: int, world_size: int, micro_batch: int) -> tuple[int, int]:
    """(rows of one forward pass, passes in one step) of the rank with the most rows; one pass may be shorter."""
    _, most = deal(rows_per_step, 0, world_size)
    rows = min(micro_batch, most)
    return rows, -(-most // rows)


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank needs in a training step."""

    weights: int
    moments: int  # of the optimizer
    gradients: int
    copies: int  # of the weights, in the dtype of products
    activations: int
    loss: int  # logits, and what they become, of one chunk of tokens; the output layer's gradient
    holes: int  # of malloc's heap
    peak: int  # less than the sum: not all of it is there at the same time
    moment: str  # when that is

    @property
    def saving(self) -> int:
        """Copies in host memory while a checkpoint is written in the background."""
        return self.weights + self.moments


LONGEST, ROWS = 512, 128  # tokens: model.cpu_attention's, which is not imported here because it needs torch


def saved_by_layer(m: "GPTConfig", size: int, *, on_cpu: bool) -> int:
    """Bytes that one block keeps of each token for its backward pass, products being of ``size`` bytes.

    ============================  ===================  =======  ================
    tensor                        kept by              float32  with autocast
    ============================  ===================  =======  ================
    x                             ln_1                 4 C      4 C
    ln_1(x)                       attn.c_attn          4 C      2 C
    q, k, v                       attention            12 C     6 C
    y, attention's output         attn.c_proj          4 C      2 C
    x + c_proj(y)                 ln_2                 4 C      4 C
    ln_2(x)                       mlp.c_fc             4 C      2 C
    c_fc(x)                       gelu                 16 C     8 C
    gelu(c_fc(x))                 mlp.c_proj           16 C     8 C
    mean and 1/deviation          ln_1, ln_2           16       16
    log of the softmax's sum      attention            4 nh     4 nh
    ============================  ===================  =======  ================

    The fused attention kernels keep no (T, T) matrix. On a CPU with autocast and up to LONGEST tokens
    model.cpu_attention keeps what ROWS queries at a time may see of it, instead of the log of the sum.
    """
    whole = on_cpu and size < FLOAT and m.block_size <= LONGEST
    attention = size * (m.block_size + min(m.block_size, ROWS)) // 2 if whole else FLOAT
    return (2 * FLOAT + 14 * size) * m.n_embd + 4 * FLOAT + attention * m.n_head


def step_memory(
    m: "GPTConfig", *, micro_batch: int, passes: int, world_size: int = 1, size: int = FLOAT, on_cpu: bool = True
) -> Memory:
    """Memory of a step of ``passes`` micro-batches, products being of ``size`` bytes (4, or 2 under autocast)."""
    C, tokens = m.n_embd, micro_batch * m.block_size
    embedding = FLOAT * m.padded_vocab_size * C
    weights = FLOAT * (m.n_params + (m.padded_vocab_size - m.vocab_size) * C)
    copies = 0 if size == FLOAT else size * m.n_layer * (12 * C + 9) * C
    activations = tokens * (m.n_layer * saved_by_layer(m, size, on_cpu=on_cpu) + FLOAT * (C + 2))  # and ln_f's
    # A chunk of logits becomes gradients in its place, and its softmax in float32, on a CPU of 32 rows at a time.
    chunk = min(tokens, 1024 if on_cpu else 8192)
    logits = m.padded_vocab_size * (chunk * size + (32 if on_cpu else chunk) * FLOAT)
    # d_weight; its part by one chunk, and that in float32; the embedding in the dtype of products.
    output = (
        embedding + size * embedding // FLOAT + (0 if size == FLOAT else embedding + size * embedding // FLOAT)
    )
    hidden = 2 * FLOAT * tokens * C  # and its gradient
    # Gradients of the micro-batches before; ranks have a place for them all the time (training.gradients).
    earlier = weights if passes > 1 or world_size > 1 else 0
    stays = logits if on_cpu else 0
    moments = {
        "the loss of a micro-batch": earlier + copies + activations + hidden + logits + output,
        # gelu and c_proj of the last block: the residual's gradient, and those of c_proj's and gelu's inputs
        "the start of a backward pass": earlier
        + copies
        + activations
        + embedding
        + stays
        + tokens * C * (5 * FLOAT if size == FLOAT else FLOAT + 5 * size),
        "the end of a backward pass": weights + stays + (2 * embedding if earlier else embedding),
        "the update": weights + stays,
    }
    moment = max(moments, key=lambda name: moments[name])
    passing = moments[moment]
    holes = int(HOLES[size] * (passing - stays)) if on_cpu else 0
    loss = logits + output + hidden
    peak = 3 * weights + passing + holes
    return Memory(weights, 2 * weights, weights, copies, activations, loss, holes, peak, moment)


def checkpoint_bytes(m: "GPTConfig") -> int:
    """Weights and two moments in float32, without padding, and the vocabulary files."""
    return 3 * FLOAT * m.n_params + TOKENIZER_FILES
