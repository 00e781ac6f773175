"""Settings of tracking."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrackingConfig:
    """Where a run is reported.

    Attributes:
        uri: MLflow tracking server or database; empty takes MLFLOW_TRACKING_URI, else mlflow.db in this folder.
        experiment: MLflow experiment; a run finds its name in it.
        system_metrics: sample the use of CPU, memory and GPUs.
    """

    uri: str = ""
    experiment: str = "fvdm"
    system_metrics: bool = True
