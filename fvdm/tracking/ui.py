"""The server of MLflow's pages for a database, on loopback, without telemetry and without noise."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import webbrowser
from pathlib import Path
from typing import Any

from fvdm.tracking import pages
from fvdm.tracking.config import check_uri, database_file, is_server, tracking_uri
from fvdm.tracking.server import newest_experiment, open_client, prepare

TIMEOUT = 120.0  # seconds in which the server must start


def show(uri: str = "", port: int = pages.PORT, browser: bool = True) -> None:
    """Print the address of the newest experiment's runs, open it on a desktop, and serve it until Ctrl-C.

    Args:
        uri: tracking address; empty takes what applies. A server has its own pages: none is started for it.
        port: of the server that is started for a database.
        browser: open a browser where there is a desktop.

    Raises:
        ValueError: if the address cannot be used, the port is taken, or the server does not start.
    """
    uri = tracking_uri(uri)
    check_uri(uri)
    prepare()
    if is_server(uri):
        _point_to(_front(uri, pages.server_of(uri)), browser)
        return
    address = pages.local_server(port)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise ValueError(
                f"port {port} is taken; if that is fvdm ui, open {address}, else choose another with: "
                f"fvdm ui --port {port + 1}"
            ) from None
    front = _front(uri, address)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # The server ends with this process.
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            _command(uri, port), stdout=log, stderr=subprocess.STDOUT, env=_environment(), start_new_session=True
        )
        try:
            _wait(server, f"{address}/health", log)
            _point_to(front, browser)
            print("Ctrl-C ends the server", flush=True)
            server.wait()
        except KeyboardInterrupt:
            print()
        finally:
            server.terminate()
            server.wait()


def _command(uri: str, port: int) -> list[str]:
    files = (database_file(uri) or Path("mlflow.db")).resolve().parent / "mlartifacts"
    words = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    words += ["--port", str(port), "--workers", "1", "--default-artifact-root", files.as_uri()]
    return [*words, "--uvicorn-opts", "--log-level warning"]


def _environment() -> dict[str, str]:
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    # Five processes for the evaluation of language models.
    return os.environ | quiet | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def _front(uri: str, address: str) -> str:
    """The page to begin with: the runs of the newest experiment, or the list of all."""
    try:
        experiment = newest_experiment(open_client(uri))
    except Exception as error:  # Of mlflow, the network or a database of another version.
        raise ValueError(f"MLflow cannot open {uri}: {' '.join(str(error).split())}") from None
    return pages.experiment_page(address, experiment) if experiment else pages.front_page(address)


def _wait(server: "subprocess.Popen[bytes]", health: str, log: Any) -> None:
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            urllib.request.urlopen(health, timeout=1).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                last = (log.read().strip().splitlines() or ["it said nothing"])[-1]
                raise ValueError(f"the MLflow server did not start: {last}") from None
            time.sleep(0.2)


def _point_to(page: str, browser: bool) -> None:
    print(page, flush=True)
    desktop = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if browser and desktop:
        webbrowser.open(page)
