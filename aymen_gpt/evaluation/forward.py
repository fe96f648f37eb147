"""A GPT's forward pass over packed texts (packing.py): the same arithmetic as model/gpt.py, on a line of tokens.

Weights are taken in the precision asked for, once. Products run in it; residuals, norms, softmaxes and what is
returned are float32. The model is only read, no gradient is kept, nothing is compiled.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aymen_gpt.evaluation.packing import Batch, Layer
from aymen_gpt.model.gpt import GPT, Block

# Rows and columns of the logits that exist at once, by device type. On a CPU they stay in the caches so.
LOGITS = {"cpu": (512, 2048), "mps": (1024, 16384), "cuda": (4096, 16384)}

Function = Callable[[Tensor], Tensor]


class PackedForward:
    """Batches -> what the model says of them; columns of the embedding past ``vocab_size`` have no probability."""

    def __init__(self, model: GPT, dtype: torch.dtype, vocab_size: int) -> None:
        self.dtype = dtype
        self.wte, self.wpe = model.wte.weight.detach(), model.wpe.weight.detach()
        self.blocks = [PackedBlock(cast(Block, block), dtype) for block in model.h]
        self.ln_f = norm(model.ln_f)
        # The output layer less its mean row. A softmax ignores what all logits have in common, and low precision
        # does not: the logits of a trained GPT-2 lie around -100, where bfloat16 has steps of 0.5, but spread
        # over a few tens.
        self.mean = self.wte[:vocab_size].float().mean(dim=0)  # (C,)
        self.rows, self.columns = LOGITS[self.wte.device.type]
        self.head = [linear(part - self.mean, None, dtype) for part in self.wte[:vocab_size].split(self.columns)]

    def hidden(self, batch: Batch) -> Tensor:
        """The last LayerNorm's output where something is predicted, (R, C)."""
        x = self.wte[batch.tokens].float() + self.wpe[batch.positions]  # (N, C)
        for block in self.blocks[:-1]:
            x = block(x, batch.inner)
        return self.ln_f(self.blocks[-1](x, batch.last, batch.predictors))

    def log_probabilities(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Of each target, (P,)."""
        parts = hidden.to(self.dtype).split(self.rows)
        total = torch.cat([torch.stack([log_total(head(h)) for head in self.head]).logsumexp(0) for h in parts])
        targets = self.wte[batch.targets].float() - self.mean  # (P, C)
        return (hidden[batch.sources] * targets).sum(dim=1) - total[batch.sources]

    def likeliest(self, hidden: Tensor) -> Tensor:
        """The token that gets most of the probability after each of these states, (R,)."""
        found = []
        for h in hidden.to(self.dtype).split(self.rows):
            best = [head(h).max(dim=1) for head in self.head]
            column = torch.stack([b.values for b in best]).argmax(dim=0, keepdim=True)  # which part of the columns
            found.append((torch.stack([b.indices for b in best]).gather(0, column) + column * self.columns)[0])
        return torch.cat(found)


class PackedBlock:
    """A block of the GPT, for all nodes (N, C), or in the last layer for its queries (R, C)."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        attn, C = block.attn, block.attn.c_proj.in_features
        self.dtype, self.n_head = dtype, attn.n_head
        self.ln_1, self.ln_2 = norm(block.ln_1), norm(block.ln_2)
        self.q = linear(attn.c_attn.weight[:C], attn.c_attn.bias[:C], dtype)
        self.kv = linear(attn.c_attn.weight[C:], attn.c_attn.bias[C:], dtype)
        self.proj = linear(attn.c_proj.weight, attn.c_proj.bias, dtype)
        self.fc = linear(block.mlp.c_fc.weight, block.mlp.c_fc.bias, dtype, gelu=True)
        self.out = linear(block.mlp.c_proj.weight, block.mlp.c_proj.bias, dtype)

    def __call__(self, x: Tensor, layer: Layer, queries: Tensor | None = None) -> Tensor:
        h = self.ln_1(x).to(self.dtype)  # (N, C)
        kv = self.kv(h)  # (N, 2C)
        if queries is not None:
            x, h = x[queries], h[queries]  # (R, C)
        x = x + self.proj(self.attend(self.q(h), kv, layer))
        return x + self.out(self.fc(self.ln_2(x).to(self.dtype)))

    def attend(self, q: Tensor, kv: Tensor, layer: Layer) -> Tensor:
        """What queries (R, C) find in keys and values (N, 2C), group by group of the layer's rows."""
        results = []
        for group in layer.groups:
            (G, Tq), Tk = group.queries.shape, group.keys.size(1)
            Q = q.index_select(0, group.queries.flatten()).view(G, Tq, self.n_head, -1).transpose(1, 2)
            KV = kv.index_select(0, group.keys.flatten()).view(G, Tk, 2, self.n_head, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(Q, KV[0], KV[1], attn_mask=group.mask)  # (G, nh, Tq, hs)
            results.append(y.transpose(1, 2).reshape(G * Tq, -1))
        return torch.cat(results).index_select(0, layer.places)


def log_total(logits: Tensor) -> Tensor:
    """log of the sum of exp(logits) over the columns, float32: what log_softmax subtracts, and in one pass."""
    return logits[:, 0].float() - F.log_softmax(logits, dim=1, dtype=torch.float32)[:, 0]


def norm(layer: nn.LayerNorm) -> Function:
    weight, bias = layer.weight.detach().float(), layer.bias.detach().float()
    return lambda x: F.layer_norm(x, weight.shape, weight, bias, layer.eps)


def linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, gelu: bool = False) -> Function:
    """x -> x @ weight.T + bias, and GELU of that if asked for, all in ``dtype``."""
    weight = weight.detach().to(dtype)
    bias = None if bias is None else bias.detach().to(dtype)
    if has_onednn(weight):
        return onednn_linear(weight, bias, gelu)
    if gelu:
        return lambda x: F.gelu(F.linear(x, weight, bias), approximate="tanh")
    return lambda x: F.linear(x, weight, bias)


def has_onednn(weight: Tensor) -> bool:
    """Whether ``onednn_linear`` can be had: on x86 CPUs, in bfloat16 only those with AVX-512."""
    if weight.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    able = {torch.float32: ("AVX2", "AVX512"), torch.bfloat16: ("AVX512",)}
    return torch.backends.cpu.get_cpu_capability() in able.get(weight.dtype, ())


def onednn_linear(weight: Tensor, bias: Tensor | None, gelu: bool) -> Function:
    """The linear layer that torch.compile makes on a CPU, which adds the bias and applies GELU inside the product.

    One core of a Zen 4 does the layers of GPT-2 124M 1.1 times as fast in bfloat16 with it as with the operations
    one by one, 1.15 times in float32 and the output layer 1.4 times.
    """
    function = torch.ops.mkldnn._linear_pointwise
    after: tuple[str, list[Any], str] = ("gelu", [], "tanh") if gelu else ("none", [], "")
    if weight.dtype == torch.bfloat16:  # a copy already: lay it out as the processor wants it
        weight = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda x: function(x, weight, bias, *after)
