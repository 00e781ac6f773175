"""Find the checkpoints of a run: the newest complete one, those to remove, and those that are corrupt."""

import logging
import shutil
from pathlib import Path

from fvdm.checkpoints.config import CheckpointConfig
from fvdm.checkpoints.layout import STATE, validate
from fvdm.files import write_text

logger = logging.getLogger(__name__)

CORRUPT = "corrupt-"  # begins the name of a checkpoint that was moved aside
REASON = "corrupt.txt"  # in it: why


def checkpoints(root: Path) -> list[Path]:
    """The run's checkpoints, complete or not, oldest first; without those that were moved aside."""
    return sorted(path for path in root.glob("step-*") if path.is_dir())


def corrupt_checkpoints(root: Path) -> dict[Path, str]:
    """The corrupt checkpoints of a run, moved aside or not, each with the reason."""
    found = {}
    for folder in sorted(root.glob(f"{CORRUPT}*")):
        note = folder / REASON
        found[folder] = note.read_text().strip() if note.is_file() else "moved aside"
    return found | {folder: reason for folder in checkpoints(root) if (reason := validate(folder))}


def newest(root: Path) -> Path | None:
    """The newest checkpoint whose files are all there, each of its right size; a warning names those that are not."""
    for folder in reversed(checkpoints(root)):
        reason = validate(folder)
        if reason is None:
            return folder
        logger.warning("checkpoint %s is corrupt (%s); trying the one before", folder, reason)
    return None


def set_aside(folder: Path, reason: str) -> Path:
    """Move a corrupt checkpoint to `corrupt-step-N` beside it, where nothing counts, reads or removes it.

    Args:
        folder: the checkpoint.
        reason: why, in a few words, for the log.

    Raises:
        OSError: if it cannot be moved.
    """
    aside = folder.with_name(CORRUPT + folder.name)
    number = 2
    while aside.exists():
        aside = folder.with_name(f"{CORRUPT}{folder.name}-{number}")
        number += 1
    write_text(folder / REASON, reason + "\n")
    folder.rename(aside)
    logger.warning("checkpoint %s is corrupt (%s); it is now %s", folder, reason, aside.name)
    return aside


def set_corrupt_aside(root: Path) -> list[Path]:
    """Move aside every checkpoint with a file that is missing or of a wrong size; return the complete ones."""
    complete = []
    for folder in checkpoints(root):
        reason = validate(folder)
        if reason:
            set_aside(folder, reason)
        else:
            complete.append(folder)
    return complete


def prune(root: Path, config: CheckpointConfig) -> None:
    """Remove the complete checkpoints that the policy does not keep; move aside, and do not count, the corrupt ones."""
    for folder in set_corrupt_aside(root)[: -config.keep_last]:
        step = int(folder.name.rpartition("-")[2])
        if not config.keep_every or step % config.keep_every:
            shutil.rmtree(folder, ignore_errors=True)


def clean(root: Path) -> None:
    """Remove the temporary folders of killed saves."""
    for folder in root.glob(".tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)


def resolve(path: Path) -> Path:
    """The checkpoint that a user means by a run's folder, its `checkpoints` folder, or a checkpoint itself.

    Sizes are checked here, and the checksum of the weights where they are read.

    Raises:
        ValueError: if there is none, or none is complete.
    """
    if (path / STATE).is_file():
        reason = validate(path)
        if reason:
            raise ValueError(f"checkpoint {path} is corrupt: {reason}; choose another step")
        return path
    for root in (path / "checkpoints", path):
        found = newest(root)
        if found:
            return found
    raise ValueError(f"{path} holds no complete checkpoint; give a run's folder, such as runs/demo")
