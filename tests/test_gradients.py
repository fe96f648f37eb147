"""Gradients are summed over ranks in buckets, while backward goes on."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from aymen_gpt.errors import AymenError
from aymen_gpt.training import distributed
from aymen_gpt.training.distributed import Ranks
from aymen_gpt.training.gradients import GradientSum

WORLD = 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))


def data(rank):
    return torch.randn(4 + rank, 8, generator=torch.Generator().manual_seed(rank))


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def rank_main(rank, folder, check):
    ranks = Ranks(rank, WORLD)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    check(ranks)
    dist.destroy_process_group()


def on_ranks(check, folder):
    torch.multiprocessing.spawn(rank_main, (folder, check), nprocs=WORLD)


def check_sums(ranks):
    """Two steps with unlike numbers of micro-batches against one process that has all rows."""
    torch.set_num_threads(1)
    model, alone = network(), network()
    total = GradientSum(ranks, list(model.parameters()), bucket_bytes=600)
    assert len(total.buckets) == 3  # of five layers of 288 bytes
    for _ in range(2):
        micro = [row for row in data(ranks.rank).split(2)]
        for number, rows in enumerate(micro, 1):
            if number == len(micro):
                total.coming()
            model(rows).square().sum().backward()
        total.complete()
        alone.zero_grad()
        for rank in range(WORLD):
            alone(data(rank)).square().sum().backward()
        for ours, whole in zip(gradients(model), gradients(alone), strict=True):
            torch.testing.assert_close(ours, whole)
        first = gradients(model)
        total.clear()
        assert all(not grad.any() for grad in gradients(model))
    assert len(first) == 10


@pytest.mark.slow
def test_every_rank_gets_the_sum_of_all(tmp_path):
    on_ranks(check_sums, tmp_path)


def check_a_parameter_without_gradient(ranks):
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    total = GradientSum(ranks, list(model.parameters()), bucket_bytes=1)
    total.coming()
    model[0](torch.ones(1, 2)).sum().backward()
    total.complete()
    assert model[0].bias.grad.tolist() == [WORLD, WORLD]
    assert model[1].bias.grad.tolist() == [0, 0]


@pytest.mark.slow
def test_what_the_loss_does_not_depend_on_holds_nothing_up(tmp_path):
    on_ranks(check_a_parameter_without_gradient, tmp_path)


class Work:
    def wait(self):
        pass


@pytest.fixture
def sums(monkeypatch):
    """The sums that were begun, by the number of values in them."""
    begun = []
    monkeypatch.setattr(dist, "all_reduce", lambda t, **_: begun.append(t.numel()) or Work())
    return begun


def test_sums_begin_while_backward_is_at_work(sums):
    model = network()
    total = GradientSum(Ranks(0, 2), list(model.parameters()), bucket_bytes=288)
    seen = []
    model[0].weight.register_hook(lambda _: seen.extend(sums))  # the last gradient that backward makes
    model(data(0)).square().sum().backward()
    assert sums == []  # a micro-batch that is not the last
    total.coming()
    model(data(0)).square().sum().backward()
    assert len(seen) >= 4
    total.complete()
    assert sums == [72] * 5


def test_passes_between_steps_sum_nothing(sums):
    """As when the micro-batch is fitted to the memory."""
    model = network()
    total = GradientSum(Ranks(0, 2), list(model.parameters()))
    total.coming()
    model(data(0)).sum().backward()
    total.complete()
    total.clear()
    model(data(0)).sum().backward()
    assert len(sums) == 1


def test_alone_gradients_are_autograds_own():
    model, plain = network(), network()
    total = GradientSum(Ranks(), list(model.parameters()))
    total.coming()
    for m in (model, plain):
        m(data(0)).square().sum().backward()
    total.complete()
    assert all(a.equal(b) for a, b in zip(gradients(model), gradients(plain), strict=True))
    total.clear()
    assert all(p.grad is None for p in model.parameters())


def test_a_lost_rank_is_an_error_of_ours_after_backward(monkeypatch):
    def lost(*_args, **_options):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dist, "all_reduce", lost)
    monkeypatch.setattr(distributed, "PATIENCE", 0.1)
    model = network()
    total = GradientSum(Ranks(0, 2), list(model.parameters()), bucket_bytes=288)
    total.coming()
    model(data(0)).sum().backward()
    with pytest.raises(AymenError, match="rank 1 did not answer.*Connection closed by peer"):
        total.complete()


def test_the_optimizer_reads_the_buckets(sums):
    model = network()
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    total = GradientSum(Ranks(0, 2), list(model.parameters()), bucket_bytes=288)
    total.coming()
    model(data(0)).square().sum().backward()
    total.complete()
    optimizer.step()
    assert total.buckets[0].abs().sum() > 0
    for new, old, grad in zip(model.parameters(), before.parameters(), gradients(model), strict=True):
        torch.testing.assert_close(new, old - grad)
