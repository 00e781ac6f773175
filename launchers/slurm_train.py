"""Train on Slurm, or on this machine.

    python launchers/slurm_train.py --nodes 4                                     # the sample clips
    python launchers/slurm_train.py --nodes 4 --config configs/ffs_xl.yaml --name mine --data.path latents/mine

To resume a run, type the same command again. A sweep is an array: --array 0-2 --name 'seed-{array}' --seed '{array}'.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from data_prep.installed import require_packages

    require_packages()

from fvdm import config as settings
from fvdm.training.config import TrainConfig
from launchers.config import Resources, TrainJobConfig, array_numbers, option, part_of
from launchers.job import Job
from launchers.resources import ROOT, resolve

PROG = "python launchers/slurm_train.py"
CONFIGS = ROOT / "configs"
SAMPLE = Path("latents/sample")  # what a bare encode_latents.py makes


@dataclass(frozen=True)
class Training(Job):
    """One rank of a training run: what submitit runs on every node."""

    words: tuple[str, ...]
    folder: Path

    def work(self) -> bool:
        """Train; True when the job was stopped before the end."""
        from fvdm.training.loop import train

        config = part_of(settings.parse(TrainJobConfig, self.words), TrainConfig)
        return bool(train(config))

    @property
    def checkpoints(self) -> Path:
        """The run's checkpoints."""
        return self.folder / "checkpoints"


def with_config(words: list[str]) -> list[str]:
    """The words, with a configuration where they name none: that of the sample clips, or of the paper's FFS.

    Raises:
        ValueError: if the sample clips are meant, and are not encoded.
    """
    if option(words, "config") is not None:
        return words
    data = option(words, "data.path")
    if data is not None:
        default = CONFIGS / "ffs_xl.yaml"
        print(f"no --config given: using {os.path.relpath(default)}", file=sys.stderr)
        return ["--config", str(default), *words]
    if not SAMPLE.is_dir():
        raise ValueError(
            f"no --data.path given, and there are no sample latents in {SAMPLE}; make them with: "
            "python data_prep/encode_latents.py"
        )
    print(f"no --config and no --data.path given: training on the sample clips in {SAMPLE}")
    config = parse(["--config", str(CONFIGS / "sample.yaml"), *words])
    resources = resolve(part_of(config, Resources))
    if resources.gpus_per_node:
        chosen, reason = CONFIGS / "sample_xl.yaml", f"{resources.world_size} GPUs"
        batch = 4 * resources.world_size
    else:
        chosen, reason = CONFIGS / "sample.yaml", "no GPUs"
        batch = resources.world_size * -(-config.data.batch_size // resources.world_size)
    chosen_config = parse(["--config", str(chosen), *words])
    where = "processes on this machine" if resources.local else "ranks on Slurm"
    print(
        f"{reason}: training {chosen_config.model} for {chosen_config.steps} steps, the settings of "
        f"{os.path.relpath(chosen)}, as {resources.world_size} {where}"
    )
    print("for your own data, type:")
    vae = "--vae stabilityai/sd-vae-ft-ema"
    print(f"  python data_prep/encode_latents.py --videos DIR --out latents/mine --size 256 {vae}")
    print(f"  {PROG} --nodes {resources.nodes} --config configs/ffs_xl.yaml --name mine --data.path latents/mine")
    found = ["--config", str(chosen), f"--data.batch_size={batch}"]
    return [*found, f"--cluster={resources.cluster}", f"--gpus-per-node={resources.gpus_per_node}", *words]


def parse(words: list[str]) -> TrainJobConfig:
    """The settings of the first job that the words stand for."""
    array = option(words, "array")
    number = str(array_numbers(array)[0][0]) if array else "{array}"
    return settings.parse(TrainJobConfig, [word.replace("{array}", number) for word in words])


def plan(words: list[str]) -> tuple[list[Training], Path, str]:
    """The jobs that the words stand for, the folder of their logs, and their name.

    Raises:
        ValueError: if anything is wrong that can be known before a job waits in a queue.
    """
    from fvdm.training.setup import check

    resources = resolve(part_of(parse(words), Resources))
    jobs = []
    for number in map(str, array_numbers(resources.array)[0]) if resources.array else [""]:
        own = tuple(word.replace("{array}", number) if number else word for word in words)
        config = part_of(settings.parse(TrainJobConfig, own), TrainConfig)
        try:
            check(config, resources.world_size)
        except (ValueError, OSError) as error:
            if not resources.dry_run:
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
    """Check everything that can be checked here, submit, and print where to look."""
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        settings.parse(TrainJobConfig, ["--help"], __doc__, prog=PROG)
    from launchers.submission import launch

    try:
        code = launch(*plan(with_config(settings.join_repeated(words, "sbatch"))))
    except (ValueError, OSError) as error:
        settings.fail(error)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
