"""Things that training can do without, such as a preview: if one fails, training continues."""

from collections.abc import Callable
from typing import TypeVar

import torch

from fvdm.distributed import first_error

T = TypeVar("T")


def attempt(action: Callable[[], T]) -> tuple[T | None, str]:
    """Run an action without collectives on every rank, and agree on whether it failed on any. Collective.

    A rank that failed and one that did not would otherwise meet in different collectives, and wait for each other.

    Returns:
        This rank's result; and the error of the first rank that failed, empty if none did.
    """
    result, error = None, ""
    try:
        result = action()
    except Exception as caught:  # Out of memory, a corrupt shard, a codec: whatever it is, training continues.
        error = one_line(caught)
    error = first_error(error)
    if error:
        free_memory()
    return result, error


def one_line(error: Exception) -> str:
    """An error's kind and first line, for the log."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def free_memory() -> None:
    """Give the memory of a failed attempt back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
