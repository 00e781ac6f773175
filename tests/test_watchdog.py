"""The watchdog beside the collectives, over gloo; a file stands for the end of the process, which NCCL would abort."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fvdm.distributed import free_port

ROOT = Path(__file__).parents[1]
CODE = """
import os, signal, sys, time
from pathlib import Path
import torch.distributed as dist
from fvdm.distributed import HangDetector, Watchdog

dist.init_process_group("gloo")
rank, folder, hanging = dist.get_rank(), Path(sys.argv[1]), set(sys.argv[2].split(","))

def abort(sentence):
    (folder / str(rank)).write_text(sentence)
    os._exit(0)

detector = HangDetector(10)
detector.seconds = 3.0
with Watchdog(detector, 1.0, abort=abort) as watchdog:
    watchdog.beat(7)
    if str(rank) in hanging:
        (folder / f"stopped-{rank}").touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    # A collective that never returns; without a hung rank, a step so long that the ranks are asked three times.
    while hanging != {""} or detector.calls < 3:
        time.sleep(0.1)
dist.barrier()
os._exit(0)
"""


def start(folder, hanging):
    shared = {"WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1}
    return [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(folder), hanging],
            env=os.environ | {key: str(value) for key, value in (shared | {"RANK": rank}).items()},
            cwd=ROOT,
        )
        for rank in range(3)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("hung", [0, 2])
def test_a_rank_that_hangs_is_named_by_all_others(tmp_path, hung):
    processes = start(tmp_path, str(hung))
    try:
        for rank, process in enumerate(processes):
            if rank != hung:
                process.wait(timeout=90)
                assert f"rank {hung} hung" in (tmp_path / str(rank)).read_text()
                assert "after step 7" in (tmp_path / str(rank)).read_text()
        assert (tmp_path / f"stopped-{hung}").exists()
    finally:
        processes[hung].send_signal(signal.SIGKILL)
        processes[hung].wait()


@pytest.mark.slow
def test_ranks_that_are_busy_are_left_alone(tmp_path):
    processes = start(tmp_path, "")
    assert [process.wait(timeout=90) for process in processes] == [0, 0, 0], "the ranks were asked three times"
    assert not list(tmp_path.iterdir()), "and nobody was named"
