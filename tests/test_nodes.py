"""Several nodes: ranks find each other after restarts, and a run of two nodes survives that the network is cut."""

import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest
import torch.distributed as dist
from conftest import ROOT, make_shards
from training_runs import rows

from aymen_gpt.errors import AymenError
from aymen_gpt.training.distributed import meet


def meet_all(store, ranks, world_size, pause=0.0):
    """What each rank gets, started one after the other: the parts of the store they found, or their errors."""
    found = {}

    def one(rank):
        try:
            found[rank] = meet(store, rank, world_size, 2.0)
        except AymenError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
        time.sleep(pause)
    for thread in threads:
        thread.join()
    return found


@pytest.mark.fault(9)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_restarted_ranks_find_each_other_and_nothing_that_dead_ones_left(order):
    store = dist.HashStore()
    for start in range(3):
        parts = meet_all(store, order, 3, pause=0.15)
        parts[0].set("address", f"of start {start}")
        assert {part.get("address") for part in parts.values()} == {f"of start {start}".encode()}
        assert not parts[1].check(["of a rank"])
        parts[1].set("of a rank", "x")


@pytest.mark.slow
@pytest.mark.fault(7)
def test_ranks_that_never_come_are_named():
    store = dist.HashStore()
    meet_all(store, (0, 1, 2, 3), 4)  # an earlier start
    found = meet_all(store, (0, 2), 4)
    assert found[0] == "ranks 1, 3 did not come within 2 s: start all nodes"
    assert meet_all(store, (1,), 4)[1] == "rank 0 did not come within 2 s: start all nodes"


@pytest.fixture
def network():
    """Two network namespaces with a cable between them; ``cut`` pulls it out."""
    names = [f"aymen-{os.getpid()}-{node}" for node in (0, 1)]

    def ip(*words, node=None):
        inside = ["ip", "netns", "exec", names[node]] if node is not None else []
        return subprocess.run([*inside, "ip", *words], capture_output=True, text=True)

    if os.geteuid() or any(ip("netns", "add", name).returncode for name in names):
        pytest.skip("network namespaces need root and iproute2")
    try:
        made = ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "cable1", "netns", names[1])
        if made.returncode:
            pytest.skip(f"no pair of network devices here: {made.stderr.strip()}")
        for node in (0, 1):
            ip("link", "set", "lo", "up", node=node)
            ip("addr", "add", f"10.77.0.{node + 1}/24", "dev", f"cable{node}", node=node)
            ip("link", "set", f"cable{node}", "up", node=node)
        yield names, lambda state: ip("link", "set", "cable1", state, node=1)
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault(7, 8, 9)
@pytest.mark.timeout(600)
def test_a_run_of_two_nodes_goes_on_bit_for_bit_when_the_network_comes_back(network, tmp_path, door):
    """Each node holds one copy of the model, in two parts."""
    names, cut = network
    make_shards(tmp_path / "shards")
    options = [
        "--preset",
        "tiny",
        "--data",
        "shards",
        "--steps",
        "60",
        "--checkpoint-every",
        "10",
        "--val-every",
        "0",
    ]
    options += ["--dtype", "float32", "--device", "cpu", "--timeout", "6"]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=2",
        "--max-restarts=5",
    ]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29400", "--rdzv-id=test"]
    with ExitStack() as stack:
        nodes, logs = [], [tmp_path / f"log{node}" for node in (0, 1)]
        for node in (0, 1):
            place = [f"--rdzv-conf=is_host={1 - node}", f"--local-addr=10.77.0.{node + 1}"]
            command = ["ip", "netns", "exec", names[node], *torchrun, *place, ROOT / "pretrain.py"]
            log = stack.enter_context(logs[node].open("w"))
            process = subprocess.Popen(
                [*command, *options, "--shard", "node", "--run-dir", "run"],
                cwd=tmp_path,
                env=os.environ | {"GLOO_SOCKET_IFNAME": f"cable{node}", "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )
            stack.callback(process.kill)
            nodes.append(process)

        def until(condition):
            deadline = time.monotonic() + 200
            while not condition():
                assert time.monotonic() < deadline, [log.read_text()[-3000:] for log in logs]
                assert None in [process.poll() for process in nodes], [log.read_text()[-3000:] for log in logs]
                time.sleep(0.1)

        metrics = tmp_path / "run/metrics.jsonl"
        until(lambda: metrics.exists() and metrics.read_text().count("\n") > 14)
        cut("down")
        until(lambda: "error: ranks 2, 3 did not answer" in logs[0].read_text())
        cut("up")  # in time for torchrun on the other node, which needs the store of this one
        assert [process.wait(240) for process in nodes] == [0, 0], [log.read_text()[-3000:] for log in logs]
    assert "resuming from step" in logs[0].read_text()
    alone = door("pretrain.py", *options, "--shard", "2", "--run-dir", "alone", processes=4)
    assert alone.returncode == 0, alone.stderr
    assert rows(tmp_path / "run") == rows(tmp_path / "alone")


FAKES = {  # of Slurm's programs: both nodes are this machine
    "scontrol": '[ "$1" = show ] && echo localhost || echo "$@" >> requeued',
    "srun": """
        shift
        for node in 0 1; do SLURM_NODEID=$node "$@" & pids="$pids $!"; done
        trap 'kill -TERM $pids' TERM
        wait; wait $pids
    """,
}


@pytest.mark.slow
@pytest.mark.fault(4)
def test_the_slurm_script_saves_and_queues_itself_again_when_its_time_is_over(tmp_path):
    make_shards(tmp_path / "shards")
    (tmp_path / "bin").mkdir()
    for name, text in FAKES.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "pretrain.py").symlink_to(ROOT / "pretrain.py")
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    options = ["--preset", "tiny", "--data", "shards", "--run-dir", "run", "--device", "cpu", "--steps", "100000"]
    options += ["--val-every", "0"]
    command = ["bash", str(ROOT / "cluster/slurm.sbatch"), *options]
    metrics, log = tmp_path / "run/metrics.jsonl", tmp_path / "log"
    with log.open("w") as out:
        job = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=out)
        try:
            deadline = time.monotonic() + 120
            while not (metrics.exists() and metrics.read_text().count("\n") > 3):
                assert job.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            job.terminate()
            job.wait(120)
        finally:
            job.kill()
    steps = len(rows(tmp_path / "run")) - 1
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert sorted((tmp_path / "run/checkpoints").iterdir())[-1].name == f"step-{steps:09d}", log.read_text()
