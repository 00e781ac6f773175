"""`fvdm checkpoint list|verify|export RUN`: look at, check, or hand on what a run has saved.

list prints step, ranks, size and whether a checkpoint is complete, by size alone; verify does the same by every
checksum, with exit code 2 if one is corrupt; export writes model, average and settings into a folder of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fvdm import config as settings


@dataclass(frozen=True)
class CheckpointCommand:
    """What to do with which checkpoint.

    Attributes:
        action: list, verify or export.
        run: a run's folder, or a checkpoint.
        out: folder to make; for export alone.
    """

    action: Literal["list", "verify", "export"]
    run: str
    out: str = ""


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    try:
        config = settings.parse(CheckpointCommand, argv, __doc__, ("action", "run", "out"), "fvdm checkpoint")
        if (config.action == "export") != bool(config.out):
            raise ValueError("export needs a folder to write, and list and verify take none")
        run(config)
    except ValueError as error:
        settings.fail(error)


def run(config: CheckpointCommand) -> None:
    """Do it.

    Raises:
        ValueError: if there is no such checkpoint, or one is corrupt.
    """
    from fvdm.checkpoints.checkpoint import export, resolve

    if config.action == "export":
        folder = resolve(Path(config.run))
        export(folder, Path(config.out))
        print(f"{folder} exported to {config.out}; use it with: fvdm generate --checkpoint {config.out}")
        return
    corrupt = print_table(Path(config.run), deep=config.action == "verify")
    if corrupt and config.action == "verify":
        raise ValueError(f"{config.run} holds {corrupt} corrupt checkpoint(s); a resumed run passes over them")


def print_table(run: Path, deep: bool) -> int:
    """Print a line for each checkpoint; return how many are corrupt."""
    from fvdm.checkpoints.checkpoint import checkpoints, validate

    folders = [run] if (run / "manifest.json").exists() else checkpoints(run / "checkpoints") or checkpoints(run)
    if not folders:
        raise ValueError(f"{run} holds no checkpoint; give a run's folder, such as runs/demo")
    corrupt = 0
    for folder in folders:
        reason = validate(folder, deep)
        corrupt += reason is not None
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        ranks = len(list(folder.glob("shard-*")))
        print(f"{folder}  {size:10.1f} MB  {ranks:4d} ranks  {'corrupt: ' + reason if reason else 'complete'}")
    return corrupt
