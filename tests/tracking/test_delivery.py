"""What goes wrong between a journal and MLflow: refused events, deleted runs, wrong addresses, killed processes."""

import http.server
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from fvdm.tracking import close_run
from fvdm.tracking import tracker as tracking
from fvdm.tracking.config import TrackingConfig
from fvdm.tracking.logged_model import LoggedModel
from fvdm.tracking.server import check, open_client
from fvdm.tracking.tracker import Tracker
from tests.data_fixtures import make_shards, real_frames, write_video
from tests.runs import ROOT, wait_until
from tests.tracking.conftest import QUIET, Server


def history(client, run_id, key):
    return sorted((m.step, m.value) for m in client.get_metric_history(run_id, key))


def test_events_that_mlflow_refuses_are_skipped_with_one_warning(client, config, tmp_path, caplog):
    """A metric, an image, tags and a setting that MLflow takes from nobody, and good ones before, between and after."""
    picture = tmp_path / "picture.png"
    picture.write_text("no image")
    tracker = Tracker(tmp_path / "run", config, "run", {"lr": 0.1, "k" * 300: 1, "seed": 5})
    tracker.metrics({"loss": 1.0, "m" * 300: 2.0, "speed": 3.0}, 1)
    tracker.image(picture, "previews/task", 1)
    tracker.set_tags({"t" * 300: "x"})
    tracker.metrics({"loss": 0.5}, 2)
    tracker.close()
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.data.params) == ("FINISHED", {"lr": "0.1", "seed": "5"})
    assert history(client, tracker.run_id, "loss") == [(1, 1.0), (2, 0.5)]
    assert history(client, tracker.run_id, "speed") == [(1, 3.0)]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "does not take an event" in warning
    refused = [json.loads(line) for line in (tmp_path / "run" / "refused.jsonl").read_text().splitlines()]
    assert len(refused) == 4
    assert all(entry["reason"] for entry in refused)
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert "m" * 300 in events


def test_an_event_that_fails_again_and_again_while_others_pass_is_skipped(client, config, tmp_path, monkeypatch):
    """A file store of artifacts that takes nothing, beside a database that takes everything."""
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr(tracking, "LONGEST_PAUSE", 0.01)

    def fail(*words, **more):
        raise OSError("no such bucket")

    monkeypatch.setattr(MlflowClient, "log_artifact", fail)
    (tmp_path / "note.txt").write_text("hello")
    tracker = Tracker(tmp_path / "run", config, "run")
    tracker.artifact(tmp_path / "note.txt")
    tracker.metrics({"loss": 0.5}, 2)
    tracker.close()
    assert not tracker.unsent()
    assert history(client, tracker.run_id, "loss") == [(2, 0.5)]
    assert "no such bucket" in (tmp_path / "run" / "refused.jsonl").read_text()


@pytest.mark.parametrize("gone", ["deleted", "purged", "another server"])
def test_a_run_that_is_no_longer_there_gets_a_new_one_with_the_whole_journal(client, config, tmp_path, gone, caplog):
    first = Tracker(tmp_path / "run", config, "run", {"lr": 0.1})
    first.metrics({"loss": 1.0}, 1)
    first.close("KILLED")
    if gone == "another server":
        shutil.copy(tmp_path / "mlflow.db", tmp_path / "other.db")
        client = open_client(f"sqlite:///{tmp_path}/other.db")
        config = TrackingConfig(f"sqlite:///{tmp_path}/other.db", **QUIET)
    before = first.run_id
    client.delete_run(before)
    if gone == "purged":
        client._tracking_client.store._hard_delete_run(before)
    again = Tracker(tmp_path / "run", config, "run", {"lr": 0.1})
    again.metrics({"loss": 0.5}, 2)
    again.close()
    assert again.run_id != before
    run = client.get_run(again.run_id)
    assert (run.info.status, run.data.params) == ("FINISHED", {"lr": "0.1"})
    assert history(client, again.run_id, "loss") == [(1, 1.0), (2, 0.5)]
    assert f"mlflow runs restore --run-id {before}" in caplog.text


