"""Bytes that a rank really sends in a ZeRO-2 step, beside what `fvdm.training.plan` predicts.

    torchrun --nproc-per-node 2 benchmarks/train_comm.py --model S/2 --size 16

Takes optimizer steps on random latents over gloo, on the CPU, and asks the kernel what has gone through this process's
TCP connections: nothing is modelled. Logs to MLflow.
"""

import argparse
import logging
import os
import socket
import stat
import struct
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.reporting import conclude
from fvdm.config import fail
from fvdm.distributed import Ranks, from_environment, seed_everything
from fvdm.models.loading import build, preset
from fvdm.training.config import EngineConfig
from fvdm.training.engine import Engine, initialise
from fvdm.training.plan import parameters, wire_bytes

ACKNOWLEDGED = 120  # where Linux's struct tcp_info has tcpi_bytes_acked, 64 bits


def sent() -> int:
    """Bytes that the peers of this process's TCP connections have acknowledged so far."""
    total = 0
    for entry in os.scandir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.stat(entry.path).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, ACKNOWLEDGED + 8)
                    total += struct.unpack_from("Q", info, ACKNOWLEDGED)[0]
        except OSError:  # Closed in between.
            continue
    return total


def settled() -> int:
    """The same once all ranks have come here, so that nothing is on its way. Collective."""
    dist.barrier()
    return sent()


def steps(options: argparse.Namespace, ranks: Ranks) -> dict[str, float]:
    """Take the steps; bytes of a step, the mean of the ranks. Collective."""
    seed_everything(0)
    config = preset(options.model).fit((4, options.size, options.size), options.frames)
    settings = EngineConfig(precision=options.precision, grad_clip_start=0, micro_batch=1)
    initialise(settings.timeout)
    engine = Engine(build(config), settings, options.micro_batches * ranks.world_size, ranks)
    x = torch.randn(1, *config.clip_shape)
    t = torch.full(x.shape[:2], 500)
    before = 0
    for step in range(options.steps + 1):
        if step == 1:  # The first one connects the ranks to each other.
            before = settled()
        for _ in range(options.micro_batches):
            engine.backward(engine(x, t).float().square().mean())
            moved = engine.step(step, options.steps + 1)
        assert moved, "the gradient was not finite"
    bytes_ = torch.tensor(float(settled() - before) / options.steps, dtype=torch.float64)
    dist.all_reduce(bytes_)
    engine.close()
    count = parameters(config)
    measured = bytes_.item() / ranks.world_size
    predicted = wire_bytes(count, ranks.world_size, options.micro_batches, options.precision)
    figures = {"ranks": float(ranks.world_size), "parameters": float(count)}
    figures |= {"measured_mb": measured / 1e6, "predicted_mb": predicted / 1e6}
    return figures | ({"measured_over_predicted": measured / predicted} if predicted else {})


def main() -> None:
    """Measure, print, and log to MLflow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="S/2", help="size and patch")
    parser.add_argument("--size", type=int, default=16, help="side of the latent frames; the bytes do not depend on it")
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip; nor on them")
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps that are counted")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/train_comm"), help="journal of the run")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        ranks = from_environment()
        figures = steps(options, ranks)
    except ValueError as error:
        fail(error)
    if ranks.is_main:
        name = f"train_comm {options.model} x{figures['ranks']:.0f}"
        conclude(figures, options.out, name, vars(options), "wire")


if __name__ == "__main__":
    main()
