"""The command line of encode_latents.py, and what its settings are where they are left open."""

import argparse
import io
import math
import os
import sys
from dataclasses import dataclass

from fvdm.media.config import LAYOUTS


@dataclass(frozen=True)
class EncodeConfig:
    """The command line; `parse` documents each setting. None means: as the layout, or the machine, has it."""

    videos: str
    out: str
    vae: str = "builtin"
    size: int = 256
    layout: str = "auto"
    split_files: tuple[str, ...] = ()
    class_file: str | None = None
    resize: str | None = None
    antialias: bool | None = None
    flip: bool | None = None
    min_frames: int | None = None
    keep_corrupt: bool = False
    dtype: str = "float16"
    shard_mb: float = 512
    device: str | None = None
    precision: str | None = None
    chunk: int | None = None
    workers: int | None = None
    encoders: int | None = None
    timeout: float = 120
    strict: bool = False
    mlflow: str = ""
    experiment: str = "encode"
    cluster: str = "local"
    jobs: int = 1
    job: int | None = None
    minutes: int = 24 * 60
    slurm: tuple[str, ...] = ()


def print_any_name() -> None:
    """Has standard output escape what its encoding does not know: names of files and folders may hold anything."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class Stopped(Exception):
    """A video cannot be used, and `--strict` asks to stop there."""

    def __init__(self, name: str, reason: str) -> None:
        """Says which video, and why."""
        super().__init__(f"stopped at {name!a}: {reason} (--strict). What is done is kept.")


def check(config: EncodeConfig) -> None:
    """Refuses settings out of their range.

    Raises:
        ValueError: names the setting.
    """
    for name in ("size", "min_frames", "chunk", "workers", "encoders", "jobs", "minutes"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{_flag(name)} is {value}: it must be at least 1.")
    for name in ("shard_mb", "timeout"):
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{_flag(name)} is {value}: it must be a number above 0.")
    for word in config.slurm:
        if not word.partition("=")[0] or "=" not in word:
            raise ValueError(f"--slurm {word!a}: it takes words of the form KEY=VALUE, such as partition=gpu.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(description: str | None, words: list[str] | None = None) -> EncodeConfig:
    """Reads the command line; exits with 2 on wrong usage."""
    parser = argparse.ArgumentParser(
        "encode_latents.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--videos", required=True, help="folder with the videos: files, or folders of frames")
    add("--out", required=True, help="folder for the shards; made if it is missing")
    add("--vae", default="builtin", help="builtin, a folder of a diffusers AutoencoderKL, or its hub name [builtin]")
    add("--size", type=int, default=256, help="side of the square frames that are encoded, in pixels [256]")
    add("--job", type=int, help=argparse.SUPPRESS)
    _add_reading(parser)
    _add_writing(parser)
    _add_running(parser)
    values = vars(parser.parse_args(words))
    return EncodeConfig(**values | {name: tuple(values[name]) for name in ("split_files", "slurm")})


def _add_reading(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is read, and how (default: as the recognised layout has it)").add_argument
    yes_no = argparse.BooleanOptionalAction
    add("--layout", choices=LAYOUTS, default="auto", help="layout of the folder [auto: recognise it]")
    add("--split-files", nargs="+", default=(), metavar="FILE", help="UCF101's trainlist01.txt, testlist01.txt, ...")
    add("--class-file", metavar="FILE", help="UCF101's classInd.txt [classes by sorted folder name]")
    add("--resize", choices=("shorter-side", "centre-square"), help="scale then crop, or crop then scale")
    add("--antialias", action=yes_no, help="low-pass before shrinking; the papers do not, large videos gain")
    add("--flip", action=yes_no, help="store the mirrored twin of every frame too")
    add("--min-frames", type=int, help="reject shorter videos")
    add("--keep-corrupt", "--keep-damaged", action="store_true", help="keep what can be decoded of corrupt videos")
    add("--workers", type=int, help="decoder processes per job [its share of the cores, at most 8]")
    add("--timeout", type=float, default=120, help="give a video up when its decoder is silent so many seconds [120]")
    add("--strict", action="store_true", help="stop at the first video that cannot be used; tried again at every start")


def _add_writing(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is written, and how").add_argument
    add("--dtype", choices=("float16", "bfloat16"), default="float16", help="of the stored latents [float16]")
    add("--shard-mb", type=float, default=512, help="bound on the size of a shard, in MB [512]")
    add("--device", help="cuda, cuda:1, cpu [cuda if there is one; on Slurm, if --slurm asks for GPUs]")
    add(
        "--precision",
        choices=("float32", "bfloat16"),
        help="of the VAE [bfloat16 on cuda, float32 on cpu]",
    )
    add("--chunk", type=int, help="frames per call of the VAE; decides the last bits [32 on cuda, 4 on cpu]")
    add("--encoders", type=int, help="threads per job that call the VAE [1 on cuda, its share of the cores on cpu]")
    where = "MLflow server or database; none for no MLflow [$MLFLOW_TRACKING_URI, else mlflow.db in this folder]"
    add("--mlflow", default="", metavar="URI", help=where)
    add("--experiment", default="encode", help="MLflow experiment [encode]")


def _add_running(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("on many processes or machines").add_argument
    add("--cluster", choices=("local", "slurm"), default="local", help="processes here, or a Slurm job array [local]")
    add("--jobs", type=int, default=1, help="number of processes or array jobs [1]")
    again = "Slurm time limit of a job, after which it is queued again and goes on [1440]"
    add("--minutes", type=int, default=24 * 60, help=again)
    more = "more for sbatch: partition=gpu gpus_per_node=1 mem=16G"
    add("--slurm", nargs="+", default=(), metavar="KEY=VALUE", help=more)


def device(config: EncodeConfig) -> str:
    """Where the VAE runs. On Slurm by what is asked of it: the machine that submits need not be like the nodes."""
    import torch

    if config.device:
        return config.device
    if config.cluster == "slurm":
        return "cuda" if any(_asks_for_gpus(word) for word in config.slurm) else "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def _asks_for_gpus(word: str) -> bool:
    """Whether sbatch gives GPUs for this option: gpus=2, gpus-per-node=1, gres=gpu:1, tres-per-task=gres/gpu:1."""
    key, _, value = word.partition("=")
    return key.startswith("gpus") or (key.startswith(("gres", "tres")) and "gpu" in value)


def precision(config: EncodeConfig) -> str:
    """Number type of the VAE."""
    return config.precision or ("float32" if device(config) == "cpu" else "bfloat16")


def chunk(config: EncodeConfig) -> int:
    """Frames per call of the VAE."""
    return config.chunk or (4 if device(config) == "cpu" else 32)


def workers(config: EncodeConfig) -> int:
    """Decoder processes of one job."""
    return config.workers or max(1, min(8, _cores(config)))


def encoders(config: EncodeConfig) -> int:
    """Threads of one job that call the VAE."""
    return config.encoders or (max(1, min(16, _cores(config))) if device(config) == "cpu" else 1)


def _cores(config: EncodeConfig) -> int:
    """Cores of one job: what Slurm gave it, or its share of this machine."""
    if config.cluster == "slurm":
        return int(os.environ.get("SLURM_CPUS_PER_TASK", 1))
    return len(os.sched_getaffinity(0)) // config.jobs
