"""Muon: torch's own arithmetic, matrices apart, the same update on any ranks, and runs that survive kill -9."""

import math
import os
import socket
import sys
import traceback
from dataclasses import replace

import crashes
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from training_runs import rows

from aymen_gpt.commands import options
from aymen_gpt.commands import pretrain as command
from aymen_gpt.errors import AymenError
from aymen_gpt.model.folders import checkpoints
from aymen_gpt.model.gpt import GPT, GPTConfig
from aymen_gpt.model.huggingface import load_pretrained
from aymen_gpt.training import optim, sharding
from aymen_gpt.training.distributed import Ranks
from aymen_gpt.training.muon import Muon, flops, is_matrix, move_of

CONFIG = GPTConfig(block_size=8, vocab_size=100, n_layer=2, n_head=2, n_embd=20)
RATES = {"lr": 1e-2, "matrix_rate": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1}


def model_and_optimizer(ranks=None):
    model = GPT(CONFIG, torch.Generator().manual_seed(0))
    optimizer = Muon(model, ranks or Ranks(), **RATES)
    optim.start_moments(model, optimizer)
    return model, optimizer


def give_gradients(model, seed):
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g) * 0.1


@pytest.mark.parametrize(("products", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_each_matrix_moves_as_torchs_muon_moves_it(monkeypatch, products, tolerance):
    """Six steps; torch's own has its products in bfloat16 unless it is kept from it."""
    if products == "float32":
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda t: t.clone())
    model, optimizer = model_and_optimizer()
    twins = {
        name: [torch.nn.Parameter(piece.clone()) for piece in whole_pieces(name, p.detach())]
        for name, p in model.named_parameters()
        if is_matrix(name)
    }
    theirs = torch.optim.Muon([t for many in twins.values() for t in many], lr=0.02, weight_decay=0.1)
    for step in range(6):
        give_gradients(model, step)
        optim.set_learning_rate(optimizer, 1e-2 / (step + 1))
        theirs.param_groups[0]["lr"] = 0.02 / (step + 1)
        optimizer.step()
        for name, p in model.named_parameters():
            for twin, grad in zip(twins.get(name, []), whole_pieces(name, p.grad), strict=False):
                twin.grad = grad.clone()
        theirs.step()
        for name, many in twins.items():
            for ours, twin in zip(whole_pieces(name, dict(model.named_parameters())[name]), many, strict=True):
                torch.testing.assert_close(ours, twin, rtol=0, atol=tolerance * 0.02)


def whole_pieces(name, t):
    """Queries, keys and values apart, by their places in GPT-2's c_attn; other matrices as they are."""
    C = CONFIG.n_embd
    return [t[:C], t[C : 2 * C], t[2 * C :]] if name.endswith("c_attn.weight") else [t]


def test_all_but_the_blocks_matrices_moves_as_adamw_moves_it():
    model, optimizer = model_and_optimizer()
    twin = GPT(CONFIG, torch.Generator().manual_seed(0))
    theirs = optim.adamw(twin, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(3):
        for m, o in ((model, optimizer), (twin, theirs)):
            give_gradients(m, step)
            optim.set_learning_rate(o, 1e-2 / (step + 1))
            o.step()
    same = {
        name for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True) if torch.equal(p, q)
    }
    assert same == {name for name, _ in model.named_parameters() if not is_matrix(name)}
    assert len(same) == 2 + 8 * CONFIG.n_layer + 2
    assert optim.updates(optimizer) == 3


def test_queries_keys_and_values_are_orthogonalised_apart():
    """Gradients of unlike sizes: one orthogonal matrix for all three would let the values' hide the queries'."""
    C = CONFIG.n_embd
    gradient = torch.randn(3 * C, C, generator=torch.Generator().manual_seed(1))
    gradient[:C] *= 1e-3
    model, optimizer = model_and_optimizer()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    c_attn = model.h[0].attn.c_attn.weight
    c_attn.grad.copy_(gradient)
    before = c_attn.detach().clone()
    optimizer.step()
    moved = ((1 - 0.02 * 0.1) * before - c_attn.detach()) / 0.02
    for i, part in enumerate(moved.split(C)):
        sizes = torch.linalg.svdvals(part)
        assert 0.3 < sizes.min() < sizes.max() < 1.3, i
        u, _, vh = torch.linalg.svd(gradient[i * C : (i + 1) * C])
        assert ((part * (u @ vh)).sum() / (part.norm() * math.sqrt(C))).item() > 0.95
    assert torch.equal(model.h[1].attn.c_attn.weight, (1 - 0.02 * 0.1) * twin_weight("h.1.attn.c_attn.weight"))


def twin_weight(name):
    return GPT(CONFIG, torch.Generator().manual_seed(0)).state_dict()[name]


def test_the_stated_flops_are_those_of_the_products():
    from torch.utils.flop_counter import FlopCounterMode

    model = GPT(CONFIG)
    with FlopCounterMode(display=False) as counter:
        for name, p in model.named_parameters():
            if is_matrix(name):
                move_of(p.detach()[None], 3 if "c_attn" in name else 1)
    assert counter.get_total_flops() == flops(CONFIG.n_layer, CONFIG.n_embd)


def on_ranks(world_size, work):
    """Exit codes of ``work(rank)`` in forked processes, which need no second to import torch."""
    children = []
    for rank in range(world_size):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                code = work(rank) or 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.parametrize(("world_size", "size"), [(2, 1), (3, 1), (2, 2), (3, 3), (4, 2)])
def test_any_number_of_ranks_makes_the_same_update(tmp_path, monkeypatch, world_size, size):
    """Each with a copy of the model, all with parts of one (20 rows for 3), or parts of two copies."""

    deep = replace(CONFIG, n_layer=5)  # some ranks get two matrices of a kind, others one

    def three_updates(ranks):
        model = sharding.new_model(deep, 0, size if ranks.world_size > 1 else 1, ranks, torch.device("cpu"))
        optimizer = Muon(model, ranks, **RATES)
        optim.start_moments(model, optimizer)
        twin = GPT(deep)
        for step in range(3):
            give_gradients(twin, step)
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                p.grad = torch.zeros_like(p)
                sharding.put(p.grad, q.grad)
            optimizer.step()
        return {name: sharding.total(p.detach()) for name, p in model.named_parameters()}

    def work(rank):
        meet = f"file://{tmp_path}/meet"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world_size)
        torch.save(three_updates(Ranks(rank, world_size)), tmp_path / f"{rank}.pt")
        dist.destroy_process_group()

    assert on_ranks(world_size, work) == [0] * world_size
    monkeypatch.setattr("aymen_gpt.training.muon.BATCH", 1)  # one matrix at a time
    alone = three_updates(Ranks())
    for rank in range(world_size):
        for name, t in torch.load(tmp_path / f"{rank}.pt").items():
            assert torch.equal(t, alone[name]) or (size > 1 and not is_matrix(name)), (rank, name)
            torch.testing.assert_close(t, alone[name])  # AdamW rounds the last rows of a part in another way


