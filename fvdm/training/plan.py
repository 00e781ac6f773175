"""What a training run will need: `fvdm plan --model XL/2 --nodes 4 --gpus-per-node 8`.

Counted from the shapes, not measured: parameters, bytes per rank under ZeRO-2, arithmetic per clip, bytes on the wire,
and from a GPU's data sheet the time of a step and what fits.
"""

import functools
from dataclasses import dataclass, replace

from fvdm.models.config import BackboneConfig, LoraConfig
from fvdm.models.loading import build, preset
from fvdm.training.config import EngineConfig, PlanConfig
from fvdm.training.engine import accumulation

GPUS = {  # name: dense bf16 rate in TFLOP/s, memory in GiB (data sheets)
    "a100-40": (312, 40),
    "a100-80": (312, 80),
    "h100": (989, 80),
    "h200": (989, 141),
    "b200": (2250, 180),
    "l40s": (362, 48),
    "4090": (165, 24),
}
BASE = {"cpu": 0.75e9, "gpu": 2.0e9}  # bytes of a process without a model: libraries; CUDA, NCCL and their buffers
OVERLAP = 2  # buckets of gradients that live at the same time
FULL = LoraConfig()  # all weights are trained
FREE = 0.9  # share of a GPU's memory that is used


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank, by what holds them.

    Attributes:
        weights: the network, in the precision of training.
        optimizer: this rank's share of masters, two Adam moments and EMA, float32.
        gradients: this rank's share, float32, and a second copy while the optimizer takes it over.
        buckets: gradients in transit, in the precision of training and in float32.
        activations: what the forward pass keeps for the backward pass.
        base: what the process holds without all that.
    """

    weights: float
    optimizer: float
    gradients: float
    buckets: float
    activations: float
    base: float

    @property
    def peak(self) -> float:
        """The larger of two moments: in the backward pass, when activations and gradients meet, and in the step.

        From the first bucket of the backward pass on, the float32 gradients of the whole share exist.
        """
        held = self.weights + self.optimizer + self.base + self.buckets
        return held + max(self.activations + self.gradients / 2, self.gradients)


@functools.cache
def parameters(model: BackboneConfig) -> int:
    """Parameters of the network, counted without making it."""
    import torch

    with torch.device("meta"):
        return sum(p.numel() for p in build(model).parameters())


@functools.cache
def lora_shapes(model: BackboneConfig, targets: tuple[str, ...]) -> list[tuple[int, int]]:
    """Outputs and inputs of each layer that gets an update.

    Raises:
        ValueError: if a target is no layer.
    """
    import torch

    from fvdm.models.lora import target_layers

    with torch.device("meta"):
        network = build(model)
    weights = [network.get_parameter(f"{name}.weight") for name in target_layers(network, targets)]
    return [(weight.shape[0], weight.shape[1]) for weight in weights]


def trained_parameters(model: BackboneConfig, lora: LoraConfig = FULL) -> int:
    """Parameters that are trained: all, or those of the updates."""
    if not lora.rank:
        return parameters(model)
    return sum(lora.rank * (rows + columns) for rows, columns in lora_shapes(model, lora.targets))


def activation_bytes(
    model: BackboneConfig, micro_batch: int, precision: str = "bf16", lora: LoraConfig = FULL
) -> float:
    """What the forward pass of `micro_batch` clips keeps; with activation checkpointing, every k-th block only its
    input. With LoRA it is an upper bound: what only a frozen weight's gradient needs is not kept.
    """
    size = 2 if precision == "bf16" else 4
    block, every = model.block_bytes(size), model.activation_checkpointing
    if lora.rank:
        block += size * lora.rank * -(-len(lora_shapes(model, lora.targets)) // model.depth)
    complete = [not every or i % every != 0 for i in range(model.depth)]
    stored = sum(block if each else model.width * size for each in complete)
    recomputed = block if not all(complete) else 0  # the block whose backward pass runs
    return micro_batch * model.tokens * (stored + recomputed)


def memory(
    model: BackboneConfig,
    engine: EngineConfig,
    world_size: int,
    micro_batch: int,
    device: str = "gpu",
    lora: LoraConfig = FULL,
) -> Memory:
    """Bytes of a rank under ZeRO-2 (ZeRO, section 5: full weights, the rest shared out).

    Args:
        model: the network, with the clip's frames and size.
        engine: precision and buckets.
        world_size: number of ranks.
        micro_batch: clips that a rank takes at once.
        device: gpu or cpu.
        lora: what is trained.
    """
    trained = trained_parameters(model, lora)
    size = 2 if engine.precision == "bf16" else 4
    share = 4 * trained / world_size
    return Memory(
        weights=size * (parameters(model) + (trained if lora.rank else 0)),
        optimizer=4 * share,
        gradients=2 * share,
        buckets=min(engine.reduce_bucket_size, trained) * OVERLAP * (size + 4 * (size != 4)),
        activations=activation_bytes(model, micro_batch, engine.precision, lora),
        base=BASE[device],
    )


def flops(model: BackboneConfig, training: bool = True, lora: LoraConfig = FULL) -> float:
    """Floating-point operations of the matrix products for one clip: forward, and with `training` backward too.

    With LoRA the frozen weights get no gradient, and the updates are counted for all tokens.
    """
    forward = model.forward_flops()
    if not training:
        return forward
    every = model.activation_checkpointing
    recomputed = len(range(0, model.depth, every)) / model.depth if every else 0.0
    if lora.rank:
        updates = 2 * model.tokens * trained_parameters(model, lora)
        return forward * (2 + recomputed) + updates * (3 + recomputed)
    return forward * (3 + recomputed)


def wire_bytes(count: int, world_size: int, micro_batches: int, precision: str = "bf16") -> float:
    """Bytes that a rank sends in a step: gradients in float32 after each micro-batch, weights gathered once.

    DeepSpeed all-reduces a bucket of gradients and keeps the rank's slice of it, so that each gradient is sent twice:
    as a part of a sum, and as a sum. benchmarks/train_comm.py counts the same on the wire.
    """
    rest = (world_size - 1) / world_size
    return rest * count * (8 * micro_batches + (2 if precision == "bf16" else 4))


def largest_micro_batch(
    model: BackboneConfig, engine: EngineConfig, world_size: int, room: float, lora: LoraConfig = FULL
) -> int:
    """Clips that a rank can take at once within `room` bytes; 0 if not one."""
    fits = 0
    while memory(model, engine, world_size, fits + 1, lora=lora).peak <= room:
        fits += 1
        if fits == 1024:
            break
    return fits


def planned_model(options: PlanConfig) -> BackboneConfig:
    """The network for the clips of the plan: their shape as given, else the data's, else the model's own.

    Raises:
        ValueError: if the data cannot be read, or the model cannot take them.
    """
    model = preset(options.model)
    c, h, w = model.latent_shape
    if options.data.path:
        from fvdm.data.shards import LatentShards

        c, h, w = LatentShards(options.data.path).latent_shape
    shape = (options.channels or c, options.size or h, options.size or w)
    model = model.fit(shape, options.frames or model.frames, learned_variance=model.learned_variance)
    return replace(model, activation_checkpointing=options.activation_checkpointing)


def report(options: PlanConfig) -> list[str]:
    """The lines that `fvdm plan` prints.

    Raises:
        ValueError: if the batch does not divide among the ranks, or a target of LoRA is no layer.
    """
    model, lora = planned_model(options), options.lora
    engine = EngineConfig(precision=options.precision, micro_batch=options.micro_batch)
    world = options.world_size
    batch_size = options.batch_size or world
    micro, micros = accumulation(batch_size, engine.micro_batch, world)
    trained = trained_parameters(model, lora)
    rate, _ = GPUS[options.gpu]
    device = "gpu" if options.gpus_per_node else "cpu"
    need = memory(model, engine, world, micro, device, lora)
    step = micro * micros * flops(model, lora=lora) / (rate * 1e12 * options.mfu)
    wire = wire_bytes(trained, world, micros, engine.precision)
    of = f" of {parameters(model) / 1e6:.2f}M (LoRA of rank {lora.rank})" if lora.rank else ""
    lines = [
        f"{options.model}: {trained / 1e6:.2f}M trainable parameters{of}; clips of "
        f"{' x '.join(map(str, model.clip_shape))}, {model.tokens} tokens",
        f"{world} ranks, global batch {batch_size} = {world} x {micro} clips x {micros} micro-batches, "
        f"{engine.precision}",
        "",
        "bytes of a rank (GB)",
        *(f"  {name:12s} {value / 1e9:8.2f}" for name, value in vars(need).items()),
        f"  {'peak':12s} {need.peak / 1e9:8.2f}",
        f"  host copy while a checkpoint is written (checkpoint.background): {16 * trained / world / 1e9:.2f}",
        "",
        f"arithmetic: {flops(model, lora=lora) / 1e12:.2f} TFLOP a clip in training, "
        f"{flops(model, False) / 1e12:.2f} forward",
        f"on the wire: {wire / 1e9:.2f} GB a rank and step, {wire / 1e9 / options.bandwidth:.2f} s at "
        f"{options.bandwidth:g} GB/s if nothing overlaps",
    ]
    if device == "gpu":
        lines += [
            f"a step on {options.gpu} at {options.mfu:.0%} of {rate} TFLOP/s: {step:.2f} s, "
            f"{batch_size / step:.1f} clips/s",
            "",
            *what_fits(model, engine, options, lora),
        ]
    return lines


def what_fits(model: BackboneConfig, engine: EngineConfig, options: PlanConfig, lora: LoraConfig) -> list[str]:
    """Lines of the report: on which GPUs it fits, and with how many clips at once."""
    world, (_, room) = options.world_size, GPUS[options.gpu]

    def clips(every: int, gigabytes: int) -> int:
        changed = replace(model, activation_checkpointing=every)
        return largest_micro_batch(changed, engine, world, FREE * gigabytes * 2**30, lora)

    texts = {0: "all activations kept", 2: "every 2nd block recomputed", 1: "every block recomputed"}
    most = {gpu: clips(1, gigabytes) for gpu, (_, gigabytes) in GPUS.items()}
    return [
        f"what fits on {options.gpu} ({room} GiB, a tenth kept free), clips a rank:",
        *(f"  {text:28s} {clips(every, room)}" for every, text in texts.items()),
        f"{texts[1]}, on other GPUs: " + ", ".join(f"{gpu} {n}" for gpu, n in most.items() if gpu != options.gpu),
    ]
