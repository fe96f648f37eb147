"""Muon: the matrices of the blocks move along an orthogonal matrix, all other parameters by AdamW.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", https://kellerjordan.github.io/posts/muon/.
With G the gradient of a weight W (m, n), of m outputs and n inputs, one update is

    B  <-  0.95 B + 0.05 G                          the momentum, the only state
    O   =  orthogonalise(0.05 G + 0.95 B)           Nesterov: one step further than B
    W  <-  (1 - rate decay) W  -  rate sqrt(max(1, m / n)) O

Where G = U S V^T, the nearest matrix with all singular values 1 is U V^T: the weight moves as far in G's weak
directions as in its strong ones. Few are strong in the gradients of hidden layers, so AdamW neglects the others.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from aymen_gpt.training.distributed import Ranks
from aymen_gpt.training.sharding import first_row, gather_rows, local

MOMENTUM = 0.95
STEPS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)
BATCH = 2**26  # numbers of the matrices that are orthogonalised at once: 256 MB, and about twice that beside it


def orthogonalise(x: Tensor) -> Tensor:
    """U S' V^T with S' between about 0.7 and 1.2, for each x = U S V^T of a batch (b, m, n), m <= n; in x's dtype.

    Newton-Schulz: an odd polynomial of x acts on its singular values alone,

        a x + b (x x^T) x + c (x x^T)^2 x  =  U (a S + b S^3 + c S^5) V^T,

    and five times the one with these coefficients takes everything from about 0.01 to 1 there. x is divided by its
    Frobenius norm before, so that no singular value is above 1. A matrix of zeros stays one.
    """
    a, b, c = COEFFICIENTS
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = torch.bmm(x, x.mT)  # (b, m, m)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def flops(n_layer: int, n_embd: int) -> int:
    """Of the matrix products of one update: a matrix (m, n) takes STEPS times 4 m^2 n + 2 m^3."""
    C = n_embd
    of_block = 4 * 6 * C**3 + 2 * (4 * C**2 * 4 * C + 2 * C**3)  # q, k, v and attn.c_proj; c_fc and mlp.c_proj
    return STEPS * n_layer * of_block


def is_matrix(name: str) -> bool:
    """Whether Muon moves this parameter: the four matrices of each block, by the model's names."""
    return name.startswith("h.") and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def pieces(name: str, t: Tensor) -> Iterator[Tensor]:
    """Views of a matrix of the model, or of its gradient, that are orthogonalised apart, none with m > n.

    Queries, keys and values come of three matrices that happen to lie in one tensor, c_attn.
    """
    for piece in t.chunk(3) if "c_attn" in name else (t,):
        yield piece.mT if piece.size(0) > piece.size(1) else piece


def zero_residual_projections(model: nn.Module) -> None:
    """Let each block begin by adding nothing: attn.c_proj and mlp.c_proj of a model become 0."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("c_proj.weight"):
                p.zero_()


class Muon(torch.optim.Optimizer):
    """Muon for the blocks' matrices, AdamW (eps 1e-8) for embeddings, biases and gains.

    Ranks that have the same rows of a parameter must have the same gradient. All gather the matrices of a batch,
    each orthogonalises its share, then all get all, so their weights stay equal to the last bit. ``state`` holds,
    by parameter, ``momentum`` of the former and AdamW's ``exp_avg``, ``exp_avg_sq`` and ``step`` of the others;
    optim.start_moments makes it.

    ``lr`` is AdamW's rate. Groups whose rate is another have it as ``times`` that of the schedule.
    """

    def __init__(
        self,
        model: nn.Module,
        ranks: Ranks,
        *,
        lr: float,
        matrix_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        self.ranks = ranks
        self.matrices = {name: p for name, p in model.named_parameters() if is_matrix(name)}
        others = [p for name, p in model.named_parameters() if name not in self.matrices]
        of_matrices = {"params": list(self.matrices.values()), "lr": matrix_rate, "times": matrix_rate / lr}
        super().__init__([of_matrices], {"weight_decay": weight_decay})
        groups = [
            {"params": [p for p in others if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True)
        self.param_groups += self.adamw.param_groups
        self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Make one update from the gradients ``p.grad``."""
        assert closure is None
        same: dict[int, list[tuple[str, Tensor]]] = {}  # those whose pieces have the same shape
        for name, p in self.matrices.items():
            same.setdefault(p.numel() // (3 if "c_attn" in name else 1), []).append((name, p))
        for size, matrices in same.items():
            at_once = max(BATCH // (2 * size), 1) * self.ranks.world_size
            for first in range(0, len(matrices), at_once):
                self._move(matrices[first : first + at_once])
        self.adamw.step()

    def _move(self, matrices: list[tuple[str, Tensor]]) -> None:
        """Move these parameters, whose pieces all have the same shape."""
        rate, decay = (self.param_groups[0][key] for key in ("lr", "weight_decay"))
        ahead: list[Tensor] = []  # by half a step of Nesterov's, piece by piece
        for name, p in matrices:
            assert p.grad is not None, name
            momentum = local(self.state[p]["momentum"]).lerp_(local(p.grad), 1 - MOMENTUM)
            with self.ranks.meeting():
                ahead += pieces(name, gather_rows(p, torch.lerp(local(p.grad), momentum, MOMENTUM)))
        share = -(-len(ahead) // self.ranks.world_size)
        batch = ahead[0].new_zeros(share, *ahead[0].shape)  # zeros where the last ranks have less
        for place, piece in zip(batch, ahead[self.ranks.rank * share :][:share], strict=False):
            place.copy_(piece)
        moved = iter(self.ranks.share(orthogonalise(batch)))
        for name, p in matrices:
            step, mine, first = torch.empty(p.shape, device=batch.device), local(p), first_row(p)
            parts = list(pieces(name, step))
            for piece in parts:
                piece.copy_(next(moved))
            outputs, inputs = p.size(0) / len(parts), p.size(1)
            mine.mul_(1 - rate * decay)
            mine.add_(step[first : first + mine.size(0)], alpha=-rate * math.sqrt(max(1, outputs / inputs)))
