"""Bytes that a rank really sends in a ZeRO-2 step, beside what `fvdm.training.plan` predicts.

    torchrun --nproc-per-node 2 benchmarks/train_comm.py --model S/2 --size 16

Takes optimizer steps on random latents over gloo, on the CPU, and asks the kernel what has gone through this process's
TCP connections: nothing is modelled. Logs to MLflow.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.on_ranks import run_on_ranks

if TYPE_CHECKING:
    from fvdm.distributed import Ranks

ACKNOWLEDGED = 120  # where Linux's struct tcp_info has tcpi_bytes_acked, 64 bits


@dataclass(frozen=True)
class TrainCommConfig:
    """The steps whose messages are counted.

    Attributes:
        model: size and patch.
        size: side of the latent frames; the bytes do not depend on it.
        frames: frames of a clip; the bytes do not depend on them either.
        micro_batches: micro-batches of a step.
        precision: of the weights.
        steps: optimizer steps that are counted.
        out: folder for the journal of the MLflow run.
    """

    model: str = "S/2"
    size: int = 16
    frames: int = 16
    micro_batches: int = 1
    precision: Literal["bf16", "fp32"] = "bf16"
    steps: int = 2
    out: str = "runs/benchmarks/train_comm"


def sent() -> int:
    """Bytes that the peers of this process's TCP connections have acknowledged so far."""
    import socket
    import stat
    import struct

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
    import torch.distributed as dist

    dist.barrier()
    return sent()


def steps(config: TrainCommConfig, ranks: "Ranks") -> dict[str, float]:
    """Take the steps; bytes of a step, the mean of the ranks. Collective."""
    import torch
    import torch.distributed as dist

    from benchmarks.models import network, zero_engine
    from fvdm.training.plan import parameters, wire_bytes

    shape = network(config.model, config.size, config.frames)
    batch = config.micro_batches * ranks.world_size
    engine, _ = zero_engine(shape, ranks, batch, precision=config.precision, micro_batch=1)
    x = torch.randn(1, *shape.clip_shape)
    t = torch.full(x.shape[:2], 500)
    before = 0
    for step in range(config.steps + 1):
        if step == 1:  # The first one connects the ranks to each other.
            before = settled()
        for _ in range(config.micro_batches):
            engine.backward(engine(x, t).float().square().mean())
            moved = engine.step(step, config.steps + 1)
        assert moved, "the gradient was not finite"
    bytes_ = torch.tensor(float(settled() - before) / config.steps, dtype=torch.float64)
    dist.all_reduce(bytes_)
    engine.close()
    count = parameters(shape)
    measured = bytes_.item() / ranks.world_size
    predicted = wire_bytes(count, ranks.world_size, config.micro_batches, config.precision)
    figures = {"ranks": float(ranks.world_size), "parameters": float(count)}
    figures |= {"measured_mb": measured / 1e6, "predicted_mb": predicted / 1e6}
    return figures | ({"measured_over_predicted": measured / predicted} if predicted else {})


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and log to MLflow."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    run_on_ranks(TrainCommConfig, argv, __doc__, steps, "train_comm", "wire")


if __name__ == "__main__":
    main()