def test_a_run_that_is_deleted_while_it_goes_on_gets_a_new_one(client, config, tmp_path):
    tracker = Tracker(tmp_path / "run", config, "run")
    tracker.metrics({"loss": 1.0}, 1)
    wait_until(lambda: tracker.run_id and not tracker.unsent())
    before = tracker.run_id
    client.delete_run(before)
    tracker.metrics({"loss": 0.5}, 2)
    tracker.close()
    assert tracker.run_id != before
    assert history(client, tracker.run_id, "loss") == [(1, 1.0), (2, 0.5)]


def test_a_deleted_experiment_gets_the_command_that_restores_it(client, config, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "LONGEST_PAUSE", 0.01)
    tracker = Tracker(tmp_path / "run", config, "run")
    tracker.metrics({"loss": 1.0}, 1)
    wait_until(lambda: tracker.run_id and not tracker.unsent())
    experiment = client.get_run(tracker.run_id).info.experiment_id
    client.delete_experiment(experiment)
    tracker.metrics({"loss": 0.5}, 2)
    wait_until(lambda: "restore" in caplog.text)
    sentence = caplog.text.partition("restore it with: ")[2].partition(";")[0]
    assert sentence.split()[1:] == ["mlflow", "experiments", "restore", "--experiment-id", str(experiment)]
    client.restore_experiment(experiment)
    tracker.close()
    assert history(client, tracker.run_id, "loss") == [(1, 1.0), (2, 0.5)]
    assert caplog.text.count("mlflow experiments restore") == 1


