"""`fvdm ui`: the pages of MLflow for the runs of this folder, on this machine alone; Ctrl-C ends them.

Prints the address of the experiment with the newest run, and on a desktop opens it in the browser.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fvdm import config as settings


@dataclass(frozen=True)
class UIConfig:
    """Which runs to show, and where.

    Attributes:
        uri: MLflow server or database; empty takes MLFLOW_TRACKING_URI, else mlflow.db in this folder.
        port: port of the pages on this machine.
        browser: open a browser where there is a desktop.
    """

    uri: str = ""
    port: int = 5000
    browser: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        settings.in_range(self, port=(1, 65535))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    try:
        config = settings.parse(UIConfig, argv, __doc__)
        from fvdm.tracking.ui import show

        show(config.uri, config.port, config.browser)
    except ValueError as error:
        settings.fail(error)
