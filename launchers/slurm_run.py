"""Run any script of the project on Slurm, in the way of slurm_train.py: a benchmark, an encoding, a generation.

    python launchers/slurm_run.py --gpus-per-node 1 benchmarks/fvd.py --real DIR --fake DIR
    python launchers/slurm_run.py --nodes 2 -m fvdm.generate --checkpoint runs/mine --out out --num 64
    python launchers/slurm_run.py --array 0-31 --gpus-per-node 1 data_prep/encode_latents.py --videos DIR --out DIR \\
        --jobs 32 --job {array}

Options before the script are the cluster's; those after it are the script's. Every rank runs it, with RANK, WORLD_SIZE
and the rest of torch.distributed's environment set.
"""

import argparse
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from fvdm import config as settings
from launchers.job import Job
from launchers.resources import Resources, array_numbers
from launchers.submission import launch

LOGS = Path("runs/jobs")


@dataclass(frozen=True)
class Script(Job):
    """One rank of a script."""

    words: tuple[str, ...]

    def work(self) -> bool:
        """Run it; True when a signal of Slurm's ended it: what it had done is kept by the scripts themselves.

        Raises:
            ValueError: if it refused its arguments.
            RuntimeError: if it failed.
        """
        told: list[int] = []
        for number in (signal.SIGUSR2, signal.SIGTERM):  # They reach the script as well, with their usual effect.
            signal.signal(number, lambda number, frame: told.append(number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2, signal.SIGTERM})
        code = subprocess.run([sys.executable, "-u", *self.words]).returncode
        if told and code:
            return True
        if code == 2:
            raise ValueError(f"{' '.join(self.words)} was refused; its reason is in the log")
        if code not in (0, 3):  # 3: an encoding that has rejected some videos, and said so
            raise RuntimeError(f"{' '.join(self.words)} ended with exit code {code}")
        return False


def main() -> None:
    """Submit, and tell where to look."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    Resources.add_arguments(parser)
    parser.add_argument("script", nargs=argparse.REMAINDER, help="a Python file, or -m and a module, and its words")
    options = parser.parse_args()
    try:
        if not options.script:
            raise ValueError("no script given, such as benchmarks/fvd.py")
        if options.script[0] != "-m" and not Path(options.script[0]).is_file():
            raise ValueError(f"there is no file {options.script[0]}")
        resources = Resources.from_options(options)
        numbers = array_numbers(resources.array)[0]
        filled = [[word.replace("{array}", str(number)) for word in options.script] for number in numbers]
        jobs = [Script(resources, tuple(words)) for words in filled or [options.script]]
        name = Path(options.script[1 if options.script[0] == "-m" else 0]).stem.rpartition(".")[2]
        code = launch(jobs, LOGS, f"fvdm-{name}", options)
    except ValueError as error:
        settings.fail(error)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
