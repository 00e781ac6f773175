"""Train on Slurm, or on this machine: `python launchers/slurm_train.py --nodes 4 --config configs/ffs_xl.yaml`.

Every word that is not one of the options below is a setting of the training, such as `--name`, `--model B/2` or
`--data.path latents/ffs`; `--help` lists both. To resume a run, type the same command again.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from fvdm import config as settings
from launchers.job import Job, Resources, follow, submit

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "ffs_xl.yaml"


@dataclass(frozen=True)
class Training(Job):
    """One rank of a training: what submitit runs on every node."""

    words: tuple[str, ...]

    def work(self) -> bool:
        """Train; True when the job should be started again."""
        from fvdm.distributed import Stop
        from fvdm.train import TrainConfig, train

        return train(settings.parse(TrainConfig, self.words)) == Stop.REQUEUE


def arguments() -> argparse.ArgumentParser:
    """The launcher's own options."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, add_help=False)
    parser.add_argument("--help", "-h", action="store_true", help="this text, and every setting of the training")
    Resources.add_arguments(parser)
    return parser


def main() -> None:
    """Check everything that can be checked here, submit, and tell where to look."""
    parser = arguments()
    options, words = parser.parse_known_args()
    if options.help:
        parser.print_help()
        print("\nsettings of the training:")
        words = ["--help"]
    elif "--config" not in words and not any(word.startswith("--config=") for word in words):
        print(f"no --config given: using {os.path.relpath(DEFAULT_CONFIG)}")
        words = ["--config", str(DEFAULT_CONFIG), *words]
    from fvdm.train import TrainConfig, check

    try:
        config = settings.parse(TrainConfig, words)
        resources = Resources.from_options(options)
        check(config, resources.world_size)
        run = submit(Training(resources, tuple(words)), config.folder / "jobs", f"fvdm-{config.name}")
    except ValueError as error:
        settings.fail(error)
    print(f"job {run.job_id}, run folder {config.folder}, log {run.task(0).paths.stdout}")
    if resources.local or options.follow:
        raise SystemExit(follow(run))
    print(f"follow with: tail -F {run.task(0).paths.stdout}; cancel with: scancel {run.job_id}")


if __name__ == "__main__":
    main()
