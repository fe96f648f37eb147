"""The faults that training survives, as real processes meet them: kills, signals, dead ranks, full disks."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, door_command
from safetensors.torch import load_file
from training_runs import TINY, rows, start, wait_for_step

from aymen_gpt.errors import AymenError
from aymen_gpt.model.folders import checkpoints, latest_valid, problem
from aymen_gpt.training import distributed
from aymen_gpt.training.runlog import RunLog
from aymen_gpt.training.trackers import tracker

pytestmark = pytest.mark.slow

SMALL = [*TINY, "--val-every", 20, "--micro-batch", 2]
SAVE, FILES = "aymen_gpt.training.checkpoint", "aymen_gpt.training.tensor_files"


def same_run(one, other):
    """Same rows of metrics, and the same bits in the last weights and moments."""
    assert rows(one) == rows(other)
    last, others = checkpoints(one)[0], checkpoints(other)[0]
    assert last.name == others.name
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (last / name).read_bytes() == (others / name).read_bytes(), name


def status(run):
    return json.loads((run / "status.json").read_text())


def ended(done, code):
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.fault(1, 2, 7, 11, 25)
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("processes", "shard", "kills"),
    [(None, 1, 5), (3, 1, 2), *(pytest.param(3, *more, marks=pytest.mark.long) for more in ((1, 5), (3, 2)))],
)
def test_kills_change_no_bit(door, shards, tmp_path, processes, shard, kills):
    """40 steps at once, and 40 with attempts that are killed, some inside a save, on one rank of all."""
    words = ["pretrain.py", *SMALL, "--data", shards, "--steps", 40, "--shard", shard, "--run-dir"]
    ended(door(*words, "whole", processes=processes), 0)
    draw = random.Random(processes or 1)
    points = [f"after:3:{FILES}:save_file", f"after:2:{SAVE}:_write_manifest", f"before:2:{SAVE}:_drop_old"]
    points.append(f"after:{draw.randint(3, 9)}:aymen_gpt.training.optim:set_learning_rate")
    points.append(f"before:{draw.randint(3, 9)}:aymen_gpt.training.optim:clip_gradients")
    if shard == 3:  # the second rank writes the optimizer's file, the first one the model's
        points = [f"before:2:{FILES}:save_file", points[2]]
    for point in draw.sample(points, kills):
        rank = 0 if SAVE in point else (shard == 3) if FILES in point else draw.randrange(processes or 1)
        where = [f"RANK={int(rank)}"] if processes else []
        killed = door("tests/crashes.py", point, *where, *words, "parts", processes=processes)
        assert killed.returncode == (1 if processes else 137), (point, killed.stderr)
        assert not any(problem(folder) for folder in checkpoints(tmp_path / "parts"))
        assert (tmp_path / "parts/.lock").read_text().startswith("pid ")  # which the next one takes over
    again = ended(door(*words, "parts", processes=processes), 0)
    assert "resuming from step" in again.stderr
    same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.fault(10, 11)
def test_the_number_of_ranks_may_change_at_every_resume(door, call, shards, tmp_path):
    """15 steps on one process, and on 2, then 1, then 3 ranks, the first two of which are killed."""
    words = ["pretrain.py", *SMALL, "--data", shards, "--steps", 15, "--run-dir"]
    ended(call(*words, "whole"), 0)
    point = "before:8:aymen_gpt.training.optim:set_learning_rate"
    ended(door("tests/crashes.py", point, "RANK=0", *words, "parts", processes=2), 1)
    second = ended(door("tests/crashes.py", point, *words, "parts"), 137)
    third = ended(door(*words, "parts", processes=3), 0)
    assert "resuming from step 5\nchanged since then: world_size 2 -> 1, same data order" in second.stderr
    assert "resuming from step 10\nchanged since then: world_size 1 -> 3, same data order" in third.stderr
    for one, other in zip(rows(tmp_path / "whole"), rows(tmp_path / "parts"), strict=True):
        assert one["step"] == other["step"]
        for key in ("loss", "val_loss", "grad_norm"):
            assert other.get(key, 0) == pytest.approx(one.get(key, 0), abs=1e-5)


@pytest.mark.fault(4, 5, 11)
@pytest.mark.parametrize("only_one", [False, True])
def test_a_signal_to_any_rank_stops_all_at_the_same_step(door, shards, tmp_path, only_one):
    """To torchrun, which passes it on to all; and to one rank alone."""
    words = [*SMALL, "--data", shards, "--steps", 2000, "--run-dir", "run"]
    process = start(tmp_path, *words, processes=2)
    wait_for_step(tmp_path / "run", 3, process)
    began = time.monotonic()
    os.kill(rank_pids(process)[1] if only_one else process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    found = status(tmp_path / "run")
    assert (found["state"], process.returncode) == ("stopped", 1)  # torchrun's own code
    name = "another rank's signal" if only_one else "SIGTERM"
    assert found["message"].startswith(f"stopped by {name} at step {found['step']} of 2000 and saved")
    assert checkpoints(tmp_path / "run")[0].name == f"step-{found['step']:09d}"
    assert rows(tmp_path / "run")[-1]["step"] == found["step"]


def rank_pids(torchrun):
    """The processes of torchrun's ranks, in order of rank."""
    found = {}
    for pid in subprocess.run(["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True).stdout.split():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks = [int(v.removeprefix(b"RANK=")) for v in variables if v.startswith(b"RANK=")]
        found |= {rank: int(pid) for rank in ranks}
    return [found[rank] for rank in sorted(found)]


@pytest.mark.fault(6)
def test_one_interrupt_saves_and_two_end_at_once(door, shards, tmp_path):
    words = [*SMALL, "--data", shards, "--steps", 2000, "--run-dir", "run"]
    process = start(tmp_path, *words)
    wait_for_step(tmp_path / "run", 7, process)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75, told
    saved = checkpoints(tmp_path / "run")[0]
    assert f"stopped by SIGINT at step {int(saved.name[5:])} of 2000 and saved" in told

    blocked = "import time, aymen_gpt.training.optim as o; o.clip_gradients = lambda *a: time.sleep(600)"
    slow = [sys.executable, "-c", f"{blocked}; import runpy, sys; sys.argv[0] = 'pretrain.py'; "
            f"runpy.run_path({str(ROOT / 'pretrain.py')!r}, run_name='__main__')"]  # fmt: skip
    process = subprocess.Popen([*slow, *map(str, words)], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while "resuming" not in process.stderr.readline():
        pass
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None  # it waits for its step to end
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=5)
    assert process.returncode == 130
    assert "stopped at once; the newest checkpoint is as it was" in told
    assert latest_valid(tmp_path / "run") == (tmp_path / "run/checkpoints" / saved.name, [])


@pytest.mark.fault(7)
@pytest.mark.parametrize("call", ["19:aymen_gpt.model.gpt:Block.forward", f"100:{FILES}:gather_to"])
def test_the_death_of_a_rank_ends_the_others_who_name_it_alone(door, shards, tmp_path, call):
    """Two copies of a model in two parts each; the rank dies between two blocks of step 7, or in a save."""
    words = ["pretrain.py", *SMALL, "--data", shards, "--steps", 12, "--shard", 2, "--run-dir", "run"]
    began = time.monotonic()
    done = ended(door("tests/crashes.py", f"before:{call}", "RANK=1", *words, processes=4), 1)
    assert time.monotonic() - began < 60
    name = "error: rank 1 did not answer: dead or hanging; run the same command again to continue"
    told = re.findall(f"^.*{name}", done.stderr, re.MULTILINE)
    assert sorted(told) == [name, f"rank 2: {name}", f"rank 3: {name}"]
    assert latest_valid(tmp_path / "run")[0].name == "step-000000005"
    assert (status(tmp_path / "run")["state"], status(tmp_path / "run")["message"][:6]) == ("failed", "rank 1")


@pytest.mark.fault(8)
def test_a_rank_that_hangs_is_named_after_the_timeout(shards, tmp_path):
    """As above: between two blocks."""
    point = "stop:19:aymen_gpt.model.gpt:Block.forward"
    words = [*SMALL, "--data", shards, "--steps", 12, "--shard", 2, "--timeout", 5, "--run-dir", "run"]
    command = door_command("tests/crashes.py", point, "RANK=1", "pretrain.py", *words, processes=4)
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path / "run", 6, process)
    hanging, told = rank_pids(process)[1], ""
    try:
        while told.count("error: rank 1 did not answer: dead or hanging") < 3:
            told += (line := process.stderr.readline())
            assert line, told
    finally:
        os.kill(hanging, signal.SIGKILL)  # torchrun would, after half a minute
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert latest_valid(tmp_path / "run")[0].name == "step-000000005"


@pytest.mark.fault(8)
@pytest.mark.parametrize("arrivals", [(5, 4, 5), (5, 5, 5), (5, 4, 4)])
def test_a_rank_is_named_wherever_it_hangs_and_no_other(monkeypatch, arrivals):
    """Rank 1 does not come to a collective, or hangs in it, with rank 0 in the same one or in the next."""
    monkeypatch.setattr(distributed, "PATIENCE", 0.5)
    store = dist.HashStore()
    ranks = [distributed.Ranks(r, 3, store=store, arrivals=n - 1) for r, n in enumerate(arrivals)]
    store.set("1", str(arrivals[1]))

    def wait_in_vain(one):
        with (
            pytest.raises(AymenError, match="^rank 1 did not answer: dead or hanging; .*Timed out"),
            one.meeting(),
        ):
            raise RuntimeError("Timed out waiting")

    with ThreadPoolExecutor() as pool:
        list(pool.map(wait_in_vain, (ranks[0], ranks[2])))


def test_one_process_has_nobody_to_name():
    with pytest.raises(RuntimeError, match="^Connection refused$"), distributed.Ranks().meeting():
        raise RuntimeError("Connection refused")


class Queued:
    """A collective as NCCL's are to the host: begun and waited for at once, done when the GPU is done with it."""

    def __init__(self, polls):
        self.polls = polls

    def is_completed(self):
        self.polls -= 1
        return self.polls < 0

    def wait(self):
        pass


def gpu_ranks(monkeypatch, polls, timeout):
    monkeypatch.setattr(distributed, "PATIENCE", 0.3)
    monkeypatch.setattr(dist, "all_reduce", lambda values, async_op: Queued(polls))
    store = dist.HashStore()
    return [distributed.Ranks(rank, 2, store=store, timeout=timeout, queued=True) for rank in range(2)]


@pytest.mark.fault(8)
def test_on_nccl_a_sum_ends_when_the_gpu_has_it_and_a_rank_that_does_not_come_is_named(monkeypatch):
    ours, _ = gpu_ranks(monkeypatch, polls=20, timeout=60)
    assert ours.sum(torch.ones(1)).item() == 1.0
    ours, _ = gpu_ranks(monkeypatch, polls=10**9, timeout=0.5)
    with pytest.raises(AymenError, match=r"^rank 1 did not answer: dead or hanging; .*\(nothing for 0.5 s\)"):
        ours.sum(torch.ones(1))


@pytest.mark.fault(7)
def test_on_nccl_a_rank_that_fails_ends_the_others_with_its_words(monkeypatch):
    ours, other = gpu_ranks(monkeypatch, polls=10**9, timeout=600)
    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(ours.sum, torch.ones(1))
        other.say_failed("out of memory in step 3")
        other.say_failed("the sum cannot be finished")  # which says nothing new
        with pytest.raises(
            AymenError, match="^rank 1 failed: out of memory in step 3; run the same command again"
        ):
            waiting.result(timeout=30)
    assert time.monotonic() - began < 30  # of 600


@pytest.mark.fault(7)
@pytest.mark.parametrize("error", [AymenError("runs/x is in use"), KeyError("x")])
def test_a_rank_that_fails_takes_no_leave_that_waits_for_the_others(monkeypatch, error):
    left, store = [], dist.HashStore()
    monkeypatch.setattr(distributed, "rendezvous", lambda *a, **k: iter([(store, 0, 2)]))
    monkeypatch.setattr(distributed, "meet", lambda store, *a: store)
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append("destroyed"))
    ours = distributed.Ranks(0, 2)
    with pytest.raises(type(error)), distributed.process_group(ours, torch.device("cpu")):
        raise error
    assert left == []
    told = distributed.Ranks(1, 2, store=ours.store)._failures()
    assert told == {"0": str(error)}
    with distributed.process_group(distributed.Ranks(0, 2), torch.device("cpu")):
        pass
    assert left == ["destroyed"]


