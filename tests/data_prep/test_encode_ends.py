"""Encodings that end before their time: by a signal, or killed at any moment; the same command continues them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.data_fixtures import cut, make_vae, write_video
from tests.data_prep.killing import kill_encodings
from tests.data_prep.test_encode_latents import ROOT, contents, encode, words
from tests.runs import wait_until


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """Thirty clips of 60 frames: work to interrupt."""
    folder = tmp_path_factory.mktemp("longer")
    for number in range(30):
        write_video(folder / f"{number}.mp4", cut(number, 60))
    return folder


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_ends_the_command_and_its_children(longer, vae, tmp_path, number, jobs):
    """The exit status says which signal, standard error says what to type, and the same command continues."""
    command = [sys.executable, str(ROOT / "data_prep" / "encode_latents.py")]
    command += words(longer, tmp_path / "out", vae, "--jobs", str(jobs))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list((tmp_path / "out").glob(".work/*/*.tar")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number, error
    assert f"stopped by {number.name}; what is done is kept. To continue, type: python" in error
    assert str(tmp_path / "out") in error
    assert "Traceback" not in error
    wait_until(lambda: not _members(process.pid), seconds=30)  # the last of them end when their pipe is closed


@pytest.mark.slow
def test_killed_at_random_moments(longer, vae, tmp_path):
    """Kill -9 at moments of the work: the same bytes as undisturbed."""
    assert encode(longer, tmp_path / "good", vae) == 0
    kill_encodings(words(longer, tmp_path / "out", vae), tmp_path / "out", tmp_path / "good", 6)
    assert encode(longer, tmp_path / "out", vae) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "good")


@pytest.mark.slow
def test_a_command_with_two_jobs_killed_at_random_moments(longer, vae, tmp_path):
    """Kill -9 of the command at moments of its work: the same bytes as undisturbed, and no process stays behind.

    A moment is that at which a number of files, drawn at random, are new: no kill falls on the imports.
    """
    random = np.random.default_rng(3)
    assert encode(longer, tmp_path / "good", vae) == 0
    good = contents(tmp_path / "good")
    again = [sys.executable, str(ROOT / "data_prep" / "encode_latents.py")]
    again += words(longer, tmp_path / "out", vae, "--jobs", "2")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    killed = 0
    while killed < 2:
        before, new = _files(tmp_path / "out"), int(random.integers(1, 6))
        process = subprocess.Popen(again, start_new_session=True, **quiet)
        wait_until(lambda: process.poll() is not None or len(_files(tmp_path / "out") - before) >= new)  # noqa: B023
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            found = contents(tmp_path / "out")
            assert all(digest == good[name] for name, digest in found.items() if name.endswith(".tar") and name in good)
        else:
            assert process.returncode == 0
            shutil.rmtree(tmp_path / "out")  # done before it was killed: begin again
        wait_until(lambda: not _members(process.pid), seconds=30)  # noqa: B023
    subprocess.run(again, check=True, **quiet)
    assert contents(tmp_path / "out") == good


def _files(folder: Path) -> set[str]:
    """Names of all files below a folder, temporary ones too."""
    return {str(path) for path in folder.rglob("*")} if folder.exists() else set()


def _members(session: int) -> list[int]:
    """Live processes of a session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (psutil.Error, ProcessLookupError):
            continue
    return found
