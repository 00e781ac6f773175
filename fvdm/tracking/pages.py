"""Addresses of MLflow's pages. Every address that the project prints is made here.

MLflow opens in a mode for traces of language models unless the address says that one looks at trained models.
"""

import json
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from fvdm.tracking.config import is_server, tracking_uri

PORT = 5000
MODE = "?workflowType=machine_learning"


def local_server(port: int = PORT) -> str:
    """The address of the server that `fvdm ui` starts."""
    return f"http://127.0.0.1:{port}"


def server_of(uri: str) -> str:
    """The address whose pages show the runs at a tracking address: of a server, or of `fvdm ui` for a database."""
    if not is_server(uri):
        return local_server()
    parts = urlsplit(uri)
    # A password in the tracking address is not printed.
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


def experiment_page(server: str, experiment_id: str) -> str:
    """The list of the runs of an experiment."""
    return f"{server}/#/experiments/{experiment_id}/runs{MODE}"


def front_page(server: str) -> str:
    """The list of all experiments."""
    return f"{server}/#/experiments{MODE}"


def run_page(server: str, experiment_id: str, run_id: str, part: str = "model-metrics") -> str:
    """A page of a run.

    Args:
        server: its address, as `server_of` gives it; empty for a link within MLflow's own pages.
        experiment_id: of its experiment.
        run_id: its id.
        part: its charts by default; empty for the overview, or `artifacts/PATH`.
    """
    tail = f"/{quote(part)}" if part else ""
    return f"{server}/#/experiments/{experiment_id}/runs/{run_id}{tail}{MODE}"


def page_of(folder: Path) -> str:
    """The charts of the run whose journal lies in `folder`; empty while MLflow has no such run."""
    try:
        place = json.loads((folder / "tracking.json").read_text())
        return run_page(server_of(place.get("uri") or tracking_uri()), place["experiment_id"], place["run_id"])
    except (OSError, ValueError, KeyError):
        return ""


def where_to_look(folder: Path) -> str:
    """For the terminal: where the run of `folder` is seen in MLflow, or that MLflow has none yet."""
    page = page_of(folder)
    if not page:
        return "the server does not answer; the run has no page yet"
    place = json.loads((folder / "tracking.json").read_text())
    uri = place.get("uri") or tracking_uri()
    return page if is_server(uri) else f"{page} (start the pages with: fvdm ui{ui_words(uri)})"


def ui_words(uri: str) -> str:
    """What to type after `fvdm ui` for the pages of a database."""
    return "" if uri == tracking_uri() else f" --uri {uri}"