@pytest.mark.fault(7)
def test_a_bug_on_one_rank_is_told_at_once_and_ends_the_others(door, shards, tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(
        "import os, runpy\n"
        "from aymen_gpt.training import optim\n"
        "honest = optim.learning_rate\n"
        "def learning_rate(step, **more):\n"
        "    assert step < 7 or os.environ['RANK'] != '1', 'planted'\n"
        "    return honest(step, **more)\n"
        "optim.learning_rate = learning_rate\n"
        f"runpy.run_path({str(ROOT / 'pretrain.py')!r}, run_name='__main__')\n"
    )
    words = [*SMALL, "--data", shards, "--steps", 12, "--run-dir", "run"]
    began = time.monotonic()
    done = ended(door(script, *words, processes=2), 1)
    assert time.monotonic() - began < 60
    assert "AssertionError: planted" in done.stderr
    assert "error: rank 1 failed: planted; run the same command again to continue" in done.stderr


@pytest.mark.fault(9)
def test_torchruns_own_restart_continues_the_run(door, shards, tmp_path):
    words = [ROOT / "pretrain.py", *SMALL, "--data", shards, "--steps", 12, "--run-dir", "run"]
    point = "before:8:aymen_gpt.training.optim:set_learning_rate"
    torchrun = door_command("tests/crashes.py", point, "TORCHELASTIC_RESTART_COUNT=0", *words, processes=2)
    torchrun.insert(torchrun.index("--standalone"), "--max-restarts=1")
    done = subprocess.run(torchrun, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 5" in done.stderr
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(13))


@pytest.mark.fault(27)
def test_a_loss_that_is_nan_on_one_rank_is_skipped_by_all(door, shards, tmp_path):
    """The weights of both ranks are compared after the run."""
    script = tmp_path / "poisoned.py"
    script.write_text(
        "import os, runpy, torch\n"
        "from aymen_gpt.training.trainer import Trainer\n"
        "honest = Trainer.train_step\n"
        "def train_step(self, step, batches, *flags):\n"
        "    if step != 2 or self.ranks.rank != 1:\n"
        "        return honest(self, step, batches, *flags)\n"
        "    honest_loss, self.batch_loss = self.batch_loss, lambda t: honest_loss(t) * float('nan')\n"
        "    found = honest(self, step, batches, *flags)\n"
        "    del self.batch_loss\n"
        "    return found\n"
        "Trainer.train_step = train_step\n"
        "fit = Trainer.fit\n"
        "def fit_and_keep(self, *args):\n"
        "    fit(self, *args)\n"
        "    torch.save([p.to_local() for p in self.named.values()], f'weights-{self.ranks.rank}.pt')\n"
        "Trainer.fit = fit_and_keep\n"
        f"runpy.run_path({str(ROOT / 'pretrain.py')!r}, run_name='__main__')\n"
    )
    done = ended(door(script, *SMALL, "--data", shards, "--steps", 5, "--run-dir", "run", processes=2), 0)
    row = rows(tmp_path / "run")[3]
    assert (row["skipped"], row["loss"]) == ("non-finite loss", None)
    assert 0 < len(row["documents"]) < 8  # of rank 1's four rows
    assert "warning: non-finite loss at step 3" in done.stderr
    one, two = (torch.load(tmp_path / f"weights-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))
    assert all(torch.isfinite(p).all() for p in one)


@pytest.mark.fault(17)
def test_a_run_whose_checkpoints_are_all_damaged_lists_why(call, shards, tmp_path):
    run = tmp_path / "run"
    words = ["pretrain.py", *SMALL, "--data", shards, "--steps", 10, "--run-dir", "run"]
    ended(call(*words), 0)
    for folder in checkpoints(run):
        (folder / "model.safetensors").write_bytes(b"")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    done = ended(call(*words), 65)
    for step in (10, 5):
        assert re.search(f"step-{step:09d}: model.safetensors is 0 bytes, its manifest says", done.stderr)
    assert "--resume none" in done.stderr
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"} == before
    ended(call(*words, "--resume", "none"), 0)
    assert (run / "earlier-1/checkpoints/step-000000010/optimizer.safetensors").exists()


@pytest.mark.fault(21)
def test_a_disk_full_while_saving_does_not_stop_training_until_the_third_time(call, shards, disk):
    """A checkpoint of the tiny preset takes 23 MB: two fit on the disk, the third does not."""
    folder = disk("50m")
    words = ["pretrain.py", *SMALL, "--data", shards, "--keep-last", 9, "--run-dir", folder / "run"]
    done = ended(call(*words, "--steps", 40), 73)
    warned = re.findall(r"warning: cannot save step (\d+) in .*: no space left on the disk "
                        r"\(needs 0.0\d+ GB, 0.0\d+ GB free\); training goes on", done.stderr)  # fmt: skip
    assert warned == ["15", "20", "25"]
    assert re.search(r"error: cannot save step 25 in .*; make room, then run the same command again", done.stderr)
    assert [int(p.name[5:]) for p in checkpoints(folder / "run")] == [10, 5]
    assert not any(problem(p) for p in checkpoints(folder / "run"))
    disk("400m")
    assert "resuming from step 10" in ended(call(*words, "--steps", 20), 0).stderr


@pytest.mark.fault(23)
def test_a_disk_full_for_the_log_keeps_its_lines_in_memory(disk, tmp_path, capsys):
    folder = disk("64k")
    with RunLog(folder / "run", 500) as log:
        log.start({"started": "now"}, None)
        for step in range(1, 401):
            if step == 300:
                assert len(logged_steps(folder)) < 299  # the disk was full long before
                disk("2m")
            log.write({"step": step, "loss": 5.0, "lr": 1e-3, "grad_norm": 1.0, "step_seconds": 0.5,
                       "tokens_per_second": 1.0, "note": "x" * 300})  # fmt: skip
    assert logged_steps(folder) == list(range(1, 401))
    assert capsys.readouterr().err.count("warning: cannot write") == 1


def logged_steps(folder):
    return [json.loads(line)["step"] for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


@pytest.mark.fault(24)
def test_a_run_folder_that_cannot_be_written_is_refused_before_all_else(call, disk):
    folder = disk("ro")
    done = ended(call("pretrain.py", *SMALL, "--data", "nowhere", "--run-dir", folder / "run"), 73)
    assert re.fullmatch(
        r"error: cannot write into .*run: Read-only file system; choose another .*--run-dir\n", done.stderr
    )


@pytest.mark.fault(54)
def test_secrets_are_in_nothing_that_is_written(door, shards, tmp_path):
    secrets = {"HF_TOKEN": "hf_canary_12345", "WANDB_API_KEY": "wandb_canary_12345"}
    canary = "https://user:canary_password@example.org/x"
    fake = tmp_path / "wandb.py"
    fake.write_text(
        "import json, types\n"
        "def init(**config):\n"
        "    open('wandb-config.json', 'w').write(json.dumps(config, default=str))\n"
        "    return types.SimpleNamespace(log=lambda *a, **k: None)\n"
    )
    words = [*SMALL, "--data", shards, "--steps", 6, "--run-dir", "run", "--track", "wandb", "--init-from", canary]
    failed = door("pretrain.py", *words, **secrets)
    assert failed.returncode == 65
    done = door("pretrain.py", *words[:-2], **secrets, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "wandb-config.json").exists()
    fake.unlink()
    texts = [failed.stdout, failed.stderr, done.stdout, done.stderr]
    texts += [p.read_bytes().decode(errors="replace") for p in tmp_path.rglob("*") if p.is_file()]
    for text in texts:
        assert "canary" not in text


@pytest.mark.fault(55)
@pytest.mark.parametrize(
    ("error", "why"),
    [(ConnectionError("the server is down"), "ConnectionError: the server is down"),
     (ImportError("no"), "pip install wandb")],
)  # fmt: skip
def test_a_tracker_that_fails_is_told_once_and_harms_nothing(monkeypatch, tmp_path, error, why):
    def init(**config):
        raise error

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with (
        warnings.catch_warnings(record=True) as told,
        RunLog(tmp_path, 2, track=tracker("wandb", tmp_path, {})) as log,
    ):
        log.start({}, None)
        for step in (1, 2):
            log.write({"step": step, "val_loss": 5.0})
    assert [str(w.message) for w in told] == [f"--track wandb does not work ({why}); training goes on without it"]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


@pytest.mark.fault(58)
def test_a_folder_with_spaces_and_unicode(call, shards, tmp_path):
    run = tmp_path / "a b é 深"
    ended(call("pretrain.py", *SMALL, "--data", shards, "--steps", 3, "--run-dir", run), 0)
    assert load_file(checkpoints(run)[0] / "model.safetensors")
    ended(call("generate.py", "-m", run, "Hello", "--max-tokens", 3), 0)
