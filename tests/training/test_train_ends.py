"""How trainings end that do not end well, and what never begins: signals, kills, hangs, losses that are not finite."""

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from fvdm import config as settings
from fvdm.checkpoints.find import checkpoints, newest
from fvdm.checkpoints.read import read_state
from fvdm.training.config import TrainConfig
from fvdm.training.setup import check
from tests.data_fixtures import make_shards
from tests.runs import ROOT, launch, losses, ranks_of, start, state, train, wait_until, words


@pytest.mark.slow
def test_sigterm_ends_a_run_with_a_checkpoint_and_a_second_job_is_refused(latents, tmp_path):
    arguments = words(latents, tmp_path, "run", "--steps", 100_000)
    processes = start(2, arguments, tmp_path)
    journal = tmp_path / "runs" / "run" / "events.jsonl"
    wait_until(lambda: journal.exists() and "loss/mean" in journal.read_text())
    second = train(1, arguments, tmp_path, code=2)
    assert "is being trained by another job" in second[0]
    processes[1].send_signal(signal.SIGTERM)  # One rank is told; all must agree.
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [p.returncode for p in processes] == [75, 75], outputs
    record, _ = state(tmp_path, "run")
    assert record["step"] == max(losses(tmp_path, "run"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_that_are_not_finite_stop_the_run_and_name_the_samples(latents, tmp_path, precision):
    bad = ("--steps", 50, "--engine.lr", "1e30", "--max_skipped", 3, "--engine.precision", precision)
    (output,) = train(1, words(latents, tmp_path, "run", *bad), tmp_path, code=2)
    assert "3 steps in a row" in output
    assert "lower engine.lr" in output
    assert "Traceback" not in output
    assert len(re.findall("skipped: not finite, with video", output)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_video_that_is_not_finite_is_named_whatever_rank_and_micro_batch_it_was_in(tmp_path, precision):
    spoilt = make_shards(tmp_path / "spoilt", [8] * 7, labels=True, spoilt=2)
    more = ("--engine.micro_batch", 1, "--engine.precision", precision)
    arguments = words(spoilt, tmp_path, "run", "--steps", 7, *more)
    said = train(2, arguments, tmp_path)
    for output in said:  # Seven steps of four are four epochs of seven.
        named = re.findall("skipped: not finite, with (.+)", output)
        assert len(named) == 4, output
        assert set(named) == {"video2.mp4"}


@pytest.mark.slow
def test_a_run_that_was_told_to_stop_makes_no_preview(latents, tmp_path):
    hold = partial(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGTERM})  # as launchers/start.py does
    arguments = words(latents, tmp_path, "run", "--steps", 100_000, "--previews.every", 1, "--stop_every", 100)
    (process,) = start(1, arguments, tmp_path, preexec_fn=hold)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75, output
    assert "preview" not in output
    assert state(tmp_path, "run")[0]["step"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "hung"])
def test_a_rank_that_loses_its_peer_ends_in_seconds_though_it_has_workers(latents, tmp_path, how):
    """multiprocessing waits at exit for workers, which ignore the signals of a job."""
    more = ("--steps", 100_000, "--data.workers", 1, "--engine.timeout", 10)
    first, second = start(2, words(latents, tmp_path, "run", *more), tmp_path)
    journal = tmp_path / "runs" / "run" / "events.jsonl"
    wait_until(lambda: journal.exists() and "loss/mean" in journal.read_text())
    second.send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    try:
        output = first.communicate(timeout=90)[0]
    finally:
        second.kill()
        first.kill()
    assert first.returncode == 1, output
    assert ("rank 1 hung, or the node" in output) == (how == "hung")
    assert "DataLoader worker" not in output


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank", "launcher"])
def test_kill_9_and_the_same_command_again(latents, undisturbed, tmp_path, victim):
    (tmp_path / "c.yaml").write_text("name: run\n")
    arguments = words(latents, tmp_path, "run", "--checkpoint.every", 1)
    launcher = launch([*arguments, "--steps", "100000"], tmp_path)
    root = tmp_path / "runs" / "run" / "checkpoints"
    wait_until(lambda: len(checkpoints(root)) >= 2)
    ranks = ranks_of(launcher)
    assert len(ranks) == 2
    if victim == "rank":
        ranks[1].kill()
        output = launcher.communicate(timeout=120)[0]
        assert launcher.returncode == 1
        assert "rank 1 was killed" in output
    else:
        launcher.kill()
        launcher.communicate()
    wait_until(lambda: not any(rank.is_running() and rank.status() != "zombie" for rank in ranks), 60)
    done = read_state(newest(root))["step"]
    again = launch([*arguments, "--steps", str(done + 2)], tmp_path)
    output = again.communicate(timeout=240)[0]
    assert again.returncode == 0, output
    assert f"resuming run from step {done}" in output
    assert read_state(newest(root))["step"] == done + 2
    assert not list(root.glob(".tmp-*"))
    got, wanted = losses(tmp_path, "run"), losses(undisturbed, "run")
    assert all(got[step] == wanted[step] for step in set(got) & set(wanted))


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_all_corrupt_stops_and_begins_again_only_when_asked_to(
    latents, undisturbed, tmp_path
):
    shutil.copytree(undisturbed / "runs" / "run", tmp_path / "runs" / "run")
    root = tmp_path / "runs" / "run" / "checkpoints"
    shard = root / "step-00000008" / "shard-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    arguments = words(latents, tmp_path, "run", "--steps", 9)
    for start_number in range(2):  # The second time it is aside already.
        for output in train(2, arguments, tmp_path, code=2):
            assert "has no complete checkpoint left" in output, start_number
            assert "corrupt-step-00000008: the checksum of shard-00001-of-00002.safetensors is wrong" in output
            assert "--from-scratch true" in output
            assert "Traceback" not in output
    with pytest.raises(ValueError, match="from-scratch"):  # before the job waits in a queue
        check(settings.parse(TrainConfig, arguments), 2)
    before = {path.name: path.read_bytes() for path in (root / "corrupt-step-00000008").iterdir()}
    train(2, [*arguments, "--from-scratch", "true"], tmp_path)
    assert state(tmp_path, "run")[0]["progress"]["consumed"] == 36
    assert {path.name: path.read_bytes() for path in (root / "corrupt-step-00000008").iterdir()} == before


@pytest.mark.slow
def test_a_checkpoint_is_saved_though_every_step_so_far_was_skipped(tmp_path):
    spoilt = make_shards(tmp_path / "spoilt", [8], spoilt=0)
    arguments = words(spoilt, tmp_path, "run", "--steps", 3, "--checkpoint.every", 1)
    for steps in (2, 3):
        train(1, [*arguments, "--steps", str(steps)], tmp_path)
        assert state(tmp_path, "run")[0]["progress"] == {
            "step": steps,
            "updates": 0,
            "consumed": 4 * steps,
            "skipped": steps,
            "corrupt": 0,
        }


@pytest.mark.slow
def test_a_preview_that_fails_costs_itself_and_comes_after_the_checkpoint(latents, tmp_path):
    """The latents' VAE does not exist, so no preview can be decoded."""
    more = ("--steps", 4, "--previews.every", 2, "--previews.steps", 2, "--previews.num", 1)
    first, _ = train(2, words(latents, tmp_path, "run", *more, "--checkpoint.every", 2), tmp_path)
    assert first.count("no preview of step") == 2
    assert first.index("no preview of step 2") > first.index("step 2/4")
    assert state(tmp_path, "run")[0]["step"] == 4
    assert "fvdm generate --checkpoint" in first


def test_what_cannot_work_is_refused_before_it_is_submitted(latents, tmp_path):
    config = settings.parse(TrainConfig, words(latents, tmp_path, "run"))
    check(config, 2)
    with pytest.raises(ValueError, match="does not divide among 3 ranks"):
        check(config, 3)
    with pytest.raises(ValueError, match="micro_batch 3 does not divide"):
        check(replace(config, engine=replace(config.engine, micro_batch=3)), 1)
    with pytest.raises(ValueError, match="XL/2"):
        check(replace(config, model="huge"), 1)
    with pytest.raises(ValueError, match=str(tmp_path)):
        check(replace(config, data=replace(config.data, path=str(tmp_path / "nothing"))), 1)
    plain_shards = make_shards(tmp_path / "unlabelled", [8, 8], labels=False)
    with pytest.raises(ValueError, match="no class labels"):
        check(replace(config, conditional=True, data=replace(config.data, path=str(plain_shards))), 1)


def test_the_launcher_says_what_is_wrong_in_one_sentence(latents, tmp_path):
    launcher = ROOT / "launchers/slurm_train.py"
    for more, sentence in (
        (["--modle", "S/2"], "did you mean model?"),
        (["--nodes", "3"], "does not divide among 3 ranks"),
        (["--cluster", "slurm"], "no sbatch"),
    ):
        if more[0] == "--cluster" and any((Path(p) / "sbatch").exists() for p in os.environ["PATH"].split(":")):
            continue
        (tmp_path / "c.yaml").write_text("name: run\n")
        command = [sys.executable, str(launcher), "--cluster", "local", "--gpus-per-node", "0", "--config"]
        command += [str(tmp_path / "c.yaml"), *words(latents, tmp_path, "run"), *more]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2, done.stdout + done.stderr
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_what_cannot_be_written_is_told_and_not_called_a_kill(latents, tmp_path):
    (tmp_path / "c.yaml").write_text("name: run\n")
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "checkpoints").touch()  # No folder can be made there.
    launcher = launch(words(latents, tmp_path, "run", "--steps", 2), tmp_path)
    output = launcher.communicate(timeout=240)[0]
    assert launcher.returncode == 1
    last = output.partition("\nerror: ")[2]
    assert last.startswith("the last checkpoint, of step 2, could not be written"), output
    assert "was killed" not in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_rank_of_this_machine_that_hangs_is_named_and_ended(latents, tmp_path):
    (tmp_path / "c.yaml").write_text("name: run\n")
    launcher = launch(words(latents, tmp_path, "run", "--steps", 10**6, "--engine.timeout", 10), tmp_path)
    journal = tmp_path / "runs" / "run" / "events.jsonl"
    wait_until(lambda: journal.exists() and "loss/mean" in journal.read_text())
    ranks = ranks_of(launcher)
    ranks[1].suspend()
    output = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 1
    assert "error: rank 1 hung" in output
    assert not any(rank.is_running() for rank in ranks)
