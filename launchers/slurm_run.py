"""Run any script of the project on Slurm, as slurm_train.py does it: a benchmark, an encoding, a generation.

    python launchers/slurm_run.py --gpus-per-node 1 benchmarks/fvd.py --real DIR --fake DIR
    python launchers/slurm_run.py --nodes 2 -m fvdm generate --checkpoint runs/mine --out out --num 64
    python launchers/slurm_run.py --array 0-3 -m fvdm generate --checkpoint runs/mine --seed {array}00 --out out/{array}

Options before the script are the launcher's; those after it are the script's. Every rank runs it, with RANK,
WORLD_SIZE and the rest of torch.distributed's environment set. An encoding has an option for this:
encode_latents.py --cluster slurm.
"""

import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from data_prep.installed import require_packages

    require_packages()

from fvdm import config as settings
from launchers.config import Resources, array_numbers
from launchers.job import Job
from launchers.resources import resolve

PROG = "python launchers/slurm_run.py (FILE.py | -m MODULE) [options of the script]"
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
        received: list[int] = []
        for number in (signal.SIGUSR2, signal.SIGTERM):  # They reach the script as well, with their usual effect.
            signal.signal(number, lambda number, frame: received.append(number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2, signal.SIGTERM})
        code = subprocess.run([sys.executable, "-u", *self.words]).returncode
        if received and code:
            return True
        if code == 2:
            raise ValueError(f"{' '.join(self.words)} was refused; its reason is in the log")
        if code not in (0, 3):  # 3: an encoding that has rejected some videos, and said so
            raise RuntimeError(f"{' '.join(self.words)} ended with exit code {code}")
        return False


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """The launcher's own words, and those from the script (a Python file, or -m) on."""
    first = next((k for k, word in enumerate(words) if word == "-m" or word.endswith(".py")), len(words))
    return words[:first], words[first:]


def main() -> None:
    """Submit, and print where to look."""
    own, script = split(sys.argv[1:])
    try:
        resources = settings.parse(Resources, settings.join_repeated(own, "sbatch"), __doc__, prog=PROG)
        from launchers.submission import launch

        if not script:
            raise ValueError("no script given, such as benchmarks/fvd.py")
        if script[0] != "-m" and not Path(script[0]).is_file():
            raise ValueError(f"there is no file {script[0]}")
        resources = resolve(resources)
        numbers = array_numbers(resources.array)[0]
        filled = [[word.replace("{array}", str(number)) for word in script] for number in numbers]
        jobs = [Script(resources, tuple(words)) for words in filled or [script]]
        name = Path(script[1 if script[0] == "-m" else 0]).stem.rpartition(".")[2]
        code = launch(jobs, LOGS, f"fvdm-{name}")
    except ValueError as error:
        settings.fail(error)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
