"""What a training will need: `python -m fvdm.plan --model XL/2 --nodes 4 --gpus-per-node 8`.

Counted from the shapes, not measured: parameters, bytes per rank under ZeRO-2, arithmetic per clip, bytes on the wire,
and from a GPU's data sheet the time of a step and what fits.
"""

import argparse
import functools
from dataclasses import dataclass, replace

from fvdm.config import fail
from fvdm.engine import EngineConfig, accumulation
from fvdm.model import ModelConfig, VideoDiT, preset

GPUS = {  # name: dense bf16 rate in TFLOP/s, memory in GiB (data sheets)
    "a100-40": (312, 40),
    "a100-80": (312, 80),
    "h100": (989, 80),
    "h200": (989, 141),
    "b200": (2250, 180),
    "l40s": (362, 48),
    "4090": (165, 24),
}
BASE = {"cpu": 0.75e9, "gpu": 2.0e9}  # bytes of a process that holds nothing: libraries; CUDA, NCCL and their buffers
OVERLAP = 2  # buckets of gradients that live at the same time


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank, by what holds them.

    Attributes:
        weights: the network, in the precision of training.
        optimizer: this rank's share of masters, two Adam moments and EMA, float32.
        gradients: this rank's share, float32, and once more while the optimizer takes it over.
        buckets: gradients on their way, in the precision of training and in float32.
        activations: what the forward pass keeps for the backward pass.
        base: what the process holds before all that.
    """

    weights: float
    optimizer: float
    gradients: float
    buckets: float
    activations: float
    base: float

    @property
    def peak(self) -> float:
        """The larger of two moments: in the backward pass, when activations and gradients meet, and in the step."""
        held = self.weights + self.optimizer + self.base + self.buckets
        return held + max(self.activations + self.gradients / 4, self.gradients)


@functools.cache
def parameters(model: ModelConfig) -> int:
    """Trainable parameters, counted without making the network."""
    import torch

    with torch.device("meta"):
        return sum(p.numel() for p in VideoDiT(model).parameters())


def tokens(model: ModelConfig) -> int:
    """Tokens of a clip."""
    return model.frames * (model.size // model.patch) ** 2


def activation_bytes(model: ModelConfig, micro_batch: int, precision: str = "bf16") -> float:
    """What the forward pass of `micro_batch` clips keeps; one of every `model.recompute` blocks keeps its input alone.

    A block keeps 16 d numbers for each token: for attention the residual, q, k, v, the attended and the projected
    tokens (6 d); for the MLP the residual, the hidden layer before and after GELU, and its output (10 d).
    """
    size = 2 if precision == "bf16" else 4
    per_block = 16 * model.width * size + 4 * model.heads  # attention also keeps a float32 for each head
    whole = [True] * model.depth
    if model.recompute:
        whole = [i % model.recompute != 0 for i in range(model.depth)]
    kept = sum(per_block if keep else model.width * size for keep in whole)
    again = per_block if not all(whole) else 0  # of the block that is being computed again
    return micro_batch * tokens(model) * (kept + again)


def memory(model: ModelConfig, engine: EngineConfig, world_size: int, micro_batch: int, device: str = "gpu") -> Memory:
    """Bytes of a rank under ZeRO-2 (ZeRO, section 5: weights whole, the rest shared out).

    Args:
        model: the network, with the clip's frames and size.
        engine: precision and buckets.
        world_size: number of ranks.
        micro_batch: clips that a rank takes at once.
        device: gpu or cpu.
    """
    count = parameters(model)
    size = 2 if engine.precision == "bf16" else 4
    share = 4 * count / world_size
    return Memory(
        weights=size * count,
        optimizer=4 * share,
        gradients=2 * share,
        buckets=min(engine.bucket, count) * OVERLAP * (size + 4 * (size != 4)),
        activations=activation_bytes(model, micro_batch, engine.precision),
        base=BASE[device],
    )


def flops(model: ModelConfig, training: bool = True) -> float:
    """Floating-point operations of the matrix products for one clip: forward, and with `training` backward too.

    A block does 24 d^2 for each token, attention 4 n d for each token among n, modulation 12 d^2 for each frame.
    """
    d, n, f = model.width, (model.size // model.patch) ** 2, model.frames
    space = f * n * (24 * d * d + 4 * n * d) + f * 12 * d * d
    time = f * n * (24 * d * d + 4 * f * d) + f * 12 * d * d
    patch = 2 * f * n * d * model.channels * model.patch**2
    ends = patch * (1 + 1 + model.learned_variance) + f * (2 * 256 * d + 2 * d * d + 4 * d * d)
    forward = model.depth / 2 * (space + time) + ends
    if not training:
        return forward
    again = len(range(0, model.depth, model.recompute)) / model.depth if model.recompute else 0.0
    return forward * (3 + again)


def wire_bytes(count: int, world_size: int, micro_batches: int, precision: str = "bf16") -> float:
    """Bytes that a rank sends in a step: gradients in float32 after each micro-batch, weights gathered once.

    DeepSpeed all-reduces a bucket of gradients and keeps the rank's slice of it, so that each gradient is sent twice:
    as a part of a sum, and as a sum. benchmarks/train_comm.py counts the same on the wire.
    """
    rest = (world_size - 1) / world_size
    return rest * count * (8 * micro_batches + (2 if precision == "bf16" else 4))


def largest_micro_batch(model: ModelConfig, engine: EngineConfig, world_size: int, room: float) -> int:
    """Clips that a rank can take at once within `room` bytes; 0 if not one."""
    fits = 0
    while memory(model, engine, world_size, fits + 1).peak <= room:
        fits += 1
        if fits == 1024:
            break
    return fits


def report(model: ModelConfig, engine: EngineConfig, options: argparse.Namespace) -> list[str]:
    """The lines that the command prints.

    Raises:
        ValueError: if the batch does not divide among the ranks.
    """
    world = options.nodes * max(1, options.gpus_per_node)
    micro, micros = accumulation(options.batch_size, engine.micro_batch, world)
    count = parameters(model)
    rate, room = GPUS[options.gpu]
    device = "gpu" if options.gpus_per_node else "cpu"
    need = memory(model, engine, world, micro, device)
    step = micro * micros * flops(model) / (rate * 1e12 * options.mfu)
    wire = wire_bytes(count, world, micros, engine.precision)
    lines = [
        f"{options.model}: {count / 1e6:.2f}M trainable parameters; clips of {model.frames} x {model.channels} x "
        f"{model.size} x {model.size}, {tokens(model)} tokens",
        f"{world} ranks, global batch {options.batch_size} = {world} x {micro} clips x {micros} micro-batches, "
        f"{engine.precision}",
        "",
        "bytes of a rank (GB)",
        *(f"  {name:12s} {value / 1e9:8.2f}" for name, value in vars(need).items()),
        f"  {'peak':12s} {need.peak / 1e9:8.2f}",
        f"  host copy while a checkpoint is written (checkpoint.background): {16 * count / world / 1e9:.2f}",
        "",
        f"arithmetic: {flops(model) / 1e12:.2f} TFLOP a clip in training, {flops(model, False) / 1e12:.2f} forward",
        f"on the wire: {wire / 1e9:.2f} GB a rank and step, {wire / 1e9 / options.bandwidth:.2f} s at "
        f"{options.bandwidth:g} GB/s if nothing overlaps",
    ]
    if device == "gpu":
        lines += [
            f"a step on {options.gpu} at {options.mfu:.0%} of {rate} TFLOP/s: {step:.2f} s, "
            f"{options.batch_size / step:.1f} clips/s",
            "",
            f"what fits on {options.gpu} ({room} GiB, a tenth kept free), clips a rank:",
            *(
                f"  {text:28s} {largest_micro_batch(replace(model, recompute=k), engine, world, 0.9 * room * 2**30)}"
                for text, k in (("all activations kept", 0), ("every 2nd block again", 2), ("every block again", 1))
            ),
        ]
    return lines


def main() -> None:
    """Print the plan of a training."""
    parser = argparse.ArgumentParser(prog="python -m fvdm.plan", description=__doc__)
    parser.add_argument("--model", default="XL/2", help="size and patch, such as XL/2")
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of a node; 0: one CPU rank a node")
    parser.add_argument("--batch-size", type=int, default=0, help="global batch in clips; one a rank when not given")
    parser.add_argument("--micro-batch", type=int, default=0, help="clips that a rank takes at once; 0: its share")
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip")
    parser.add_argument("--channels", type=int, default=4, help="latent channels")
    parser.add_argument("--size", type=int, default=32, help="side of the latent frames")
    parser.add_argument("--recompute", type=int, default=0, help="compute every k-th block again; 0: none")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the weights")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="for the time and for what fits")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the GPU's rate that is reached")
    parser.add_argument("--bandwidth", type=float, default=25.0, help="GB/s of a rank to its peers")
    options = parser.parse_args()
    world = options.nodes * max(1, options.gpus_per_node)
    options.batch_size = options.batch_size or world
    try:
        model = replace(
            preset(options.model),
            frames=options.frames,
            channels=options.channels,
            size=options.size,
            recompute=options.recompute,
        )
        engine = EngineConfig(precision=options.precision, micro_batch=options.micro_batch)
        print("\n".join(report(model, engine, options)))
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    main()