def test_addresses_that_cannot_work_are_refused_in_one_sentence(tmp_path):
    (tmp_path / "text.db").write_text("not a database, whatever its name says")
    for uri, sentence in (
        ("mlruns", "no longer keeps runs in plain files"),
        (f"file://{tmp_path}/mlruns", "no longer keeps runs in plain files"),
        ("htp://host:5000", "htp is no MLflow address"),
        (f"sqlite:///{tmp_path}/none/mlflow.db", "there is no folder"),
        (f"sqlite:///{tmp_path}/text.db", "is not an SQLite database"),
        (f"sqlite:///{tmp_path}", "is not an SQLite database"),
    ):
        with pytest.raises(ValueError, match=sentence):
            TrackingConfig(uri)
        with pytest.raises(ValueError, match=sentence):
            check(uri)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["launchers/slurm_train.py", "--cluster", "local", "--nodes", "1", "--data.path", "latents"],
        ["-m", "fvdm.training.loop", "--name", "run", "--data.path", "latents"],
        ["-m", "fvdm", "generate", "--checkpoint", "example", "--out", "out"],
        ["-m", "fvdm", "ui"],
        ["data_prep/encode_latents.py", "--videos", "clips", "--out", "encoded"],
    ],
    ids=lambda words: " ".join(words[:3]),
)
def test_a_file_store_in_the_environment_ends_a_command_before_it_begins(words, tmp_path):
    make_shards(tmp_path / "latents", [30, 30])
    write_video(tmp_path / "clips" / "a.mp4", real_frames()[:20])
    before = set(tmp_path.iterdir())
    words = [str(ROOT / words[0]), *words[1:]] if words[0].endswith(".py") else words
    hidden = {"MLFLOW_TRACKING_URI": "mlruns", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=os.environ | hidden, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: the tracking address mlruns cannot be used")
    assert set(tmp_path.iterdir()) == before


class _Other(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/version" and self.server.page else 404)
        self.end_headers()
        self.wfile.write(b"<html>a wiki</html>")

    def log_message(self, *words):
        pass


@pytest.mark.parametrize("page", [True, False])
def test_a_server_that_is_not_mlflow_is_refused_and_one_that_is_away_is_not(page):
    server = http.server.HTTPServer(("127.0.0.1", 0), _Other)
    server.page = page
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(ValueError, match="not MLflow"):
        check(uri)
    server.shutdown()
    server.server_close()
    check(uri)


def test_the_environment_names_the_experiment(client, config, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "faces")
    for given, expected in (("", "faces"), ("given", "given")):
        tracker = Tracker(tmp_path / expected, TrackingConfig(config.uri, given, False), "run")
        tracker.close()
        experiment = client.get_experiment(client.get_run(tracker.run_id).info.experiment_id)
        assert experiment.name == expected
        assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
        assert expected in experiment.tags["mlflow.note.content"]


def test_a_model_is_registered_at_the_runs_own_address(client, config, tmp_path, monkeypatch):
    """mlflow's registry of a database looks for the logged model at the global address, which is another one here."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/elsewhere.db")
    code = tmp_path / "code.py"
    code.write_text(
        "import mlflow\n"
        "class Model(mlflow.pyfunc.PythonModel):\n"
        "    def predict(self, context, model_input, params=None):\n"
        "        return model_input\n"
        "mlflow.models.set_model(Model())\n"
    )
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w").write_text("1")
    columns = [{"name": "task", "type": "string", "required": True}]
    signature = {"inputs": columns, "outputs": columns}
    model = LoggedModel(
        str(tmp_path / "weights"), str(code), "step-1", "cats", 1, signature, [{"task": "x"}], ["numpy"], {}
    )
    tracker = Tracker(tmp_path / "run", config, "run")
    tracker.log_model(model)
    tracker.close()
    assert not tracker.unsent()
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    (version,) = client.search_model_versions("name = 'cats'")
    assert version.run_id == tracker.run_id
    assert not (tmp_path / "elsewhere.db").exists()
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/elsewhere.db"


@pytest.mark.slow
@pytest.mark.parametrize("home", [None, "/nonexistent", "/proc/1"])
def test_a_home_folder_that_is_not_there_does_not_matter(config, tmp_path, home):
    program = (
        "import sys; from pathlib import Path; from fvdm.tracking import tracker as module\n"
        "from fvdm.tracking.config import TrackingConfig; module.TIMEOUT = 120\n"
        "tracker = module.Tracker(Path('run'), TrackingConfig(sys.argv[1], 'tests', True), 'run')\n"
        "tracker.metrics({'loss': 1.0}, 1); tracker.close(); assert not tracker.unsent()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "USER", "LOGNAME")}
    environment |= {} if home is None else {"HOME": home}
    done = subprocess.run(
        [sys.executable, "-c", program, config.uri], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_outage_is_one_warning_with_its_length_at_the_end(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setattr(tracking, "LONGEST_PAUSE", 0.2)
    server = Server(tmp_path)
    server.start()
    tracker = Tracker(tmp_path / "run", TrackingConfig(server.uri, **QUIET), "run")
    try:
        tracker.metrics({"loss": 0.0}, 0)
        wait_until(lambda: tracker.run_id and not tracker.unsent())
        for outage in (1, 2):
            server.kill()
            for step in range(20):
                tracker.metrics({"loss": float(step)}, 100 * outage + step)
                time.sleep(0.1)  # Each is an attempt of its own.
            wait_until(lambda: caplog.text.count("does not answer") == outage)  # noqa: B023
            server.start()
            wait_until(lambda: caplog.text.count("answers again after") == outage)  # noqa: B023
        tracker.close()
    finally:
        server.kill()
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert ["does not answer" in message for message in messages] == [True, False, True, False]


def killed(folder, config, journal_only=False):
    """A process that reports a run and is killed before it can report its end; returns nothing."""
    program = (
        "import os, sys, time; from pathlib import Path; from fvdm.tracking import tracker as module\n"
        "from fvdm.tracking.config import TrackingConfig\n"
        "if sys.argv[3] == 'True': module.Tracker._send_all = lambda self: None\n"
        "run = module.Tracker(Path(sys.argv[1]), TrackingConfig(sys.argv[2], 'tests', False), 'run', {'lr': 0.1})\n"
        "run.metrics({'loss': 1.0}, 1)\n"
        "while sys.argv[3] == 'False' and (not run.run_id or run.unsent()): time.sleep(0.1)\n"
        "run.metrics({'loss': 0.5}, 2); os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(folder), config.uri, str(journal_only)], timeout=120)


@pytest.mark.parametrize("journal_only", [False, True])
def test_a_killed_run_is_closed_with_what_its_journal_holds(client, config, tmp_path, journal_only):
    """Also one that MLflow has never heard of: its journal says all that a run needs."""
    killed(tmp_path / "run", config, journal_only)
    assert close_run(tmp_path / "run", "FAILED")
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params) == ("run", "FAILED", {"lr": "0.1"})
    assert run.info.start_time <= run.info.end_time, "also of a run that MLflow hears of after its end"
    assert history(client, run.info.run_id, "loss") == [(1, 1.0), (2, 0.5)]
    assert "Failed" in run.data.tags["mlflow.note.content"]
    assert close_run(tmp_path / "run", "KILLED"), "it has its end already"
    assert client.get_run(run.info.run_id).info.status == "FAILED"


def test_a_run_that_reported_its_end_keeps_it_and_one_that_began_again_is_running(client, config, tmp_path):
    tracker = Tracker(tmp_path / "run", config, "run")
    tracker.close("FINISHED")
    assert close_run(tmp_path / "run", "KILLED")
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    again = Tracker(tmp_path / "run", config, "run")
    wait_until(lambda: not again.unsent())
    assert client.get_run(tracker.run_id).info.status == "RUNNING"
    assert not close_run(tmp_path / "run", "KILLED", timeout=0.1), "its process still reports"
    again.close("KILLED")
    assert client.get_run(tracker.run_id).info.status == "KILLED"
    assert close_run(tmp_path / "nothing", "KILLED")
    with pytest.raises(ValueError, match="FINISHED, FAILED, KILLED"):
        close_run(tmp_path / "run", "DONE")


def test_a_journal_of_version_0_1_is_read_sent_and_closed(client, config, tmp_path):
    """Without a `start`, with the former keys of its events, and half sent to a run with the former names."""
    experiment = client.create_experiment("tests")
    run_id = client.create_run(experiment, run_name="old", tags={"kind": "train"}).info.run_id
    client.log_metric(run_id, "optim/lr", 0.1, step=1)
    child = client.create_run(experiment).info.run_id
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        f"name: old\ntracking: {{uri: '{config.uri}', experiment: tests, system_metrics: true}}\n"
    )
    model = {"folder": str(tmp_path / "none"), "code": "", "name": "step-2", "registered": "old", "step": 2}
    model |= {"signature": {}, "example": [], "requirements": [], "about": {}}
    first = json.dumps({"metrics": {"optim/lr": 0.1}, "step": 1, "time": 1}) + "\n"
    rest = [{"metrics": {"optim/lr": 0.2, "loss/mean": 1.0}, "step": 2, "time": 2}]
    rest += [{"adopt": child, "time": 3}, {"model": model, "time": 4}, {"tags": {"command": "x"}, "time": 5}]
    (folder / "events.jsonl").write_text(first + "".join(json.dumps(event) + "\n" for event in rest))
    (folder / "tracking.json").write_text(
        json.dumps({"sent": len(first), "run_id": run_id, "own": True, "experiment_id": experiment})
    )
    assert close_run(folder, "KILLED")
    assert history(client, run_id, "optim/lr") == [(1, 0.1), (2, 0.2)]
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["command"]) == ("KILLED", "x")
    assert client.get_run(child).data.tags["mlflow.parentRunId"] == run_id
    again = Tracker(folder, config, "old", tags={"kind": "train"})
    again.metrics({"optim/lr": 0.3}, 3)
    again.close()
    assert again.run_id == run_id
    assert history(client, run_id, "optim/lr") == [(1, 0.1), (2, 0.2), (3, 0.3)], "the curve continues"
