"""Against a real MLflow: a database, and a server that goes away and comes back."""

import json
import logging
import signal
import subprocess
import sys

import pytest

from fvdm.distributed import free_port
from fvdm.tracking import tracker as tracking
from fvdm.tracking.config import TrackingConfig
from fvdm.tracking.delivery import shown_name
from fvdm.tracking.tracker import Tracker, run_of
from tests.data_fixtures import make_shards
from tests.runs import environment, losses, wait_until, words
from tests.tracking.conftest import QUIET, Server


def history(client, run_id, key):
    return [(m.step, m.value) for m in client.get_metric_history(run_id, key)]


def test_a_run_has_its_metrics_settings_files_and_end(client, config, tmp_path):
    tracker = Tracker(tmp_path / "run", config, "first", {"lr": 0.1}, {"kind": "test"})
    for step in range(5):
        tracker.metrics({"loss": 1.0 / (step + 1)}, step)
    (tmp_path / "note.txt").write_text("hello")
    tracker.artifact(tmp_path / "note.txt", "notes")
    picture = tmp_path / "picture.png"
    from PIL import Image

    Image.new("RGB", (8, 8)).save(picture)
    tracker.image(picture, "samples", 3)
    tracker.close()
    run = client.get_run(tracker.run_id)
    assert run.info.run_name == "first"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1"}
    assert run.data.tags["kind"] == "test"
    assert history(client, tracker.run_id, "loss") == [(s, 1.0 / (s + 1)) for s in range(5)]
    assert [f.path for f in client.list_artifacts(tracker.run_id, "notes")] == ["notes/note.txt"]
    assert any("samples" in f.path for f in client.list_artifacts(tracker.run_id, "images"))


