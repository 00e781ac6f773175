"""What follows from squeue's answers, here as Slurm 22.05 gave them; tests/slurm/test_encode.py asks a real one."""

import pytest
from submitit.core.utils import temporary_save_path

from data_prep import slurm_jobs
from data_prep.slurm_jobs import SlurmQueue, remove_result, use_cluster

INVALID = "slurm_load_jobs error: Invalid job id specified"
JOBS = ("7_0", "7_1", "7_2")


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """Sets what squeue prints, and to stderr, where it fails."""
    script = tmp_path / "squeue"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(slurm_jobs, "SHORTEST_PAUSE", 0.0)
    monkeypatch.setattr(slurm_jobs, "LONGEST_PAUSE", 0.0)

    def prints(lines="", error=""):
        script.write_text(f"#!/bin/sh\nprintf '{lines}'\n" + (f"echo '{error}' >&2; exit 1\n" if error else ""))
        script.chmod(0o755)

    return prints


@pytest.mark.parametrize(
    ("lines", "error", "states", "lost_at_once"),
    [
        (r"7_2|PENDING\n7_1|RUNNING\n7_0|COMPLETING\n", "", {}, True),
        (r"7_1|CANCELLED\n7_2|RUNNING\n7_0|CANCELLED\n", "", {"7_0": "CANCELLED", "7_1": "CANCELLED"}, True),
        # Cancelled before their start:
        (r"7|CANCELLED\n7_0|RUNNING\n", "", {"7_1": "CANCELLED", "7_2": "CANCELLED"}, True),  # by name
        (r"7_0|PENDING\n7_2|PENDING\n", "", {"7_1": ""}, False),  # that one alone
        (r"7_0|COMPLETED\n7_1|RUNNING\n7_2|PENDING\n", "", {"7_0": "COMPLETED"}, False),  # its result may be on its way
        ("", INVALID, dict.fromkeys(JOBS, ""), False),  # long ago
    ],
)
def test_a_job_is_lost_once_the_queue_has_it_no_longer(monkeypatch, squeue, lines, error, states, lost_at_once):
    squeue(lines, error)
    queue = SlurmQueue(JOBS)
    assert queue.active() == [job for job in JOBS if job not in states]
    assert queue.lost(JOBS) == (states if lost_at_once else {})
    monkeypatch.setattr(slurm_jobs, "GRACE", 0.0)
    assert queue.lost(JOBS) == states


def test_nothing_is_lost_while_slurm_does_not_answer_and_a_requeued_job_comes_back(monkeypatch, squeue, capsys):
    monkeypatch.setattr(slurm_jobs, "GRACE", 0.0)
    squeue(error="slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    queue = SlurmQueue(JOBS)
    for _ in range(3):
        assert queue.lost(JOBS) == {}
        assert queue.active() == list(JOBS)
    assert capsys.readouterr().out.count("Slurm does not answer") == 1
    squeue(r"7_0|NODE_FAIL\n7_1|RUNNING\n7_2|RUNNING\n")
    assert queue.lost(JOBS) == {"7_0": "NODE_FAIL"}
    squeue(r"7_0|PENDING\n7_1|RUNNING\n7_2|RUNNING\n")
    assert queue.lost(JOBS) == {}


def test_a_single_job_has_no_number_in_an_array(squeue):
    squeue(r"7|CANCELLED\n")
    assert SlurmQueue(["7"]).lost(["7"]) == {"7": "CANCELLED"}


def test_squeue_is_asked_about_the_cluster_that_the_jobs_are_sent_to(monkeypatch, squeue):
    monkeypatch.setenv("SLURM_CLUSTERS", "")
    squeue(r"CLUSTER: '$SLURM_CLUSTERS'\n7_0|RUNNING\n7_1|'$SLURM_CLUSTERS'\n7_2|RUNNING\n")
    use_cluster(["mem=8G", "clusters=CANCELLED"])
    assert SlurmQueue(JOBS).lost(JOBS) == {"7_1": "CANCELLED"}


def test_a_start_writes_its_result_whatever_an_earlier_one_left(tmp_path):
    path = tmp_path / "7_0_result.pkl"
    (tmp_path / "7_0_result.pkl.save_tmp").touch()  # as a full disk does
    with pytest.raises(AssertionError, match="already exists"), temporary_save_path(path):
        pass
    path.write_bytes(b"of the last start")
    remove_result(path)
    assert list(tmp_path.iterdir()) == []
    with temporary_save_path(path) as partial:
        partial.write_bytes(b"new")
    assert path.read_bytes() == b"new"
    remove_result(path)
    remove_result(path)
