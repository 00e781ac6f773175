"""Encoding by several jobs: what each is told, and what happens to those that stop or crash."""

import errno
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data_prep import jobs, slurm_jobs
from data_prep.config import EncodeConfig, resolve
from data_prep.encode_latents import run
from data_prep.encoder import open_models
from data_prep.encoding import EncodeProgress
from data_prep.job import run_job
from data_prep.planning import make_plan
from data_prep.reporting import FrameCount
from fvdm.config import parse
from tests.data_fixtures import make_clips, make_vae, rejected
from tests.data_prep.test_encode_latents import contents, encode, words

GPU_WORDS = ("gpus=1", "gpus_per_node=2", "gpus-per-task=1", "gres=gpu:h200:1", "tres_per_task=gres/gpu:1")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("videos"), 4)


class Slurm:
    """Stands for submitit's executor: remembers what it was given; its jobs end as `ends` says."""

    ends: tuple[object, ...] = (0,)

    def __init__(self, folder, cluster, **settings):
        self.settings, self.submitted, self.folder = settings, [], Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        Slurm.last = self

    def update_parameters(self, **settings):
        self.settings |= settings

    def batch(self):
        import contextlib

        return contextlib.nullcontext()

    def submit(self, job):
        number = len(self.submitted)
        self.submitted.append(job)
        end = self.ends[number % len(self.ends)]
        crashed = end if isinstance(end, Exception) else None

        def result():
            if crashed:
                raise crashed
            return end

        result_pickle = self.folder / f"7_{number}_result.pkl"
        result_pickle.touch()
        return SimpleNamespace(
            job_id=f"7_{number}",
            exception=lambda: crashed,
            result=result,
            cancel=lambda check: None,
            paths=SimpleNamespace(stderr=f"7_{number}.err", result_pickle=result_pickle),
        )


