"""Trainings as tests start them: real processes over gloo, a tiny network, latents that cost nothing to make."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import torch

from fvdm.checkpoints.find import newest
from fvdm.checkpoints.layout import SLICES
from fvdm.checkpoints.read import read_slice, read_state
from fvdm.distributed import free_port
from fvdm.tracking.server import open_client, prepare

ROOT = Path(__file__).parent.parent
WORDS = ["--model", "T/2", "--data.frames", "6", "--data.stride", "1", "--data.batch_size", "4"]
WORDS += ["--data.workers", "0", "--engine.lr", "1e-3", "--engine.grad_clip_start", "0", "--ema_decay", "0.9"]
WORDS += ["--engine.precision", "fp32", "--engine.timeout", "60", "--log_every", "1", "--stop_every", "1"]
WORDS += ["--checkpoint.every", "1000", "--previews.every", "0", "--tracking.system_metrics", "false"]


@cache
def empty_database():
    """A database with MLflow's tables and nothing in them, to be copied: making it takes a second of a run."""
    folder = Path(tempfile.mkdtemp(prefix="fvdm-empty-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    prepare()
    open_client(f"sqlite:///{folder}/mlflow.db")
    return folder / "mlflow.db"


def words(latents, folder, name, *more):
    if not (folder / "mlflow.db").exists():
        shutil.copy(empty_database(), folder / "mlflow.db")
    base = ["--name", name, "--data.path", str(latents), "--runs", str(folder / "runs")]
    return [*base, "--tracking.uri", f"sqlite:///{folder}/mlflow.db", *WORDS, *map(str, more)]


def environment(rank, world_size, port):
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    fixed = {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | {name: str(value) for name, value in (ranks | fixed).items()}


def start(world_size, arguments, folder, **more):
    port = free_port()
    command = [sys.executable, "-m", "fvdm.training.loop", *arguments]
    return [
        subprocess.Popen(
            command,
            env=environment(rank, world_size, port),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **more,
        )
        for rank in range(world_size)
    ]


def train(world_size, arguments, folder, code=0):
    processes = start(world_size, arguments, folder)
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == code, output
    return outputs


def state(folder, name):
    checkpoint = newest(folder / "runs" / name / "checkpoints")
    total = sum(torch.Size(shape).numel() for shape in read_state(checkpoint)["names"].values())
    return read_state(checkpoint), {s: read_slice(checkpoint, s, range(total)) for s in SLICES}


def losses(folder, name):
    events = [json.loads(line) for line in (folder / "runs" / name / "events.jsonl").read_text().splitlines()]
    return {e["step"]: e["metrics"]["loss/mean"] for e in events if "loss/mean" in e.get("metrics", {})}


def wait_until(condition, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)


def launch(arguments, folder):
    command = [sys.executable, str(ROOT / "launchers/slurm_train.py"), "--cluster", "local", "--nodes", "2"]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [*command, "--config", str(folder / "c.yaml"), *arguments],
        cwd=folder,
        env=hidden,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ranks_of(launcher):
    import psutil

    children = psutil.Process(launcher.pid).children(recursive=True)
    return [child for child in children if "submitit.core._submit" in " ".join(child.cmdline())]
