"""The job array of an encoding on a real Slurm."""

import subprocess

import pytest

from tests.data_fixtures import cut, make_vae, write_video
from tests.test_encode_latents import contents, encode

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


def test_an_array_of_4_jobs_makes_the_same_shards(videos, vae, tmp_path, capsys):
    assert encode(videos, tmp_path / "local", vae) == 3
    assert encode(videos, tmp_path / "slurm", vae, "--cluster", "slurm", "--jobs", "4") == 3
    assert "Submitted Slurm jobs" in capsys.readouterr().out
    assert contents(tmp_path / "slurm") == contents(tmp_path / "local")


def test_jobs_that_were_killed_are_submitted_again(videos, vae, tmp_path, monkeypatch):
    """The jobs are cancelled in the middle; the same command submits again, and the shards are the same."""
    from data_prep import jobs

    assert encode(videos, tmp_path / "local", vae) == 3
    wait = jobs._wait

    def cancelled(work, report, ended, seconds):
        import time

        time.sleep(4)
        subprocess.run(["scancel", "--name=encode"], check=True)
        wait(work, report, ended, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "_wait", cancelled)
        first = encode(videos, tmp_path / "slurm", vae, "--cluster", "slurm", "--jobs", "2")
    assert first in (2, 3)
    assert encode(videos, tmp_path / "slurm", vae, "--cluster", "slurm", "--jobs", "3") == 3
    assert contents(tmp_path / "slurm") == contents(tmp_path / "local")
