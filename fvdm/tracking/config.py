"""Settings of tracking, and the addresses and names that the environment may give."""

import os
from dataclasses import dataclass
from pathlib import Path

SQLITE = "sqlite:///"
SERVERS = ("http://", "https://")
SCHEMES = (*SERVERS, SQLITE, "postgresql", "mysql", "mssql", "databricks", "uc")
EXPERIMENT = "fvdm"


@dataclass(frozen=True)
class TrackingConfig:
    """Where a run is reported.

    Attributes:
        uri: MLflow tracking server or database; empty takes MLFLOW_TRACKING_URI, else mlflow.db in this folder.
        experiment: MLflow experiment; a run finds its name in it; empty takes MLFLOW_EXPERIMENT_NAME, else fvdm.
        system_metrics: sample the use of CPU, memory and GPUs.
    """

    uri: str = ""
    experiment: str = ""
    system_metrics: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError for an address that MLflow cannot take."""
        if self.uri:
            check_uri(self.uri)


def tracking_uri(uri: str = "") -> str:
    """The tracking address that applies: the given one, the environment's, or a database in this folder."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{Path('mlflow.db').resolve()}"


def experiment_name(name: str = "") -> str:
    """The experiment that applies: the given one, the environment's, or `fvdm`."""
    return name or os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def is_server(uri: str) -> bool:
    """Whether a tracking address is that of an HTTP server, which has pages to look at."""
    return uri.startswith(SERVERS)


def database_file(uri: str) -> Path | None:
    """The file of an SQLite database; None for other addresses."""
    return Path(uri.removeprefix(SQLITE).partition("?")[0]) if uri.startswith(SQLITE) else None


def check_uri(uri: str) -> None:
    """Find what is wrong with a tracking address without asking a server.

    Raises:
        ValueError: if MLflow keeps no runs at such an address, or the database file cannot be used.
    """
    if not uri.startswith(SCHEMES):
        scheme = uri.partition("://")[0] if "://" in uri else "file"
        reason = "MLflow no longer keeps runs in plain files" if scheme == "file" else f"{scheme} is no MLflow address"
        raise ValueError(
            f"the tracking address {uri} cannot be used: {reason}; give a server such as http://host:5000, or a "
            f"database such as sqlite:///{Path('mlflow.db').resolve()}"
        )
    database = database_file(uri)
    if database is None:
        return
    if not database.parent.is_dir():
        raise ValueError(f"the tracking address {uri} cannot be used: there is no folder {database.parent}")
    if database.exists() and not (database.is_file() and _is_sqlite(database)):
        raise ValueError(f"the tracking address {uri} cannot be used: {database} is not an SQLite database")
    if not os.access(database if database.exists() else database.parent, os.W_OK):
        raise ValueError(f"the tracking address {uri} cannot be used: {database} cannot be written")


def _is_sqlite(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(16) in (b"SQLite format 3\0", b"")
    except OSError:
        return False