def pretrain(world_size, *words, dying=None):
    """Exit codes of pretrain.py on as many ranks, of which ``dying`` is (a rank, the point where it dies)."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]

    def work(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        if dying and dying[0] == rank:
            crashes.arm(dying[1])
        try:
            return command.main(options.pretrain().parse_args([*map(str, words)]))
        except AymenError as error:
            print(error, file=sys.stderr)
            return error.exit_code

    return on_ranks(world_size, work)


@pytest.mark.slow
@pytest.mark.fault(1, 7)
@pytest.mark.parametrize("world_size", [1, pytest.param(3, marks=pytest.mark.long)])
def test_a_run_killed_and_continued_is_the_run_left_alone(shards, tmp_path, capfd, world_size):
    words = ["--preset", "tiny", "--dtype", "float32", "--optimizer", "muon", "--micro-batch", 2, "--steps", 12]
    words += ["--checkpoint-every", 5, "--val-every", 6, "--data", shards, "--run-dir"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert pretrain(world_size, *words, whole) == [0] * world_size
    last = (world_size - 1, "before:8:aymen_gpt.training.optim:set_learning_rate")
    assert pretrain(world_size, *words, parts, dying=last) == [1] * (world_size - 1) + [crashes.CODE]
    assert pretrain(world_size, *words, parts) == [0] * world_size
    assert "resuming from step 5" in capfd.readouterr().err
    assert rows(parts) == rows(whole)
    (first, *_), (again, *_) = checkpoints(whole), checkpoints(parts)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
    stays_a_gpt2(first)
    assert pretrain(1, *words, whole, "--optimizer", "adamw") == [2]
    refused = "whole holds another run (optimizer muon -> adamw): choose a new --run-dir\n"
    assert refused in capfd.readouterr().err


def stays_a_gpt2(folder):
    """transformers opens the checkpoint, with our logits; the state is one tensor a matrix and two of the rest."""
    from transformers import AutoModelForCausalLM

    ours, idx = load_pretrained(folder), torch.arange(64)[None] * 700
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder)(idx).logits
        torch.testing.assert_close(ours(idx), theirs, rtol=0, atol=1e-4)
    state, weights = load_file(folder / "optimizer.safetensors"), load_file(folder / "model.safetensors")
    assert state["momentum.transformer.h.1.mlp.c_fc.weight"].norm() > 0
    assert len(state) == 8 + 2 * (len(weights) - 8)
