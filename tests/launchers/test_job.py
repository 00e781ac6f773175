"""Where the ranks of a job meet, and what the script around them decides; tests/slurm runs it on a real Slurm."""

import os
import shutil
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from launchers import after
from launchers.after import Files, begin, end, failure
from launchers.job import _meet, _note, address_of, ports
from launchers.submission import follow_on_slurm
from tests.runs import ROOT, wait_until


def test_the_port_comes_from_the_jobs_number_and_is_drawn_again_if_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    files = Files(tmp_path, "1234")
    tried = ports("1234", 1)
    first, second = next(tried), next(tried)
    assert first == next(ports("1234", 1)) != next(ports("1234", 2))
    found = {}

    def rank(number):
        environment = SimpleNamespace(global_rank=number, raw_job_id="1234", hostnames=["node7"])
        found[number] = _meet(files, environment, "")

    with socket.socket() as taken:
        taken.bind(("", first))
        waiting = threading.Thread(target=rank, args=(1,))  # comes before rank 0
        waiting.start()
        rank(0)
        waiting.join(10)
    assert found == {0: ("node7", second), 1: ("node7", second)}


def test_the_rendezvous_is_on_the_interface_that_was_named(tmp_path):
    """The address of the host's name may lie on another network, which does not reach the other nodes."""
    environment = SimpleNamespace(global_rank=0, raw_job_id="1234", hostnames=["node7"])
    assert _meet(Files(tmp_path, "1234"), environment, "lo")[0] == "127.0.0.1"
    with pytest.raises(ValueError, match=r"--interface ib7 does not exist on .*; its interfaces: .*\blo\b"):
        address_of("ib7")


def test_the_reason_is_that_of_the_rank_that_srun_saw_fail_first(tmp_path):
    files = Files(tmp_path, "7")
    files.log.write_text("srun: error: node9: task 5: Killed\n")
    files.log_of(1).write_text("ValueError: of an earlier start\n")
    begin(files)
    with files.log.open("a") as file:
        file.write("srun: error: node2: task 1: Exited with exit code 1\nsrun: error: node1: task 0: Killed\n")
    assert failure(files, 137).startswith("rank 1 on node2 failed first: Exited with exit code 1. Its log")
    with files.log_of(1).open("a") as file:
        file.write("[rank1]: Traceback\n[rank1]: torch.OutOfMemoryError: it broke\nsubmitit ERROR\n")
    expected = "rank 1 on node2 failed first: Exited with exit code 1 (torch.OutOfMemoryError: it broke)"
    assert failure(files, 137).startswith(expected)
    assert failure(Files(tmp_path, "8"), 9) == "the ranks ended with exit code 9"
    files.cause.write_text("rank 3 hangs")
    assert failure(files, 137).startswith("rank 3 hangs. The log: ")
    files.mark.unlink()
    files.log.write_text("srun: error: node3: task 2: Killed\n")  # What a survivor reports is no cause then.
    assert failure(files, 137).startswith("rank 2 on node3 failed first: Killed")


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
    monkeypatch.setattr(after, "TIMEOUT", 0)
    files = Files(tmp_path, "7")
    assert end(files, 5, 137) == 1
    assert files.outcome.read_text().startswith(
        "failed Slurm neither requeues nor takes the job again: Unable to contact"
    )


FOLLOWED = """#!/bin/sh
echo look >> {folder}/looks
case $(wc -l < {folder}/looks) in
    1) echo 'Unable to contact slurm controller' >&2; exit 1 ;;
    2) echo RESIZING ;;
    *) echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1 ;;
esac
"""


def test_who_follows_a_job_takes_only_slurms_own_word_for_its_end(tmp_path, monkeypatch, capsys):
    (tmp_path / "squeue").write_text(FOLLOWED.format(folder=tmp_path))
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(after, "TIMEOUT", 0)
    monkeypatch.setattr(after.time, "sleep", lambda seconds: None)
    assert follow_on_slurm(Files(tmp_path, "7")) == 1
    assert capsys.readouterr().err == "error: job 7 is no longer in Slurm's queue\n"
    assert len((tmp_path / "looks").read_text().splitlines()) == 3


def test_the_first_rank_that_knows_the_cause_is_heard_in_one_sentence(tmp_path):
    _note(tmp_path / "cause", OSError("Caught OSError in a worker\nTraceback\n  ...\nOSError: no answer from there"))
    _note(tmp_path / "cause", OSError("something else"))
    assert (tmp_path / "cause").read_text() == "OSError: no answer from there"


SQUEUE = """#!/bin/sh
echo look >> {folder}/looks
[ $(wc -l < {folder}/looks) -le 2 ] && echo 7.0
echo 7.batch
"""


def test_srun_that_waits_for_ranks_that_are_gone_is_ended(tmp_path):
    """A shell plays the sbatch file, with a process of srun's name; the watcher runs as it does there."""
    for name, text in (("squeue", SQUEUE.format(folder=tmp_path)), ("sinfo", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "srun").symlink_to(shutil.which("sleep"))
    script = tmp_path / "job.sh"
    quick = "import os; from launchers import after; after.WATCH_EVERY = 0.05; after.watch(os.getppid())"
    script.write_text(f"{sys.executable} -c '{quick}' &\n{tmp_path}/srun 600\necho srun ended with $?\nwait\n")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", str(script)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "srun ended with 137" in done.stdout
    assert "srun waits for ranks that have ended" in done.stdout
    assert len((tmp_path / "looks").read_text().splitlines()) == 2 + after.MISSING_LOOKS


@pytest.mark.parametrize(("outcome", "status"), [("done", "FINISHED"), ("error", "FAILED"), ("cancelled", "KILLED")])
def test_a_run_that_could_not_report_its_end_is_closed_in_mlflow(tmp_path, monkeypatch, outcome, status):
    from mlflow.tracking import MlflowClient

    from fvdm.tracking import Tracker, run_of
    from fvdm.tracking.config import TrackingConfig

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run = tmp_path / "runs" / "run"
    tracker = Tracker(run, TrackingConfig(uri, system_metrics=False), "run")
    wait_until(lambda: run_of(run) and not tracker.unsent())
    tracker._wake.put(False)  # Its sender ends without a report, as that of a killed process.
    tracker._thread.join()
    files = Files(tmp_path, "7")
    files.progress.write_text(str(run / "checkpoints"))
    if outcome == "error":
        files.error.write_text("a mistake")
    monkeypatch.setattr(after, "_still_running", lambda: False)
    end(files, 5, 1 if outcome == "cancelled" else 0)
    assert MlflowClient(uri).get_run(run_of(run)).info.status == status
