"""Peak memory of real ZeRO-2 steps at several micro-batches, beside what `fvdm plan` predicts."""

import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

from benchmarks.acceptance.record import LeftOutError, Outcome, Record
from benchmarks.train_memory import TrainMemoryConfig, steps
from fvdm.distributed import from_environment

if TYPE_CHECKING:
    from benchmarks.acceptance.config import AcceptanceConfig

MICRO_BATCHES = (1, 8, 14)
WITHIN = 0.1  # of the plan
OUT_OF_MEMORY = "out of memory"


def run(record: Record, config: "AcceptanceConfig") -> None:
    """All checks of the part."""
    for clips in (1, 2) if config.smoke else MICRO_BATCHES:
        steps_config = TrainMemoryConfig(config.timed_model, config.size, config.frames, micro_batch=clips, steps=2)
        record.check(
            f"{config.timed_model}, micro-batch {clips}", functools.partial(compare, steps_config, config.device)
        )


def compare(config: TrainMemoryConfig, device: str) -> Outcome:
    """The peak of some steps in a process of their own, and the prediction.

    Raises:
        LeftOutError: if the GPU has too little memory.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            figures = process.submit(take_steps, config).result()
        except RuntimeError as error:
            if OUT_OF_MEMORY not in str(error):
                raise
            raise LeftOutError(str(error)) from None
    values = {key: figures[key] for key in ("peak_gb", "predicted_gb", "measured_over_predicted", "seconds_per_step")}
    if device == "cpu":  # The process holds the library's code and the interpreter: a plan of XL does not see them.
        return Outcome(values)
    return Outcome(values, abs(values["measured_over_predicted"] - 1) <= WITHIN, f"within {WITHIN:.0%} of the plan")


def take_steps(config: TrainMemoryConfig) -> dict[str, float]:
    """In the process of its own; an error of memory comes back as one that can be pickled."""
    import torch

    try:
        return steps(config, from_environment())
    except torch.OutOfMemoryError as error:
        raise RuntimeError(f"{OUT_OF_MEMORY}: {str(error).splitlines()[0]}") from None
