"""Training on a real Slurm: what ends, what starts again, and with what word."""

import json
import re
import subprocess
import sys

import psutil
import pytest
import torch

from fvdm.checkpoints.find import checkpoints, newest
from fvdm.checkpoints.read import read_state
from fvdm.tracking import run_of
from tests.data_fixtures import make_shards
from tests.runs import losses, state, wait_until, words
from tests.slurm.chaos import ENDED, KINDS, SHORT, chaos, schedule
from tests.slurm.cluster import MISSING, ROOT, installed, ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("latents"), [12, 9, 10, 30, 8, 11, 6], labels=True)


def submit(cluster, folder, latents, *more, name="run", options=()):
    """Submit a small training from `folder`; what the launcher printed, and the job's number."""
    (folder / "c.yaml").write_text("name: run\n")
    return submit_as_it_is(cluster, folder, "c.yaml", options, words(latents, folder, name, *more))


def submit_as_it_is(cluster, folder, config, options, words):
    fixed = ["--cluster", "slurm", "--cpus-per-task", 1, "--time", 60, "--config", config]
    done = cluster.run("launchers/slurm_train.py", *fixed, *options, *words, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, re.findall(r"(?:^job|cancel with: scancel) (\d+)", done.stdout, re.MULTILINE)[0]


def follow(cluster, folder, latents, *more):
    """Train on two nodes, and follow the job to its end."""
    (folder / "c.yaml").write_text("name: run\n")
    fixed = ["--cluster", "slurm", "--nodes", 2, "--cpus-per-task", 1, "--follow", "--config", "c.yaml"]
    return cluster.run("launchers/slurm_train.py", *fixed, *words(latents, folder, "run", *more), cwd=folder)


def log(folder, job, rank=0, run="run"):
    return (folder / "runs" / run / "jobs" / f"{job}_{rank}_log.out").read_text(errors="replace")


def status(folder, run="run"):
    """What MLflow says of a run."""
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{folder}/mlflow.db").get_run(run_of(folder / "runs" / run)).info.status


def outcome(folder, job):
    return (folder / "runs" / "run" / "jobs" / f"{job}_outcome.txt").read_text().split(None, 1)


def started(folder):
    """The ranks that have begun to hold signals back; to one that is not there yet, Slurm sends none."""
    return [rank for rank in ranks(folder) if "start.py" not in " ".join(rank.cmdline())]


def until_training(folder, steps=1, run="run"):
    journal = folder / "runs" / run / "events.jsonl"
    wait_until(lambda: journal.exists() and len(re.findall("loss/mean", journal.read_text())) >= steps)


def test_four_nodes_run_one_training_that_a_time_limit_does_not_end(cluster, latents, tmp_path):
    """With the shipped configuration, its loader's processes included."""
    own = ["--name", "run", "--data.path", latents, "--data.frames", 8, "--steps", 100]
    own += ["--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db"]
    printed, job = submit_as_it_is(cluster, tmp_path, ROOT / "configs/demo.yaml", ["--nodes", 4], own)
    assert f"cancel with: scancel {job}" in printed
    cluster.wait(job, {"RUNNING"})
    facts = cluster.job(job)
    assert (facts["NumNodes"], facts["NumTasks"], facts["Requeue"]) == ("4", "4", "1")
    wait_until(lambda: len(started(tmp_path)) == 4)
    cluster.run("scancel", "--signal=USR2", job)  # The ranks are not listening yet, and must not miss it.
    wait_until(lambda: int(cluster.job(job).get("Restarts", 0)) >= 1)
    cluster.wait(job, {"COMPLETED"})
    text = "".join(log(tmp_path, job, rank) for rank in range(4))
    assert len(set(re.findall(r"hostname=(node\d)", text))) == 4
    assert "stopped in time, with a checkpoint" in text
    assert "resuming run from step" in text
    assert max(losses(tmp_path, "run")) == 100
    assert outcome(tmp_path, job) == ["done"]
    record, _ = state(tmp_path, "run")
    assert record["world_size"] == 4
    assert (tmp_path / "runs/run/jobs" / f"{job}_submission.sh").exists()


def test_a_killed_rank_is_named_and_the_job_starts_again_until_it_may_not(cluster, latents, tmp_path):
    _, job = submit(cluster, tmp_path, latents, "--steps", 10**6, options=["--nodes", 4, "--max-restarts", 1])
    until_training(tmp_path)
    ranks(tmp_path)[1].kill()
    wait_until(lambda: int(cluster.job(job).get("Restarts", 0)) == 1)
    assert re.search(r"rank 1 on node\d failed first: Killed.*start 1 of at most 1", log(tmp_path, job))
    cluster.wait(job, {"RUNNING"})
    wait_until(lambda: log(tmp_path, job).count("step 1/") == 2)
    ranks(tmp_path)[2].kill()
    assert cluster.wait(job, ENDED) == "FAILED"
    what, sentence = outcome(tmp_path, job)
    assert what == "failed"
    assert "rank 2 on node" in sentence
    wait_until(lambda: not ranks(tmp_path), 30)


def test_a_job_whose_ranks_are_gone_starts_again_though_srun_has_not_noticed(cluster, latents, tmp_path):
    """A stopped srun stands for one that lost the only message of its ranks' end."""
    _, job = submit(cluster, tmp_path, latents, "--steps", 10**6, options=["--nodes", 2])
    until_training(tmp_path)
    waiting = [p for p in psutil.process_iter(["name", "cmdline"]) if p.info["name"] == "srun"]
    waiting = [p for p in waiting if str(tmp_path) in " ".join(p.info["cmdline"])]
    assert waiting
    for process in waiting:
        process.suspend()
    for process in ranks(tmp_path):
        process.kill()
    wait_until(lambda: int(cluster.job(job).get("Restarts", 0)) == 1)
    assert "srun waits for ranks that have ended" in log(tmp_path, job)
    cluster.run("scancel", job)
    cluster.wait(job, {"CANCELLED"})


def test_a_cancelled_job_saves_and_stays_cancelled_and_corrupt_checkpoints_are_a_mistake(cluster, latents, tmp_path):
    """A mistake ends the job with exit code 2, its sentence, and no other start."""
    _, job = submit(cluster, tmp_path, latents, "--steps", 10**6, options=["--nodes", 2])
    until_training(tmp_path)
    cluster.run("scancel", job)
    cluster.wait(job, {"CANCELLED"})
    wait_until(lambda: not ranks(tmp_path), 30)
    assert newest(tmp_path / "runs/run/checkpoints") is not None
    wait_until(lambda: (tmp_path / "runs/run/jobs" / f"{job}_outcome.txt").exists(), 60)
    assert outcome(tmp_path, job) == ["cancelled"]
    assert cluster.state(job) == "CANCELLED"
    wait_until(lambda: status(tmp_path) == "KILLED", 60)
    for folder in checkpoints(tmp_path / "runs/run/checkpoints"):
        victim = max(folder.iterdir(), key=lambda path: path.stat().st_size)
        victim.write_bytes(victim.read_bytes()[:-1])
    done = follow(cluster, tmp_path, latents, "--steps", 10**6)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "corrupt" in done.stderr
    job = re.findall(r"^job (\d+)", done.stdout, re.MULTILINE)
    assert not job or cluster.job(job[0]).get("Restarts") == "0"


def test_a_mistake_ends_the_job_at_once_with_its_sentence(cluster, latents, tmp_path):
    done = follow(cluster, tmp_path, latents, "--steps", 50, "--engine.lr", "1e30", "--max_skipped", 3)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "3 steps in a row" in done.stderr
    job = re.findall(r"^job (\d+)", done.stdout, re.MULTILINE)[0]
    assert cluster.job(job).get("Restarts") == "0"
    assert status(tmp_path) == "FAILED"


def test_a_bare_command_trains_on_the_sample_clips_on_four_nodes(cluster, tmp_path):
    """The name has a percent sign, which Slurm would take for a pattern in the names of logs."""
    make_shards(tmp_path / "latents" / "sample", [20, 18, 16], labels=False)
    few = ["--steps", 2, "--name", "50%n", "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db"]
    done = cluster.run("launchers/slurm_train.py", "--nodes", 4, *few, "--follow", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Slurm is here: submitting to it" in done.stdout
    assert "no GPUs: training XS/4 for 2 steps" in done.stdout
    assert "as 4 ranks on Slurm" in done.stdout
    assert "fvdm generate --checkpoint runs/50%n" in done.stdout
    record = read_state(newest(tmp_path / "runs/50%n/checkpoints"))
    assert (record["step"], record["world_size"]) == (2, 4)
    assert status(tmp_path, "50%n") == "FINISHED"


def test_four_two_four_ranks_and_a_cluster_that_does_not_requeue(cluster, latents, tmp_path):
    """The losses of a changing number of ranks stay within 1e-3 of those of an unchanged one."""
    whole, split = tmp_path / "whole", tmp_path / "split"
    whole.mkdir(), split.mkdir()
    _, reference = submit(cluster, whole, latents, "--steps", 30, options=["--nodes", 4])
    cluster.wait(reference, {"COMPLETED"})
    for nodes, steps in ((4, 10), (2, 20)):
        _, job = submit(cluster, split, latents, "--steps", steps, options=["--nodes", nodes])
        cluster.wait(job, {"COMPLETED"})
    _, job = submit(cluster, split, latents, "--steps", 30, options=["--nodes", 4])
    cluster.run("scontrol", "update", f"jobid={job}", "Requeue=0")
    cluster.wait(job, {"RUNNING"})
    cluster.run("scancel", "--signal=TERM", job)
    cluster.wait(job, ENDED)
    what, following = outcome(split, job)
    assert what == "again"
    cluster.wait(following.strip(), {"COMPLETED"})
    assert outcome(split, following.strip()) == ["done"]
    wanted, got = losses(whole, "run"), losses(split, "run")
    assert set(got) == set(wanted)
    assert max(abs(got[step] - wanted[step]) for step in wanted) < 1e-3
    assert (state(whole, "run")[1]["master"] - state(split, "run")[1]["master"]).abs().max() < 1e-3


def test_an_array_is_a_sweep_and_any_script_runs_in_the_same_way(cluster, latents, tmp_path):
    sweep = ["--steps", 2, "--seed", "{array}"]
    _, job = submit(cluster, tmp_path, latents, *sweep, name="seed-{array}", options=["--array", "1-2"])
    script = tmp_path / "script.py"
    script.write_text("import os, sys; print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], sys.argv[1])")
    run = ["launchers/slurm_run.py", "--cluster", "slurm", "--nodes", 2, "--cpus-per-task", 1, "--follow"]
    done = cluster.run(*run, script, "word", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 0 of 2 word" in done.stdout
    wait_until(lambda: cluster.run("squeue", "-h", "-j", job).stdout == "")
    first, second = (state(tmp_path, f"seed-{seed}")[1]["master"] for seed in (1, 2))
    assert not torch.equal(first, second)


@pytest.mark.timeout(1200)
def test_a_short_chaos(tmp_path):
    """Each of some kinds of events once that have no test above. With this seed none waits for long."""
    if not installed():
        pytest.skip(MISSING)
    chaos(tmp_path, events=0, seed=25, kinds=SHORT, between=30)


def test_a_seed_fixes_what_happens_when_and_every_kind_comes():
    drawn = schedule(KINDS, 30, 7)
    assert drawn == schedule(KINDS, 30, 7) != schedule(KINDS, 30, 8)
    kinds = [event.kind for event in drawn]
    assert len(kinds) == 30
    for first in range(0, 30 - len(KINDS) + 1, len(KINDS)):
        assert set(kinds[first : first + len(KINDS)]) == set(KINDS)


@pytest.mark.parametrize("name", ["ffs_xl", "sky_xl", "ucf101_xl", "taichi_xl"])
def test_dry_runs_of_the_papers_configurations(name, tmp_path):
    """On a plain GPU cluster: a rank for each GPU, a signal ahead of the time limit, requeueing."""
    command = [sys.executable, str(ROOT / "launchers/slurm_train.py"), "--config", str(ROOT / f"configs/{name}.yaml")]
    more = ["--nodes", "4", "--gpus-per-node", "8", "--cpus-per-task", "12", "--partition", "gpu", "--dry-run"]
    done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in (
        "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--partition=gpu",
        "--signal=USR2@300", "--time=1440", "--requeue", "--open-mode=append", f"--job-name=fvdm-{name}",
    ):  # fmt: skip
        assert f"\n#SBATCH {line}\n" in done.stdout, line
    assert "--kill-on-bad-exit=1" in done.stdout
    assert not list(tmp_path.iterdir()), "a dry run leaves nothing behind"


def test_failures_are_counted_from_the_last_progress(tmp_path):
    from launchers.after import Files, _count_failure

    files = Files(tmp_path, "1")
    files.progress.write_text(str(tmp_path / "checkpoints"))
    assert [_count_failure(files, "x") for _ in range(3)] == [1, 2, 3]
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert [_count_failure(files, "x") for _ in range(2)] == [1, 2]
    assert len([json.loads(line) for line in files.failures.read_text().splitlines()]) == 5
