"""What the benchmarks of optimizer steps share: they run on the ranks of torchrun, and the main one reports."""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from fvdm import config as settings

if TYPE_CHECKING:
    from fvdm.distributed import Ranks


class RanksBenchmark(Protocol):
    """Settings of such a benchmark."""

    @property
    def model(self) -> str:
        """Size and patch of its network."""

    @property
    def out(self) -> str:
        """Folder of the journal."""


C = TypeVar("C", bound=RanksBenchmark)


def run_on_ranks(
    cls: type[C],
    argv: Sequence[str] | None,
    description: str | None,
    measure: "Callable[[C, Ranks], dict[str, float]]",
    name: str,
    kind: str,
) -> None:
    """Measure on all ranks; print the figures, and log them to MLflow, on the main one.

    Args:
        cls: dataclass of the settings.
        argv: words of the command line; those of this process when not given.
        description: what `--help` says of the benchmark.
        measure: from the settings and this process among its peers to the figures by name; collective.
        name: of the benchmark.
        kind: of the figures, in MLflow.
    """
    logging.basicConfig(level=logging.WARNING)
    try:
        config = settings.parse(cls, argv, description)
        from benchmarks.reporting import conclude
        from fvdm.distributed import from_environment

        ranks = from_environment()
        figures = measure(config, ranks)
    except ValueError as error:
        settings.fail(error)
    if ranks.is_main:
        conclude(figures, config, f"{name} {config.model} x{ranks.world_size}", kind)
