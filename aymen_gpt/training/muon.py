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
from collections.abc import Callable

import torch
from torch import Tensor, nn

from aymen_gpt.training.distributed import Ranks
from aymen_gpt.training.sharding import deal_back, deal_out, local

MOMENTUM = 0.95
STEPS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)
BATCH = 2**26  # numbers of the matrices that are orthogonalised at once: 256 MB, and four times that beside it


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


def move_of(ahead: Tensor, apart: int) -> Tensor:
    """O of each of the gradients (b, R, C), each of which is ``apart`` matrices stacked: (b, R, C).

    Queries, keys and values come of three matrices that happen to lie in one tensor, c_attn.
    """
    matrices = ahead.view(len(ahead) * apart, -1, ahead.size(2))
    if matrices.size(1) > matrices.size(2):
        return orthogonalise(matrices.mT.contiguous()).mT.reshape(ahead.shape)
    return orthogonalise(matrices).view(ahead.shape)


def zero_residual_projections(model: nn.Module) -> None:
    """Let each block begin by adding nothing: attn.c_proj and mlp.c_proj of a model become 0."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("c_proj.weight"):
                p.zero_()


class Muon(torch.optim.Optimizer):
    """Muon for the blocks' matrices, AdamW (eps 1e-8) for embeddings, biases and gains.

    Ranks that have the same rows of a parameter must have the same gradient. Each rank gets a share of the
    matrices whole, orthogonalises them and gives all others their rows, so copies of a weight stay equal to the
    last bit. ``state`` holds, by parameter, ``momentum`` of the former and AdamW's ``exp_avg``, ``exp_avg_sq`` and
    ``step`` of the others; optim.start_moments makes it.

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
        kinds: dict[str, list[Tensor]] = {}
        for name, p in self.matrices.items():
            kinds.setdefault(name.split(".", 2)[2], []).append(p)
        for kind, matrices in kinds.items():
            at_once = max(BATCH // matrices[0].numel(), 1) * self.ranks.world_size
            for first in range(0, len(matrices), at_once):
                self._move(matrices[first : first + at_once], 3 if "c_attn" in kind else 1)
        self.adamw.step()

    def _ahead(self, p: Tensor) -> Tensor:
        """Update the momentum; this rank's rows of the gradient that Nesterov's method takes."""
        assert p.grad is not None
        momentum = local(self.state[p]["momentum"]).lerp_(local(p.grad), 1 - MOMENTUM)
        return torch.lerp(local(p.grad), momentum, MOMENTUM)

    def _move(self, matrices: list[Tensor], apart: int) -> None:
        """Move parameters of one kind, each of which is ``apart`` matrices stacked."""
        rate, decay = (self.param_groups[0][key] for key in ("lr", "weight_decay"))
        outputs, inputs = matrices[0].size(0) / apart, matrices[0].size(1)
        with self.ranks.meeting():
            moves = move_of(deal_out(matrices[0], [self._ahead(p) for p in matrices]), apart)
            for p, move in zip(matrices, deal_back(matrices[0], moves, len(matrices)), strict=True):
                mine = local(p).mul_(1 - rate * decay)
                mine.add_(move, alpha=-rate * math.sqrt(max(1, outputs / inputs)))