@pytest.fixture
def slurm(monkeypatch):
    """A Slurm that takes jobs and runs none, on a machine without a GPU."""
    import submitit

    monkeypatch.setattr(submitit, "AutoExecutor", Slurm)
    monkeypatch.setattr(slurm_jobs.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(slurm_jobs, "queued", lambda config: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Slurm, "ends", (0,))


def submit(videos, out, vae, *more):
    given = words(videos, out, vae, "--cluster", "slurm", *more)
    if "--device" not in more:  # leave it open
        at = given.index("--device")
        given = given[:at] + given[at + 2 :]
    return run(given)


@pytest.mark.parametrize("more", [("--device", "cuda:0"), *(("--slurm", word) for word in GPU_WORDS)])
def test_gpu_jobs_are_submitted_where_there_is_no_gpu(videos, vae, tmp_path, slurm, capsys, more):
    """The plan and the jobs are for the GPU; started again, the command makes the same plan."""
    for _ in range(2):
        assert submit(videos, tmp_path / "out", vae, "--jobs", "2", *more) == 2
        said = capsys.readouterr()
        assert "in bfloat16, 32 frames a call" in said.out
        assert "Some shards are not made" in said.err
    settings = json.loads((tmp_path / "out" / "plan.json").read_text())["settings"]
    assert (settings["precision"], settings["chunk"]) == ("bfloat16", 32)
    submitted = Slurm.last.submitted
    assert [job.config.device for job in submitted] == ["cuda:0" if "cuda:0" in more else "cuda"] * 2
    assert [job.number for job in submitted] == [0, 1]


def test_jobs_for_the_cpu(videos, vae, tmp_path, slurm, monkeypatch):
    """Also where the submitting machine has a GPU: a restart from a machine without one makes the same plan."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert submit(videos, tmp_path / "out", vae, "--slurm", "partition=gpu", "mem=4G") == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert submit(videos, tmp_path / "out", vae, "--slurm", "partition=gpu", "mem=4G") == 2
    settings = json.loads((tmp_path / "out" / "plan.json").read_text())["settings"]
    assert (settings["precision"], settings["chunk"]) == ("float32", 4)
    assert Slurm.last.submitted[0].config.device == "cpu"


def test_a_job_asks_for_no_more_cores_than_a_node_has(videos, vae, tmp_path, slurm, monkeypatch):
    nodes = {"": "64\n2+\n", "--partition=big": "64\n"}

    def sinfo(command, **_):
        assert command[0] == "sinfo"
        return SimpleNamespace(stdout=nodes["".join(command[3:])])

    monkeypatch.setattr(slurm_jobs.subprocess, "run", sinfo)
    for number, (more, cpus) in enumerate((((), 2), (("partition=big",), 4), (("cpus-per-task=3",), 3))):
        given = [
            *words(videos, tmp_path / str(number), vae),
            "--cluster",
            "slurm",
            *(("--slurm", *more) if more else ()),
        ]
        at = given.index("--workers")
        assert run(given[:at] + given[at + 2 :]) == 2
        assert Slurm.last.settings["cpus_per_task"] == cpus
    assert submit(videos, tmp_path / "out", vae, "--encoders", "6") == 2
    assert Slurm.last.settings["cpus_per_task"] == 6


def test_the_path_of_the_project_may_hold_anything(videos, vae, tmp_path, slurm, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/a folder/$HOME;ls")
    assert submit(videos, tmp_path / "out", vae) == 2
    (line,) = Slurm.last.settings["slurm_setup"]
    shown = subprocess.run(["bash", "-c", f"{line}; printenv PYTHONPATH"], capture_output=True, text=True, check=True)
    assert shown.stdout.strip().endswith(":/a folder/$HOME;ls")


def test_flags_come_first(slurm):
    flags = ["--precision", "float32", "--chunk", "8", "--device", "cpu", "--cluster", "slurm", "--slurm", "gpus=1"]
    config = resolve(parse(EncodeConfig, ["--videos", "v", "--out", "o", *flags]))
    assert (config.device, config.precision, config.chunk) == ("cpu", "float32", 8)


def test_a_job_takes_precision_and_chunk_from_the_plan(videos, vae, tmp_path, monkeypatch):
    """Whatever the machine's default is."""
    from data_prep import encoding

    given = words(videos, tmp_path, vae, "--precision", "bfloat16", "--chunk", "5")
    config = resolve(parse(EncodeConfig, given))
    make_plan(config, open_models(config).vae)
    seen = {}

    def encode_shards(config, work, shards, models, report):
        seen.update(vae=models.vae, plan=work.plan)
        return encoding.EncodeProgress()

    monkeypatch.setattr(encoding, "encode_shards", encode_shards)
    assert run_job(replace(config, precision="float32", chunk=4), 0) == 3
    assert seen["vae"].dtype == torch.bfloat16
    assert seen["plan"].settings["chunk"] == 5


def test_time_limits_never_end_a_job(videos, vae, tmp_path, slurm):
    assert submit(videos, tmp_path / "out", vae, "--minutes", "30") == 2
    assert Slurm.last.settings["slurm_max_num_timeout"] >= 10_000
    assert Slurm.last.settings["timeout_min"] == 30


@pytest.mark.parametrize("strict", [(), ("--strict",)])
def test_a_crashed_job_is_named_and_is_no_rejected_video(videos, vae, tmp_path, slurm, monkeypatch, capsys, strict):
    monkeypatch.setattr(Slurm, "ends", (0, RuntimeError("Traceback: crashed"), 0))
    assert submit(videos, tmp_path / "out", vae, "--jobs", "3", *strict) == 2
    error = capsys.readouterr().err
    assert "Slurm job 7_1 failed: see 7_1.err" in error
    assert "Traceback" not in error
    assert rejected(tmp_path / "out") == {}


def test_a_device_that_is_not_there_is_a_sentence(videos, vae, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for where in ("cuda", "cuda:3", "nonsense"):
        for more in ((), ("--jobs", "2")):
            out = tmp_path / where
            assert encode(videos, out, vae, *more, "--device", where) == 2
            assert f"--device {where}: this machine has no such device" in capsys.readouterr().err
            assert not (out / "plan.json").exists()


@pytest.mark.parametrize(
    ("named", "gpus", "expected"),
    [
        (None, 3, ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]),
        ("cuda", 2, ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]),
        ("cuda:1", 2, ["cuda:1"] * 4),
        ("cpu", 2, ["cpu"] * 4),
        (None, 0, ["cpu"] * 4),
    ],
)
def test_jobs_on_this_machine_take_its_gpus_in_turn(monkeypatch, named, gpus, expected):
    """Which device each child process is given."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    given = []

    class Child:
        returncode = 0

        def __init__(self, command, *, env, **_):
            assert env["OMP_NUM_THREADS"]
            self.stdin = SimpleNamespace(write=lambda line: given.append(json.loads(line)), flush=lambda: None)

        def poll(self):
            return 0

        terminate = wait = poll

    monkeypatch.setattr(jobs.subprocess, "Popen", Child)
    arguments = ["--videos", "v", "--out", "o", "--jobs", "4", *(["--device", named] if named else [])]
    jobs._run_here(resolve(parse(EncodeConfig, arguments)), None, SimpleNamespace(follow=lambda *_: 0))
    assert [config["device"] for config, _ in given] == expected
    assert [number for _, number in given] == [0, 1, 2, 3]


def test_a_file_system_without_locks(videos, vae, tmp_path, monkeypatch):
    import fcntl

    assert encode(videos, tmp_path / "good", vae) == 0

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert encode(videos, tmp_path / "out", vae) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "good")


@pytest.mark.slow
def test_progress_of_jobs_is_counted_in_frames(videos, vae, tmp_path, capsys):
    assert encode(videos, tmp_path / "out", vae, "--jobs", "2") == 0
    said = capsys.readouterr()
    assert re.search(r"70/70 .*(frames/s|s/ frames), 4 videos, [\d.]+ videos/s", said.err)
    seconds, rate = map(float, re.search(r"; (\d+) s, ([\d.]+) frames/s", said.out).groups())
    assert (seconds - 0.5) * rate <= 70.5 <= (seconds + 0.5) * (rate + 0.1) + 1


def test_frames_are_counted_over_the_starts_of_a_job(tmp_path):
    for number in range(3):
        for job in (0, 1):
            count = FrameCount(tmp_path, job)
            count(EncodeProgress(frames=5))  # the first ones are said at once
            count(EncodeProgress(frames=7))  # too early to say
            assert FrameCount.of_all_jobs(tmp_path) % 21 == 5 + 10 * job
            count(EncodeProgress(frames=10 + job), last=True)
        assert FrameCount.of_all_jobs(tmp_path) == 21 * (number + 1)


@pytest.mark.slow
def test_two_copies_of_one_job(videos, vae, tmp_path):
    """As after a requeue by a Slurm that has lost a node: the same bytes as of an undisturbed run."""
    assert encode(videos, tmp_path / "good", vae) == 0
    config = resolve(parse(EncodeConfig, words(videos, tmp_path / "out", vae)))
    (tmp_path / "out").mkdir()
    make_plan(config, open_models(config).vae)
    line = json.dumps([vars(config), 0]) + "\n"
    command = [sys.executable, "-m", "data_prep.jobs"]
    copies = [subprocess.Popen(command, stdin=subprocess.PIPE, text=True) for _ in range(2)]
    for copy in copies:
        copy.stdin.write(line)
        copy.stdin.flush()
    assert [copy.wait(120) for copy in copies] == [0, 0]
    assert encode(videos, tmp_path / "out", vae) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "good")
