"""A server that answers 500 in the last minute of a run: whoever comes next closes the run, with its own status."""

import signal

import pytest

from fvdm.tracking import Tracker, run_of
from fvdm.tracking import tracker as tracking
from fvdm.tracking.config import TrackingConfig
from launchers.after import close_mlflow_run
from tests.data_fixtures import make_shards
from tests.runs import launch, losses, wait_until, words
from tests.tracking.conftest import QUIET, FailingProxy, Server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def proxy(server, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    proxy = FailingProxy(server)
    yield proxy
    proxy.close()


def run_on(server, folder):
    from mlflow.tracking import MlflowClient

    return MlflowClient(server.uri).get_run(run_of(folder))


@pytest.mark.parametrize("status", ["FINISHED", "FAILED"])
def test_the_end_that_a_run_could_not_report_is_reported_for_it(server, proxy, tmp_path, monkeypatch, capsys, status):
    """By `close_mlflow_run`, which the job itself, who follows it and the local launcher all call at its end."""
    monkeypatch.setattr(tracking, "TIMEOUT", 0.5)
    monkeypatch.setattr("launchers.after.CLOSE_TIMEOUT", 0.5)
    tracker = Tracker(tmp_path / "run", TrackingConfig(proxy.uri, **QUIET), "run")
    tracker.metrics({"loss": 1.0}, 1)
    wait_until(lambda: tracker.run_id and not tracker.unsent())
    proxy.failing.set()
    tracker.metrics({"loss": 0.5}, 2)
    tracker.close(status)
    assert run_on(server, tmp_path / "run").info.status == "RUNNING"
    close_mlflow_run(tmp_path / "run", "KILLED")
    assert "MLflow has not taken the end of run: its next start sends it" in capsys.readouterr().out
    assert run_on(server, tmp_path / "run").info.status == "RUNNING"
    proxy.failing.clear()
    close_mlflow_run(tmp_path / "run", "KILLED")
    assert run_on(server, tmp_path / "run").info.status == status, "its own, not that of the launcher"
    assert run_on(server, tmp_path / "run").data.metrics["loss"] == 0.5


def test_a_training_run_on_this_machine_is_closed_by_its_launcher(server, proxy, tmp_path):
    latents = make_shards(tmp_path / "latents", [12, 9, 10], labels=True)
    (tmp_path / "c.yaml").write_text("name: run\n")
    more = ["--steps", 10**6, "--tracking.uri", proxy.uri]
    launcher = launch(words(latents, tmp_path, "run", *more), tmp_path)
    journal = tmp_path / "runs" / "run" / "events.jsonl"
    wait_until(lambda: run_of(journal.parent) and "loss/mean" in journal.read_text())
    proxy.failing.set()
    launcher.send_signal(signal.SIGTERM)
    for line in launcher.stdout:
        if "has not taken everything" in line:
            proxy.failing.clear()  # Later than the run itself can report.
    assert launcher.wait(timeout=60) == 128 + signal.SIGTERM
    run = run_on(server, journal.parent)
    assert run.info.status == "KILLED"
    last = max(losses(tmp_path, "run").items())
    assert run.data.metrics["loss/mean"] == pytest.approx(last[1])
