"""What a bar and the log tell of a run."""

import json

import pytest

from dlm_kernels.denoiser import progress


def test_progress_tells_the_speed_and_the_time_left(tmp_path):
    """Both since the first step was through, which compiled: 6000 tokens and a fifth of the run in a minute."""
    with progress.Bar(tmp_path) as bar:
        bar({"step": 1, "loss": 3.0, "seconds": 5.0, "tokens": 100, "share": 0.05})
        bar({"step": 20, "loss": 2.0, "seconds": 65.0, "tokens": 6100, "share": 0.25})
    assert bar.bar.tasks[0].description == "step 20  loss 2.000  100 tokens/s  4 min left"
    assert bar.bar.tasks[0].completed == 0.25
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 20 and json.loads(line)["tokens_per_second"] == 100.0


def test_progress_tells_of_a_run_that_was_over(tmp_path):
    with progress.Bar(tmp_path) as bar:
        pass
    assert bar.bar.tasks[0].description == f"{tmp_path}: had all its steps; more of them, or minutes, go on"
    with pytest.raises(OSError), progress.Bar(tmp_path) as bar:
        raise OSError
    assert bar.bar.tasks[0].description == "compiling"


def test_a_log_holds_each_step_once(tmp_path):
    """A run that was killed after step 40 and goes on from a save at step 20; of one that never began there is no log."""
    with progress.Bar(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    for steps in ((20, 40), (21, 40, 60)):
        with progress.Bar(tmp_path) as bar:
            for step in steps:
                bar({"step": step, "loss": 3.0, "seconds": 5.0, "tokens": 100, "share": 0.05})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 8')
    with progress.Bar(tmp_path) as bar:
        bar({"step": 80, "loss": 3.0, "seconds": 5.0, "tokens": 100, "share": 0.05})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [20, 40, 60, 80]


@pytest.mark.parametrize("other", ['{"time": 1, "msg": "mine"}\n', '{"step": 5}\n', "not json\n", "[20]\n", "\x00\n", "mine"])
def test_the_log_of_another_program_stays(other, tmp_path):
    """And is refused before a step is made."""
    (tmp_path / "log.jsonl").write_text(other)
    with pytest.raises(ValueError, match="log.jsonl: expected the log of a run, got the line "), progress.Bar(tmp_path):
        raise AssertionError
    assert (tmp_path / "log.jsonl").read_text() == other


def test_a_kill_while_the_log_is_cut_leaves_the_old_one(tmp_path, monkeypatch):
    lines = "".join(json.dumps({"step": step, "tokens_per_second": 1.0}) + "\n" for step in (20, 40))
    (tmp_path / "log.jsonl").write_text(lines)
    monkeypatch.setattr(progress.checkpoint.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"), progress.Bar(tmp_path) as bar:
        bar({"step": 21, "loss": 3.0, "seconds": 5.0, "tokens": 100, "share": 0.05})
    assert (tmp_path / "log.jsonl").read_text() == lines