@pytest.mark.slow
def test_runs_that_start_at_once_make_one_database(tmp_path):
    """Three processes, none of which finds a database: each of them reports its run."""
    program = (
        "import sys, time; from pathlib import Path; import mlflow.tracking\n"
        "from fvdm.tracking import tracker as module; from fvdm.tracking.config import TrackingConfig\n"
        "from fvdm.tracking.tracker import Tracker; module.TIMEOUT = 120\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "config = TrackingConfig(f'sqlite:///{sys.argv[1]}/mlflow.db', 'tests', False)\n"
        "tracker = Tracker(Path(sys.argv[1]) / sys.argv[2], config, sys.argv[2]); tracker.close()\n"
        "assert not tracker.unsent()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([*command, name], cwd=tmp_path, **pipes) for name in "abc"]
    assert all(process.stdout.readline() == "ready\n" for process in running)
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        process.communicate(timeout=120)
    assert [process.returncode for process in running] == [0, 0, 0]

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert {(run.info.run_name, run.info.status) for run in found} == {(name, "FINISHED") for name in "abc"}


@pytest.mark.slow
def test_a_kill_while_the_database_is_made_spoils_nothing(config, tmp_path):
    program = "import sys; from fvdm.tracking.server import open_client; open_client(sys.argv[1])"
    (tmp_path / "mlflow.db").unlink()
    victim = subprocess.Popen([sys.executable, "-c", program, config.uri], cwd=tmp_path)
    wait_until((tmp_path / ".tmp-mlflow.db").exists)
    victim.kill()
    victim.wait()
    assert not (tmp_path / "mlflow.db").exists()
    tracker = Tracker(tmp_path / "run", config, "after")
    tracker.close()
    assert not tracker.unsent()
    assert not (tmp_path / ".tmp-mlflow.db").exists()


def test_resuming_continues_the_same_run_and_a_changed_setting_is_a_tag(client, config, tmp_path):
    first = Tracker(tmp_path / "run", config, "run", {"lr": 0.1, "steps": 10})
    first.metrics({"loss": 1.0}, 1)
    first.close("KILLED")
    again = Tracker(tmp_path / "run", config, "run", {"lr": 0.1, "steps": 20})
    again.metrics({"loss": 0.5}, 2)
    again.close()
    assert again.run_id == first.run_id
    run = client.get_run(first.run_id)
    assert history(client, first.run_id, "loss") == [(1, 1.0), (2, 0.5)]
    assert run.data.params["steps"] == "10"
    assert run.data.tags["changed.steps"] == "20"
    assert "changed.lr" not in run.data.tags


def test_a_setting_that_is_new_in_a_resumed_run_becomes_a_parameter(client, config, tmp_path):
    """Of a run that an older version began, or whose start was cut short between two calls."""
    Tracker(tmp_path / "run", config, "run", {"lr": 0.1}).close("KILLED")
    again = Tracker(tmp_path / "run", config, "run", {"lr": 1.0, "seed": 5})
    again.close()
    run = client.get_run(again.run_id)
    assert run.data.params == {"lr": "0.1", "seed": "5"}
    assert {k: v for k, v in run.data.tags.items() if k.startswith("changed")} == {"changed.lr": "1.0"}


def test_every_setting_is_a_parameter_whatever_its_number_and_length(client, config, tmp_path, caplog):
    """MLflow takes 100 parameters in a call, of 6000 characters each, and no other value afterwards."""
    params = {f"part.{k}": k for k in range(230)} | {"long": "x" * 9000, "empty": "", "none": None}
    for _ in range(2):
        tracker = Tracker(tmp_path / "run", config, "run", params)
        tracker.close()
        assert not tracker.unsent()
    run = client.get_run(tracker.run_id)
    assert run.data.params == {k: str(v)[:6000] for k, v in params.items()}
    assert not [name for name in run.data.tags if name.startswith("changed")]
    assert not caplog.records


def test_reporting_into_a_run_leaves_its_state_alone(client, config, tmp_path):
    owner = Tracker(tmp_path / "run", config, "run")
    owner.close("KILLED")
    guest = Tracker(tmp_path / "guest", config, "guest", {"x": 1}, run_id=owner.run_id)
    guest.metrics({"fvd": 12.0}, 0)
    guest.close()
    run = client.get_run(owner.run_id)
    assert run.info.status == "KILLED"
    assert run.data.metrics["fvd"] == 12.0
    assert "x" not in run.data.params


def test_a_folder_reports_into_the_run_that_is_named(client, config, tmp_path):
    owners = [Tracker(tmp_path / name, config, name) for name in "ab"]
    for owner in owners:
        owner.close()
    for value, owner in enumerate([owners[0], owners[1], owners[0]]):
        guest = Tracker(tmp_path / "guest", config, "guest", run_id=owner.run_id)
        guest.metrics({"fvd": float(value)}, value)
        guest.close()
    assert history(client, owners[0].run_id, "fvd") == [(0, 0.0), (2, 2.0)]
    assert history(client, owners[1].run_id, "fvd") == [(1, 1.0)]


def test_a_report_renews_an_earlier_run_with_its_tags(client, config, tmp_path):
    first = Tracker(tmp_path / "run", config, "run", tags={"command": "old", "kept": "yes"})
    first.close()
    again = Tracker(tmp_path / "again", config, "run", run_id=first.run_id)
    again.set_tags({"command": "new"})
    again.close()
    tags = client.get_run(first.run_id).data.tags
    assert (tags["command"], tags["kept"]) == ("new", "yes")
    assert again.run_id == first.run_id


def test_a_journal_that_a_kill_cut_short_loses_that_event_only(client, config, tmp_path):
    first = Tracker(tmp_path / "run", config, "run")
    first.metrics({"loss": 1.0}, 1)
    first.close()
    with (tmp_path / "run" / "events.jsonl").open("ab") as journal:
        journal.write(b'{"metrics": {"loss": 9')
    again = Tracker(tmp_path / "run", config, "run")
    again.metrics({"loss": 0.5}, 2)
    again.close()
    assert history(client, first.run_id, "loss") == [(1, 1.0), (2, 0.5)]


@pytest.mark.slow
def test_a_server_that_goes_away_loses_nothing(tmp_path, monkeypatch, caplog):
    from mlflow.tracking import MlflowClient

    caplog.set_level(logging.WARNING)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    server = Server(tmp_path)
    server.start()
    tracker = Tracker(tmp_path / "run", TrackingConfig(server.uri, **QUIET), "run")
    try:
        tracker.metrics({"loss": 0.0}, 0)
        wait_until(lambda: tracker.run_id)
        server.kill()
        for step in range(1, 50):
            tracker.metrics({"loss": float(step)}, step)  # Returns though nobody answers: no step waits for the server.
        wait_until(lambda: "does not answer" in caplog.text)
        server.start()
        tracker.close()
        got = history(MlflowClient(server.uri), tracker.run_id, "loss")
        assert sorted(got) == [(step, float(step)) for step in range(50)]
        assert "does not answer" in caplog.text
    finally:
        server.kill()


@pytest.mark.slow
def test_a_training_whose_server_is_killed_in_its_middle_loses_no_metric(tmp_path):
    from mlflow.tracking import MlflowClient

    server, journal = Server(tmp_path), tmp_path / "runs" / "run" / "events.jsonl"
    latents = make_shards(tmp_path / "latents", [12, 9, 10, 30, 8, 11, 6], labels=True)

    def steps():
        return len(losses(tmp_path, "run")) if journal.exists() else 0

    def sent():
        return json.loads((journal.parent / "tracking.json").read_text())["sent"]

    server.start()
    command = [sys.executable, "-m", "fvdm.training.loop", *words(latents, tmp_path, "run", "--steps", 100000)]
    command += ["--tracking.uri", server.uri]
    shared = {"env": environment(0, 1, free_port()), "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    training = subprocess.Popen(command, cwd=tmp_path, **shared)
    try:
        wait_until(lambda: run_of(journal.parent) != "" and steps() > 3)
        server.kill()
        away = steps()
        wait_until(lambda: steps() > away + 5)
        assert training.poll() is None, "the training continued without the server"
        server.start()
        back, written_by_then = steps(), journal.stat().st_size
        wait_until(lambda: steps() > back + 5 and sent() > written_by_then)
        training.send_signal(signal.SIGTERM)
        assert training.wait(timeout=120) == 75
        # What a slow server had not taken when the run ended, the next start of the run sends.
        last = max(losses(tmp_path, "run"))
        again = subprocess.run([*command, "--steps", str(last + 1)], cwd=tmp_path, **shared, timeout=240)
        assert again.returncode == 0
        events = [json.loads(line) for line in journal.read_text().splitlines()]
        written: dict[str, list[tuple[int, float]]] = {}
        for event in events:
            for key, value in event.get("metrics", {}).items():
                written.setdefault(key, []).append((event["step"], value))
        assert len(written["loss/mean"]) > back + 5
        client = MlflowClient(server.uri)
        for key, values in written.items():
            assert sorted(history(client, run_of(journal.parent), shown_name(key))) == sorted(values), key
    finally:
        training.kill()
        server.kill()


@pytest.mark.slow
def test_what_was_not_sent_is_sent_by_the_next_start(tmp_path, monkeypatch, caplog):
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(tracking, "TIMEOUT", 3.0)
    server = Server(tmp_path)
    config = TrackingConfig(server.uri, **QUIET)
    first = Tracker(tmp_path / "run", config, "run")
    first.metrics({"loss": 1.0}, 1)
    first.close()
    assert "sent when the run is started again" in caplog.text
    assert first.run_id is None
    server.start()
    try:
        again = Tracker(tmp_path / "run", config, "run")
        again.metrics({"loss": 2.0}, 2)
        monkeypatch.setattr(tracking, "TIMEOUT", 60.0)
        again.close()
        assert sorted(history(MlflowClient(server.uri), again.run_id, "loss")) == [(1, 1.0), (2, 2.0)]
    finally:
        server.kill()


def test_the_address_is_the_given_one_the_environments_or_a_file_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert tracking.tracking_uri() == "http://127.0.0.1:1"
    assert tracking.tracking_uri("sqlite:///x") == "sqlite:///x"


def test_events_are_on_disk_at_once(tmp_path, config):
    tracker = Tracker(tmp_path / "run", config, "run")
    tracker.metrics({"loss": 1.0}, 7)
    start, event = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert start["start"]["name"] == "run"
    assert event["metrics"] == {"loss": 1.0}
    assert event["step"] == 7
    tracker.close()


def test_names_that_mlflow_refuses_do_not_block_what_comes_after(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = Tracker(tmp_path / "run", TrackingConfig(uri, system_metrics=False), "names")
    tracker.metrics({"speed/dpm++ 15, s": 1.0, "plain": 2.0}, 3)
    tracker.close()
    from mlflow.tracking import MlflowClient

    assert MlflowClient(uri).get_run(tracker.run_id).data.metrics == {"speed/dpmpp 15_ s": 1.0, "plain": 2.0}
