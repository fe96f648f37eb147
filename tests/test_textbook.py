"""The training step takes its short cuts without changing what is learned: 50 steps beside the textbook's."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_shards

from aymen_gpt.commands.pretrain import build
from aymen_gpt.model.gpt import GPT
from aymen_gpt.training.config import resolve
from aymen_gpt.training.device import choose_device
from aymen_gpt.training.distributed import Ranks
from aymen_gpt.training.optim import learning_rate

pytestmark = pytest.mark.slow

STEPS = 50


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


def textbook_losses(c, batches, dtype):
    """Whole logits, F.cross_entropy, AdamW one parameter at a time, all by autograd; no code of the trainer."""
    model = GPT(c.model, torch.Generator().manual_seed(c.seed))
    groups = [
        {"params": [p for p in model.parameters() if (p.dim() >= 2) == decayed], "weight_decay": decay}
        for decayed, decay in ((True, c.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(c.beta1, c.beta2), eps=1e-8, foreach=False, fused=False)
    losses = []
    for step, tokens in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, peak=c.learning_rate, warmup_steps=c.warmup_steps, steps=c.steps, min_ratio=c.min_lr_ratio
            )
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("dtype", "near"), [("float32", 2e-5), ("bfloat16", 5e-3)])
def test_fifty_steps_have_the_losses_of_the_textbook(shards, dtype, near):
    given = {"preset": "tiny", "data": str(shards), "steps": STEPS, "warmup_steps": 5, "learning_rate": 3e-3}
    c = resolve(given | {"dtype": dtype, "tokens_per_step": 512, "micro_batch": 3, "hellaswag_every": 0})
    device = choose_device("cpu", dtype)
    trainer = build(c, device, Ranks())
    steps = [trainer.batches_of(i) for i in range(trainer.config.steps)]
    ours = [trainer.train_step(i, batches)[0]["loss"] for i, batches in enumerate(steps)]
    theirs = textbook_losses(c, [torch.cat(batches) for batches in steps], device.dtype)
    assert ours[0] - ours[-1] > 1  # they learned
    assert ours == pytest.approx(theirs, abs=near)
