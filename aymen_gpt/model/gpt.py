"""GPT-2 and GPT-3: token ids in, logits out. This file imports nothing local and can be copied out alone.

The network of "Language Models are Unsupervised Multitask Learners" (GPT-2, section 2.3): pre-norm blocks,
learned positions, tanh GELU, biases everywhere, the output layer tied to the token embedding. GPT-3
("Language Models are Few-Shot Learners", arXiv:2005.14165, section 2.1) has the same shape at a context of
2048; its alternating sparse attention is not reproduced, every layer here is dense.

Parameter names are GPT-2's own (wte, wpe, h.0.attn.c_attn, ...), so weights, papers and Hugging Face line up.

Letters in the shape comments:
    B  batch, rows            C   n_embd, channels       nh  n_head
    T  time, positions        V   vocab_size             hs  head size, C / nh
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. The defaults are GPT-2 124M."""

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50257  # 256 bytes + 50,000 merges + <|endoftext|>
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

    def __post_init__(self) -> None:
        if min(self.block_size, self.vocab_size, self.n_layer, self.n_head, self.n_embd) < 1:
            raise ValueError(f"every size of a GPT must be at least 1, got {self}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} does not divide into n_head {self.n_head} heads")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in memory: vocab_size rounded up to a multiple of 128 (50,257 -> 50,304).

        Matrix units want round sizes. The extra rows are zero, are never predicted, stay zero in training
        (no gradient reaches them, and weight decay of zero is zero) and are absent from checkpoints.
        """
        return -(-self.vocab_size // 128) * 128

    @property
    def n_params(self) -> int:
        """Parameters with vocab_size rows, as papers count them: 124,439,808 for GPT-2 124M."""
        C = self.n_embd
        return (self.vocab_size + self.block_size + 2) * C + self.n_layer * (12 * C + 13) * C

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs (forward + backward) of one token at full context, 6N + 12LCT.

        The PaLM formula (arXiv:2204.02311, appendix B) without position embeddings, as nanoGPT counts;
        it charges attention in full, although the causal half of it is never computed.
        """
        N = self.n_params - self.block_size * self.n_embd
        return 6 * N + 12 * self.n_layer * self.n_embd * self.block_size


# GPT-2: the four released models. GPT-3: Table 2.1 of the paper; where a printed row contradicts itself
# (XL: 24 heads of 128 are not 2048 wide; 13B: 40 heads of 128 are not 5140 wide) the head size is kept.
PRESETS: dict[str, GPTConfig] = {
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
    "gpt3-small": GPTConfig(block_size=2048, n_layer=12, n_head=12, n_embd=768),
    "gpt3-medium": GPTConfig(block_size=2048, n_layer=24, n_head=16, n_embd=1024),
    "gpt3-large": GPTConfig(block_size=2048, n_layer=24, n_head=16, n_embd=1536),
    "gpt3-xl": GPTConfig(block_size=2048, n_layer=24, n_head=16, n_embd=2048),
    "gpt3-2.7b": GPTConfig(block_size=2048, n_layer=32, n_head=32, n_embd=2560),
    "gpt3-6.7b": GPTConfig(block_size=2048, n_layer=32, n_head=32, n_embd=4096),
    "gpt3-13b": GPTConfig(block_size=2048, n_layer=40, n_head=40, n_embd=5120),
    "gpt3-175b": GPTConfig(block_size=2048, n_layer=96, n_head=96, n_embd=12288),
    "demo": GPTConfig(block_size=256, n_layer=6, n_head=4, n_embd=128),
    "tiny": GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=32),
}


class LayerCache:
    """Keys and values of one layer for the positions seen so far, so that each is computed once.

    Room for all positions is taken at once, ``empty`` (B, nh, block_size, hs); the first append may be of any
    length (the prompt), the later ones are of one position each.
    """

    def __init__(self, empty: Tensor) -> None:
        self.k, self.v = empty, torch.empty_like(empty)
        self.used = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k and v (B, nh, T, hs); return all that is kept, (B, nh, used, hs) each."""
        T = k.size(2)
        assert self.used == 0 or T == 1, f"{T} positions appended after {self.used}"
        self.k[:, :, self.used : self.used + T] = k
        self.v[:, :, self.used : self.used + T] = v
        self.used += T
        return self.k[:, :, : self.used], self.v[:, :, : self.used]


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None) -> Tensor:
        """With a cache the tokens of x (B, T, C) come after those in it. Where a token may see others than those
        before it, a ``mask`` (B, 1, T, T) says which (fourth) each one (third) sees."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(k, v)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1)  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # (B, T, C)


