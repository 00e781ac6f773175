"""`fvdm checkpoint list|verify|export RUN`: look at, check, or export what a run has saved.

list prints step, ranks, size and whether a checkpoint is complete, by the sizes of its files; verify does the same by
every checksum, with exit code 2 if one is corrupt; export writes a model folder for use, with the averaged weights; of
a LoRA the folder that diffusers' load_lora_weights takes, or with --merge that of its base model with the LoRA in it.
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
        out: folder to write; for export only.
        weights: ema (the average) or model (the last step's); for export only.
        dtype: numbers of the exported weights: float16 and bfloat16 halve the file; for export only.
        merge: add a LoRA to its base model, and write a complete model; for export only.
        base: base model of a LoRA that is merged; empty is where it was in training; for export only.
    """

    action: Literal["list", "verify", "export"]
    run: str
    out: str = ""
    weights: Literal["ema", "model"] = "ema"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    merge: bool = False
    base: str = ""


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
    """List, verify or export.

    Raises:
        ValueError: if there is no such checkpoint, or one is corrupt.
    """
    if config.action == "export":
        export(config)
        return
    corrupt = print_table(Path(config.run), checksums=config.action == "verify")
    if corrupt and config.action == "verify":
        raise ValueError(
            f"{config.run} holds {corrupt} corrupt checkpoint(s); a run that resumes moves them aside and uses the "
            f"newest complete one"
        )


def export(config: CheckpointCommand) -> None:
    """Write the folder of a model or of a LoRA.

    Raises:
        ValueError: if there is no such checkpoint, it or its base model cannot be read, or the folder is there.
    """
    import torch

    from fvdm.checkpoints.find import resolve
    from fvdm.checkpoints.read import read_state
    from fvdm.cli.progress import writing
    from fvdm.models.export import TEMPORARY, export_lora, export_model
    from fvdm.models.loading import config_from
    from fvdm.models.lora_files import is_lora
    from fvdm.training.plan import parameters

    folder, out, dtype = resolve(Path(config.run)), Path(config.out), getattr(torch, config.dtype)
    if (config.merge or config.base) and not is_lora(folder):
        raise ValueError(f"{folder} is a complete model, no LoRA: leave out --merge and --base")
    if config.base and not config.merge:
        raise ValueError("the exported LoRA holds no base model: leave out --base, or add --merge")
    if is_lora(folder) and not config.merge:
        export_lora(folder, out, config.weights, dtype)
    else:
        size = parameters(config_from(read_state(folder)["network"])) * dtype.itemsize
        with writing(out.with_name(TEMPORARY.format(out.name)), size, out.name):
            export_model(folder, out, config.weights, dtype, base=config.base)
    print(f"{folder} exported to {out}; use it with: fvdm generate --checkpoint {out}")


def print_table(run: Path, checksums: bool) -> int:
    """Print a line for each checkpoint; return how many are corrupt, without those that were moved aside."""
    from fvdm.checkpoints.find import CORRUPT, checkpoints, corrupt_checkpoints
    from fvdm.checkpoints.layout import MANIFEST, validate

    root = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    aside = {folder: reason for folder, reason in corrupt_checkpoints(root).items() if folder.name.startswith(CORRUPT)}
    folders = [run] if (run / MANIFEST).exists() else checkpoints(root)
    if not folders and not aside:
        raise ValueError(f"{run} holds no checkpoint; give a run's folder, such as runs/demo")
    reasons = {folder: validate(folder, checksums) for folder in folders}
    for folder, reason in (reasons | aside).items():
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        ranks = len(list(folder.glob("shard-*")))
        print(f"{folder}  {size:10.1f} MB  {ranks:4d} ranks  {'corrupt: ' + reason if reason else 'complete'}")
    return sum(reason is not None for reason in reasons.values())
