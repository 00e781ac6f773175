"""Settings of `fvdm register`."""

from dataclasses import dataclass, field

from fvdm.tracking.config import TrackingConfig


@dataclass(frozen=True)
class RegistryConfig:
    """Logs a model to the MLflow run that trained it, and registers it.

    Attributes:
        checkpoint: a run's folder (its newest checkpoint is taken) or a checkpoint; or a folder of `fvdm convert`.
        name: name in the registry; empty takes the run's.
        out: folder in which the model is assembled; empty is registered/NAME.
        tracking: where it is logged.
    """

    checkpoint: str
    name: str = ""
    out: str = ""
    tracking: TrackingConfig = field(default_factory=lambda: TrackingConfig(system_metrics=False))
