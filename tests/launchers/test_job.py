"""Where the ranks of a job meet, and what the script around them decides; the whole of it runs in tests/slurm."""

import socket
import threading
from types import SimpleNamespace

import pytest

from launchers import after
from launchers.after import Files, end, first_cause
from launchers.job import _meet, _note, ports


def test_the_port_comes_from_the_jobs_number_and_is_drawn_again_if_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    files = Files(tmp_path, "1234")
    tried = ports("1234", 1)
    first, second = next(tried), next(tried)
    assert first == next(ports("1234", 1)) != next(ports("1234", 2))
    found = {}

    def rank(number):
        found[number] = _meet(files, SimpleNamespace(global_rank=number, raw_job_id="1234"))

    with socket.socket() as taken:
        taken.bind(("", first))
        waiting = threading.Thread(target=rank, args=(1,))  # comes before rank 0
        waiting.start()
        rank(0)
        waiting.join(10)
    assert found == {0: second, 1: second}


def test_the_first_cause_is_the_one_that_srun_saw_first(tmp_path):
    files = Files(tmp_path, "7")
    files.log.write_text("srun: error: node9: task 5: Killed\n")  # of an earlier start
    files.mark.write_text(str(files.log.stat().st_size))
    with files.log.open("a") as file:
        file.write("srun: error: node2: task 1: Exited with exit code 1\nsrun: error: node1: task 0: Killed\n")
    files.log_of(1).write_text("Traceback\n  File ...\nRuntimeError: it broke\nsubmitit ERROR\n")
    assert first_cause(files, 137).startswith("rank 1 on node2 failed first: Exited with exit code 1 (RuntimeError: it")
    assert first_cause(Files(tmp_path, "8"), 9) == "the ranks ended with exit code 9"
    files.cause.write_text("rank 3 hangs")
    assert first_cause(files, 137).startswith("rank 3 hangs. The log: ")
    with files.log.open("r+") as file:
        file.seek(int(files.mark.read_text()))
        file.write("srun: error: node3: task 2: Killed\n")  # What a survivor says is no cause then.
    assert first_cause(files, 137).startswith("rank 2 on node3 failed first: Killed")


@pytest.mark.parametrize(
    ("code", "error", "outcome", "exit_code"), [(0, "", "done", 0), (137, "no labels", "error", 2)]
)
def test_a_complete_or_a_mistaken_job_does_not_start_again(tmp_path, code, error, outcome, exit_code):
    files = Files(tmp_path, "7")
    if error:
        files.error.write_text(error)
    assert end(files, 5, code) == exit_code
    assert files.outcome.read_text().split(None, 1) == [outcome, *([error + "\n"] if error else [])]


SCONTROL = """#!/bin/sh
echo "$@" >> {folder}/calls
if [ $(wc -l < {folder}/calls) -le {silent} ]; then
    echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1
fi
case $1 in
    show) [ "{state}" ] || {{ echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }}
          echo "JobId=7 JobState={state} Reason=None" ;;
esac
"""


@pytest.mark.parametrize(
    ("silent", "state", "outcome", "asked"),
    [
        (0, "RUNNING", "again", ["show", "requeue"]),
        (4, "RUNNING", "again", ["show"] * 5 + ["requeue"]),
        (4, "COMPLETING", "cancelled", ["show"] * 5),
        (0, "", "cancelled", ["show"]),
    ],
)
def test_a_controller_that_is_away_for_a_while_ends_no_training(tmp_path, monkeypatch, silent, state, outcome, asked):
    tool = tmp_path / "scontrol"
    tool.write_text(SCONTROL.format(folder=tmp_path, silent=silent, state=state))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(after.time, "sleep", lambda seconds: None)
    files = Files(tmp_path, "7")
    files.again.touch()
    assert end(files, 5, 0) == 0
    assert files.outcome.read_text().split() == [outcome]
    assert [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()] == asked


def test_a_controller_that_stays_away_is_no_cancellation(tmp_path, monkeypatch):
    for name in ("scontrol", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(after, "PATIENCE", 0)
    files = Files(tmp_path, "7")
    assert end(files, 5, 137) == 1
    assert files.outcome.read_text().startswith(
        "failed Slurm neither requeues nor takes the job again: Unable to contact"
    )


def test_the_first_rank_that_knows_the_cause_is_heard_in_one_sentence(tmp_path):
    _note(tmp_path / "cause", OSError("Caught OSError in a worker\nTraceback\n  ...\nOSError: no answer from there"))
    _note(tmp_path / "cause", OSError("something else"))
    assert (tmp_path / "cause").read_text() == "OSError: no answer from there"
