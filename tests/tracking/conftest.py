"""An MLflow database for each test, copied from one that is made once; and a server that may go away and come back."""

import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from fvdm.distributed import free_port
from fvdm.tracking import tracker as tracking
from fvdm.tracking.config import TrackingConfig
from fvdm.tracking.server import open_client
from tests.runs import empty_database

OF_A_HOP = ("host", "transfer-encoding")
QUIET = {"experiment": "tests", "system_metrics": False}


@pytest.fixture(autouse=True)
def timeout(monkeypatch):
    """A busy machine may take its time."""
    monkeypatch.setattr(tracking, "TIMEOUT", 120.0)
    monkeypatch.setattr(tracking, "STOPPED_TIMEOUT", 120.0)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Settings for a database of this test, from whose folder it runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_database(), tmp_path / "mlflow.db")
    return TrackingConfig(f"sqlite:///{tmp_path}/mlflow.db", **QUIET)


@pytest.fixture
def client(config):
    """A client of the test's database."""
    return open_client(config.uri)


class Server:
    """An MLflow server on this machine."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        if not (self.folder / "server.db").exists():
            shutil.copy(empty_database(), self.folder / "server.db")
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            # Jobs would be eight more processes, half a core even when there are none.
            env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
        for _ in range(900):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1)
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError("the MLflow server did not start")

    def kill(self):
        os.killpg(self.process.pid, 9)
        self.process.wait()


class FailingProxy:
    """Stands before an MLflow server, and answers 500 to everything while `failing` is set."""

    def __init__(self, server):
        self.failing = failing = threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def body(self):
                if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
                chunks = [b""]  # As requests sends an empty file, such as the patch of a clean repository.
                while size := int(self.rfile.readline(), 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(chunks)

            def forward(self):
                body = self.body()
                status, answer = 500, b'{"error_code": "INTERNAL_ERROR", "message": "the disk is full"}'
                if not failing.is_set():
                    headers = {name: value for name, value in self.headers.items() if name.lower() not in OF_A_HOP}
                    request = urllib.request.Request(server.uri + self.path, body, headers, method=self.command)
                    try:
                        with urllib.request.urlopen(request, timeout=60) as found:
                            status, answer = found.status, found.read()
                    except urllib.error.HTTPError as error:
                        status, answer = error.code, error.read()
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

            def log_message(self, *words):
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()