def again(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x), which backward computes a second time: nothing but x is kept for it."""
    return checkpoint(f, x, use_reentrant=False, preserve_rng_state=False)


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None, recompute: bool = False
    ) -> Tensor:
        """A cache and a mask as attention takes them, or ``recompute`` attention in backward."""
        x = x + (again(self.attend, x) if recompute else self.attend(x, cache, mask))
        return x + self.mlp(self.ln_2(x))

    def attend(self, x: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None) -> Tensor:
        return self.attn(self.ln_1(x), cache, mask)


class GPT(nn.Module):
    """GPT-2/GPT-3. ``GPT(PRESETS["gpt2"])`` has random weights; ``generator`` makes them reproducible."""

    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.residual = torch.float32  # of the sums between blocks under autocast
        self.recompute = "none"  # or attention, or block: what backward computes again, so as to keep less for it
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)  # also the output layer
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw every weight anew: the law of GPT-2 (paper section 2.3, released code for the constants).

        =============================  ====================================
        matrices and embeddings        N(0, 0.02)
        attn.c_proj, mlp.c_proj        N(0, 0.02 / sqrt(2 n_layer))
        biases                         0
        LayerNorm                      weight 1, bias 0
        wte rows past vocab_size       0
        =============================  ====================================
        """
        for name, p in self.named_parameters():
            p.copy_(self.initial(name, p.shape, generator))

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator | None = None) -> Tensor:
        """What init_weights gives to one parameter; the next one takes the generator's next numbers."""
        values = torch.zeros(shape)
        if len(shape) == 2:
            residual = name.endswith("c_proj.weight")
            values.normal_(
                0.0, 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02, generator=generator
            )
        elif "ln_" in name and name.endswith("weight"):
            values.fill_(1.0)
        if name == "wte.weight":
            values[self.config.vocab_size :] = 0.0
        return values

    def hidden(
        self,
        idx: Tensor,
        caches: list[LayerCache] | None = None,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The last LayerNorm's output, (B, T, C), for token ids (B, T); logits are one product away.

        With ``caches`` (see new_caches) idx continues the positions already in them. Rows that hold several texts
        come with the ``positions`` (B, T) of their tokens and a ``mask`` (see CausalSelfAttention).
        """
        past = caches[0].used if caches else 0
        T = idx.size(1)
        if positions is None and past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens do not fit into a context of {self.config.block_size}")
        x = self.wte(idx) + (self.wpe.weight[past : past + T] if positions is None else self.wpe(positions))
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(self.residual)
        recompute = self.recompute if torch.is_grad_enabled() else "none"
        for i, block in enumerate(self.h):
            if recompute == "block":
                x = again(block, x)
            else:
                x = block(x, caches[i] if caches else None, mask, recompute == "attention")  # (B, T, C)
        return self.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the vocab_size real tokens, (..., V), for hidden states (..., C)."""
        return F.linear(hidden, self.wte.weight)[..., : self.config.vocab_size]

    def forward(
        self,
        idx: Tensor,
        caches: list[LayerCache] | None = None,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        head: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Logits (B, T, V) for token ids (B, T); position t predicts token t + 1.

        With ``head`` what that makes of the hidden states (B, T, C) and the output layer's weight (Vp, C), as a
        loss. For the other arguments see ``hidden``.
        """
        x = self.hidden(idx, caches, positions=positions, mask=mask)
        return self.logits(x) if head is None else head(x, self.wte.weight)

    def new_caches(self, batch: int) -> list[LayerCache]:
        """Empty caches, one a layer, for generating up to block_size positions."""
        c = self.config
        shape = (batch, c.n_head, c.block_size, c.n_embd // c.n_head)
        dtype, device = self.wte.weight.dtype, self.wte.weight.device
        return [LayerCache(torch.empty(shape, dtype=dtype, device=device)) for _ in self.h]
