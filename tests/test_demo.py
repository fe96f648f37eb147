"""make demo: what is done already."""

import os

from run_folders import write_run

from aymen_gpt.commands import demo


def test_a_second_demo_does_not_stop_and_leaves_no_stage_empty(tmp_path, monkeypatch, capsys):
    score = {"step": 1000, "n": 1000, "completion": {"acc_norm": 0.25, "acc_norm_stderr": 0.01}}
    run = write_run(tmp_path / "run", [{"step": demo.CONFIG.steps, "val_loss": 5.0}], hellaswag=score)
    checkpoint = run / "checkpoints" / "step-000001000"
    checkpoint.mkdir(parents=True)
    os.utime(checkpoint, (2**31, 2**31))  # its card was renewed after the score
    monkeypatch.setattr(demo, "RUN", run)
    monkeypatch.setattr(demo, "call", lambda *words: print("$", *words))
    demo.main()
    stages = capsys.readouterr().out.split("===")[1:]
    assert len(stages) == 5
    assert all(len(stage.strip().splitlines()) > 1 for stage in stages)
    assert f"{demo.CONFIG.steps} of them done before" in stages[1]
    assert "stopped" not in stages[1]
    assert "already scored" in stages[2]
