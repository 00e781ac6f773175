"""Locks between real processes, with and without flock, and the permissions of files that are written atomically."""

import errno
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from fvdm.files import NO_FLOCK, LockHeldError, atomic_write, lock

HOLD = """
import fcntl, sys, time
from pathlib import Path
from fvdm.files import lock

def refuse(*_):
    raise OSError(int(sys.argv[2]), "no flock here")

if int(sys.argv[2]):
    fcntl.flock = refuse
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=[0, *NO_FLOCK], ids=lambda number: errno.errorcode.get(number, "flock"))
def file_system(request, monkeypatch):
    """The error that flock gives; 0 for none."""
    if request.param:
        import fcntl

        def refuse(*_):
            raise OSError(request.param, "no flock here")

        monkeypatch.setattr(fcntl, "flock", refuse)
    return request.param


@pytest.fixture
def holder(tmp_path, file_system):
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock"), str(file_system)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_only_one_process_holds_a_lock(holder, tmp_path):
    began = time.monotonic()
    with pytest.raises(LockHeldError), lock(tmp_path / "lock", timeout=0):
        pass
    with pytest.raises(LockHeldError), lock(tmp_path / "lock", timeout=0.5):
        pass
    assert time.monotonic() - began >= 0.5
    holder.communicate("")
    assert holder.returncode == 0
    with lock(tmp_path / "lock", timeout=0):
        pass


def test_the_lock_of_a_killed_process_is_free(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with lock(tmp_path / "lock", timeout=30):
        pass


def test_an_error_in_the_block_releases_the_lock_and_reaches_the_caller(file_system, tmp_path):
    for _ in range(2):
        with pytest.raises(TimeoutError, match="of the caller"), lock(tmp_path / "lock", timeout=0):
            raise TimeoutError("of the caller")


def test_a_lock_in_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), lock(tmp_path / "missing" / "lock"):
        pass


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_follow_the_umask(tmp_path, umask, mode):
    """Also those of writers that make private files, as safetensors does."""
    before = os.umask(umask)
    try:
        for name, write in (("a.safetensors", lambda path: save_file({"x": torch.ones(2)}, path)), ("b", private)):
            with atomic_write(tmp_path / name) as temporary:
                write(temporary)
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode
    finally:
        os.umask(before)


def private(path):
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "file") as temporary:
        raise KeyboardInterrupt(temporary.write_text("half"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"
