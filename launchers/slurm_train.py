"""Train on Slurm, or on this machine: `python launchers/slurm_train.py --nodes 4 --config configs/ffs_xl.yaml`.

Every word that is not one of the options below is a setting of the training, such as `--name`, `--model B/2` or
`--data.path latents/ffs`; `--help` lists both. To resume a run, type the same command again. A sweep is an array:
`--array 0-2 --name 'seed-{array}' --seed '{array}'`.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from fvdm import config as settings
from launchers.job import Job
from launchers.resources import Resources, array_numbers
from launchers.submission import launch

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "ffs_xl.yaml"


@dataclass(frozen=True)
class Training(Job):
    """One rank of a training: what submitit runs on every node."""

    words: tuple[str, ...]
    folder: Path

    def work(self) -> bool:
        """Train; True when the job was told to stop before the end."""
        from fvdm.training.config import TrainConfig
        from fvdm.training.loop import train

        return bool(train(settings.parse(TrainConfig, self.words)))

    @property
    def checkpoints(self) -> Path:
        """The run's checkpoints."""
        return self.folder / "checkpoints"


def arguments() -> argparse.ArgumentParser:
    """The launcher's own options."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--help", "-h", action="store_true", help="this text, and every setting of the training")
    Resources.add_arguments(parser)
    return parser


def plan(options: argparse.Namespace, words: list[str]) -> tuple[list[Training], Path, str]:
    """The jobs that the words stand for, the folder of their logs, and their name.

    Raises:
        ValueError: if anything is wrong that can be known before a job waits in a queue.
    """
    from fvdm.training.config import TrainConfig
    from fvdm.training.setup import check

    resources = Resources.from_options(options)
    jobs = []
    for number in map(str, array_numbers(resources.array)[0]) if resources.array else [""]:
        own = tuple(word.replace("{array}", number) if number else word for word in words)
        config = settings.parse(TrainConfig, own)
        try:
            check(config, resources.world_size)
        except (ValueError, OSError) as error:
            if not options.dry_run:
                raise
            print(f"note: as it is now, this would be refused: {error}", file=sys.stderr)
        jobs.append(Training(resources, own, config.folder))
    names = [job.folder.name for job in jobs]
    if len(set(names)) < len(jobs):
        raise ValueError(f"--array: all its jobs would train the run {names[0]}; put {{array}} into --name")
    if len(jobs) == 1:
        return jobs, jobs[0].folder / "jobs", f"fvdm-{names[0]}"
    name = f"{names[0]}-to-{names[-1]}"
    return jobs, jobs[0].folder.parent / "arrays" / name, f"fvdm-{name}"


def main() -> None:
    """Check everything that can be checked here, submit, and tell where to look."""
    parser = arguments()
    options, words = parser.parse_known_args()
    if options.help:
        parser.print_help()
        print("\nsettings of the training:")
        words = ["--help"]
    elif "--config" not in words and not any(word.startswith("--config=") for word in words):
        print(f"no --config given: using {os.path.relpath(DEFAULT_CONFIG)}", file=sys.stderr)
        words = ["--config", str(DEFAULT_CONFIG), *words]
    try:
        code = launch(*plan(options, words), options)
    except (ValueError, OSError) as error:
        settings.fail(error)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
