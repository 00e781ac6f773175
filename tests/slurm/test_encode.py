"""The job array of an encoding on a real Slurm."""

import contextlib
import json
import re
import subprocess

import psutil
import pytest

from tests.data_fixtures import cut, make_vae, write_video
from tests.data_prep.test_encode_latents import contents, encode
from tests.runs import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm") / "videos"
    for number in range(10):
        write_video(folder / f"{number}.mp4", cut(number, 20 + number))
    (folder / "bad.mp4").write_bytes(b"bad")
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def local(videos, vae, tmp_path_factory):
    """The same encoding by this process alone."""
    out = tmp_path_factory.mktemp("local")
    assert encode(videos, out, vae) == 3
    return contents(out)


def test_an_array_of_4_jobs_makes_the_same_shards(videos, vae, local, tmp_path, capsys):
    assert encode(videos, tmp_path / "slurm", vae, "--cluster", "slurm", "--jobs", "4") == 3
    assert "Submitted Slurm jobs" in capsys.readouterr().out
    assert contents(tmp_path / "slurm") == local


def test_jobs_that_were_cancelled_are_submitted_again(videos, vae, local, tmp_path, monkeypatch, capsys):
    """Before they start, where Slurm forgets the jobs themselves, and once they run; the shards are the same."""
    from data_prep.reporting import EncodeReport

    follow = EncodeReport.follow

    def slurm(*command):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    def before_the_start(report, work, ended, seconds):
        names = json.loads((work.out / ".slurm" / "jobs.json").read_text())
        slurm("scancel", names[1])
        slurm("scancel", "--name=encode")
        assert not set(names) & set(slurm("squeue", "--noheader", "--array", "--states=all", "--format=%i"))
        return follow(report, work, ended, seconds)

    def running(report, work, ended, seconds):
        wait_until(lambda: slurm("squeue", "--noheader", "--name=encode", "--states=RUNNING"))
        slurm("scancel", "--name=encode")
        for process in psutil.process_iter(["cmdline"]):  # which would go on until KillWait is over, and might finish
            if str(work.out / ".slurm") in (process.info["cmdline"] or ()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        return follow(report, work, ended, seconds)

    words = (videos, tmp_path / "slurm", vae, "--cluster", "slurm", "--jobs", "3")
    with monkeypatch.context() as patch:
        patch.setattr(EncodeReport, "follow", before_the_start)
        assert encode(*words, "--slurm", "begin=now+3600") == 2
        assert re.search(r"error: Slurm job \d+_0, like 2 more, .*it never started.", capsys.readouterr().err)
        patch.setattr(EncodeReport, "follow", running)
        assert encode(*words) == 2
        assert re.search(r"error: Slurm job \d+_0, like 2 more, ended as CANCELLED", capsys.readouterr().err)
    assert encode(*words) == 3
    assert contents(tmp_path / "slurm") == local


def test_time_limits_without_end(videos, vae, tmp_path):
    """What the jobs are submitted with lets them be queued again as often as it takes."""
    from submitit.core.utils import DelayedSubmission

    assert encode(videos, tmp_path / "slurm", vae, "--cluster", "slurm", "--jobs", "2") == 3
    pickles = list((tmp_path / "slurm" / ".slurm").glob("*_submitted.pkl"))
    assert pickles
    for pickle in pickles:
        assert DelayedSubmission.load(pickle)._timeout_countdown >= 10_000


@pytest.mark.parametrize("strict", [(), ("--strict",)])
def test_a_job_that_crashes_is_a_sentence(videos, vae, tmp_path, capsys, strict):
    """Here for a GPU that the node does not have; with --strict it is no rejected video."""
    words = ("--cluster", "slurm", "--jobs", "2", "--device", "cuda", *strict)
    assert encode(videos, tmp_path / "slurm", vae, *words) == 2
    said = capsys.readouterr()
    assert "The VAE runs on cuda in bfloat16, 32 frames a call" in said.out
    assert "failed: see " in said.err
    assert "Traceback" not in said.err
    log = next((tmp_path / "slurm" / ".slurm").glob("*_0_log.err")).read_text()
    assert "this machine has no such device" in log


def test_strict_names_the_video(videos, vae, tmp_path, capsys):
    for _ in range(2):
        assert encode(videos, tmp_path / "slurm", vae, "--cluster", "slurm", "--jobs", "2", "--strict") == 3
        assert "stopped at 'bad.mp4'" in capsys.readouterr().err
    assert not (tmp_path / "slurm" / "manifest.json").exists()
