"""What a run takes, by arithmetic alone: parameters, micro-steps, memory of tensors, disk. Allocates nothing."""

from typing import TYPE_CHECKING

from aymen_gpt.data.loader import deal

if TYPE_CHECKING:
    from aymen_gpt.model.gpt import GPTConfig
    from aymen_gpt.training.config import TrainConfig

FLOAT = 4  # bytes of weights, gradients, moments, sums and norms, whatever matrix products are in
USABLE = 0.9  # of a GPU's memory: the rest is for its allocator, for NCCL and for what is not estimated
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
    passes = -(-most // micro_batch)
    return -(-most // passes), passes


def saved_by_layer(m: "GPTConfig", size: int) -> int:
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

    The fused attention kernels keep no (T, T) matrix.
    """
    return (2 * FLOAT + 14 * size) * m.n_embd + 4 * FLOAT + FLOAT * m.n_head


def matrices(m: "GPTConfig") -> int:
    """Numbers in the matrices of the blocks."""
    return 12 * m.n_layer * m.n_embd**2


def moments(m: "GPTConfig", optimizer: str) -> int:
    """Numbers that an optimizer remembers: two a parameter, of which Muon spares the blocks' matrices one."""
    return 2 * m.n_params - (matrices(m) if optimizer == "muon" else 0)


def state_memory(m: "GPTConfig", optimizer: str, shard: int = 1) -> int:
    """Bytes of the weights, gradients and moments of one of ``shard`` ranks that share a model."""
    return FLOAT * (2 * m.n_params + moments(m, optimizer)) // shard


def whole_memory(m: "GPTConfig", optimizer: str, shard: int) -> int:
    """Bytes of a rank while it scores the model with all weights, and copies for products, beside its state."""
    return state_memory(m, optimizer, shard) + FLOAT * m.n_params + 2 * matrices(m)


def step_memory(m: "GPTConfig", rows: int, *, size: int, chunk: int, optimizer: str = "adamw") -> dict[str, int]:
    """Bytes of the tensors of one rank in a step with a micro-batch of ``rows``, by what they are.

    Products are of ``size`` bytes (4; 2 under autocast), and logits made for ``chunk`` tokens at a time.
    torch.compile keeps fewer activations; allocators leave some space empty.
    """
    tokens, padding = rows * m.block_size, (m.padded_vocab_size - m.vocab_size) * m.n_embd
    return {
        "weights, gradients, moments": state_memory(m, optimizer) + 4 * FLOAT * padding,
        "copies of weights for products": 0 if size == FLOAT else size * matrices(m),
        "activations": tokens * (m.n_layer * saved_by_layer(m, size) + FLOAT * (m.n_embd + 2)),  # and ln_f's
        "logits of one chunk": min(tokens, chunk) * m.padded_vocab_size * (size + FLOAT),
    }


def sharded_memory(c: "TrainConfig", shard: int, rows: int = 1) -> int:
    """Bytes of the tensors of a GPU that shares the model with others, ``shard`` in all, about.

    Beside its own part it has the embedding, whole, and its gradient, and two blocks with theirs. This estimates
    what training/memory.py counts.
    """
    m, tokens = c.model, rows * c.block_size
    parts = step_memory(m, rows, size=2, chunk=8192, optimizer=c.optimizer)
    own = parts["weights, gradients, moments"] // shard
    if c.recompute == "attention":  # what ln_1, attn.c_attn, attention and attn.c_proj keep, but x
        parts["activations"] -= tokens * m.n_layer * (10 * m.n_embd + FLOAT * (m.n_head + 2))
        parts["copies of weights for products"] -= parts["copies of weights for products"] // 3
    elif c.recompute == "block":
        parts["activations"] = tokens * (FLOAT * m.n_layer * m.n_embd + saved_by_layer(m, 2))
        parts["copies of weights for products"] //= m.n_layer
    block, embedding = FLOAT * 12 * m.n_embd**2, FLOAT * m.padded_vocab_size * m.n_embd
    gathered = 4 * block + 2 * embedding if shard > 1 else 0
    return own + gathered + sum(parts.values()) - parts["weights, gradients, moments"]


def smallest_shard(c: "TrainConfig", world_size: int, local_world_size: int, memory_bytes: float) -> int:
    """How many GPUs hold a copy of the model between them: 1, a machine's, or all where fewer do not suffice."""
    for size in (1, local_world_size):
        if world_size % size == 0 and sharded_memory(c, size) <= USABLE * memory_bytes:
            return size
    return world_size


def checkpoint_bytes(m: "GPTConfig", optimizer: str = "adamw") -> int:
    """Weights and moments in float32, without padding, and the vocabulary files."""
    return FLOAT * (m.n_params + moments(m, optimizer)) + TOKENIZER_FILES
