"""Partial scores survive what kills the process that makes them, and belong to one scoring only."""

from dataclasses import replace

import pytest
import torch
from questions import CONFIG, make_model

from aymen_gpt.evaluation.partial import PartialScores, key
from aymen_gpt.evaluation.scoring import EndingScores


def scores(i):
    return EndingScores([-0.1 * i, -1 / 3, -2e-17, -1e3], [i, 1, 2, 3])


def test_scores_come_back_to_the_last_bit(tmp_path):
    kept = PartialScores(tmp_path)
    kept.add("completion", {i: scores(i) for i in (4, 2)})
    kept.add("harness", {0: scores(0)})
    again = PartialScores(tmp_path, resume=True)
    assert again.known("completion") == {4: scores(4), 2: scores(2)}
    assert again.known("harness") == {0: scores(0)}
    assert again.n_known == 3


def test_without_resume_it_begins_anew(tmp_path):
    PartialScores(tmp_path).add("harness", {0: scores(0)})
    assert PartialScores(tmp_path).n_known == 0
    assert PartialScores(tmp_path, resume=True).n_known == 0


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_line_costs_one_example(tmp_path, cut):
    kept = PartialScores(tmp_path)
    for i in range(3):
        kept.add("harness", {i: scores(i)})
    file = tmp_path / "rank-0.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    again = PartialScores(tmp_path, resume=True)
    assert again.known("harness").keys() == ({0, 1, 2} if cut == 1 else {0, 1})
    again.add("harness", {2: scores(2)})
    third = PartialScores(tmp_path, resume=True)
    assert third.known("harness") == {i: scores(i) for i in range(3)}


def test_another_number_of_ranks_finds_what_these_left(tmp_path):
    for rank in range(2):  # the example with index i among all is i // 2 on rank i % 2
        PartialScores(tmp_path, rank=rank, world_size=2).add("harness", {0: scores(rank), 1: scores(2 + rank)})
    for world_size in (1, 3):
        for rank in range(world_size):
            known = PartialScores(tmp_path, rank=rank, world_size=world_size, resume=True).known("harness")
            assert known == {i // world_size: scores(i) for i in range(rank, 4, world_size)}


def test_a_disk_that_takes_nothing_costs_a_warning_and_no_scores(disk):
    folder = disk("40k") / "x"
    kept = PartialScores(folder)
    with pytest.warns(UserWarning, match=r"partial scores are not kept: cannot write .*No space left"):
        kept.add("harness", {i: scores(i) for i in range(1000)})
    kept.add("harness", {0: scores(0)})
    assert 0 < PartialScores(folder, resume=True).n_known < 1000


def test_a_folder_that_cannot_be_made_costs_a_warning(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=r"cannot write .*file/x: Not a directory"):
        kept = PartialScores(tmp_path / "file" / "x")
    kept.add("harness", {0: scores(0)})
    kept.discard()


def test_no_folder_keeps_nothing():
    kept = PartialScores()
    kept.add("harness", {0: scores(0)})
    kept.discard()
    assert kept.known("harness") == {}


def test_the_key_is_that_of_everything_the_scores_follow_from():
    model = make_model()
    other = make_model()
    assert key(model, torch.float32, "a") == key(other, torch.float32, "a")
    with torch.no_grad():
        other.h[0].mlp.c_fc.bias[0] += 1e-7
    keys = [key(model, torch.float32, "a"), key(model, torch.float32, "b"), key(model, torch.bfloat16, "a")]
    keys.append(key(other, torch.float32, "a"))
    keys.append(key(make_model(replace(CONFIG, n_head=1)), torch.float32, "a"))
    assert len(set(keys)) == len(keys)


def test_discarding_leaves_nothing(tmp_path):
    kept = PartialScores(tmp_path / "x")
    kept.add("harness", {0: scores(0)})
    kept.discard()
    assert list(tmp_path.iterdir()) == []
