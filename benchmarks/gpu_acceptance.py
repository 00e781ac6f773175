"""What must be known of a machine with a GPU before a long training run: seven parts of a few minutes each.

    python benchmarks/gpu_acceptance.py --part correctness attention
    python benchmarks/gpu_acceptance.py --device cpu --smoke

- correctness: float32 on the CPU against the device, outputs and every gradient, eager, compiled and checkpointed
- attention: every backend over space and time, forward and backward; whether `auto` picks the fastest
- speed: a training step, eager and compiled, and its share of the matrix rate measured in the same run
- memory: peaks of ZeRO-2 steps at several micro-batches, beside what `fvdm plan` predicts
- training: real shards, the launcher, a checkpoint, the stop signal, resume; clips/s with the loader
- sampling: seconds of a clip by DDIM with 50 steps
- profile: where the time of a step goes, kernel launches, a trace

Every check is written to --out at once, as JSON beside a table, and is not repeated by the next start of the same
command. MLflow, a model hub and flash-attn are not needed; what is left out for want of something says so. The exit
code is 0 if no check failed, 1 if one did, and 2 where there is no GPU and --device cpu was not given.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.acceptance.config import PARTS, AcceptanceConfig
from fvdm import config as settings

if TYPE_CHECKING:
    from benchmarks.acceptance.record import Record


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    try:
        config = settings.parse(AcceptanceConfig, argv, __doc__)
        require_device(config.device)
    except ValueError as error:
        settings.fail(error)
    parts = config.part or PARTS
    if len(parts) == 1:
        raise SystemExit(run_part(parts[0], config))
    # A process for each part: an error of the driver, or memory that is not given back, would spoil the next one.
    words = list(sys.argv[1:] if argv is None else argv)
    # Side by side on CPUs, where no time is judged.
    with ThreadPoolExecutor(2 if config.device == "cpu" else 1) as pool:
        codes = list(pool.map(lambda part: run_alone([*words, "--part", part]), parts))
    summarise(Path(config.out), parts)
    raise SystemExit(max(min(abs(code), 1) for code in codes))


def run_alone(words: Sequence[str]) -> int:
    """Run one part in a process of its own; returns the exit code."""
    return subprocess.run([sys.executable, __file__, *words]).returncode


def require_device(device: str) -> None:
    """Find out whether the device exists.

    Raises:
        ValueError: if there is no GPU.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "this machine has no GPU that PyTorch can use; to try the program itself on the CPU, type: "
            "python benchmarks/gpu_acceptance.py --device cpu --smoke"
        )


def run_part(part: str, config: AcceptanceConfig) -> int:
    """Run one part; returns the exit code."""
    from benchmarks.acceptance.record import Record

    compared = {name: value for name, value in settings.plain(config).items() if name not in ("part", "out")}
    record = Record(part, compared, config.device, Path(config.out))
    part_function(part)(record, config)
    print(f"{part}: results in {record.file} and {record.file.with_suffix('.md')}", flush=True)
    return 1 if record.failed else 0


def part_function(part: str) -> "Callable[[Record, AcceptanceConfig], None]":
    """The function that runs the checks of a part."""
    if part in ("correctness", "attention"):
        from benchmarks.acceptance import attention, correctness

        return {"correctness": correctness.run, "attention": attention.run}[part]
    if part in ("memory", "training"):
        from benchmarks.acceptance import memory, training

        return {"memory": memory.run, "training": training.run}[part]
    from benchmarks.acceptance import steps

    return {"speed": steps.run_speed, "sampling": steps.run_sampling, "profile": steps.run_profile}[part]


def summarise(out: Path, parts: Sequence[str]) -> None:
    """Put the tables of all parts into one file."""
    from fvdm.files import write_text

    tables = [path.read_text() for path in (out / f"{part}.md" for part in parts) if path.exists()]
    write_text(out / "summary.md", "\n".join(tables))
    print(f"all parts: {out / 'summary.md'}")


if __name__ == "__main__":
    main()
