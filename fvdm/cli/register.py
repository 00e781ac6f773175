"""`fvdm register --checkpoint runs/demo`: log a trained model to the MLflow run that trained it, and register it.

A training run does the same when it is complete.
"""

import logging
from collections.abc import Sequence

from fvdm import config as settings
from fvdm.serving.config import RegistryConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        config = settings.parse(RegistryConfig, argv, __doc__, prog="fvdm register")
        from fvdm.serving.registry import register

        print(register(config))
    except ValueError as error:
        settings.fail(error)
