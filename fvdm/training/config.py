"""Settings of a training run; each section stands beside the code that reads it, in the package of its name."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fvdm.checkpoints.config import CheckpointConfig
from fvdm.config import in_range
from fvdm.data.config import DataConfig
from fvdm.diffusion.config import DiffusionConfig, TimestepsConfig
from fvdm.models.config import Backend, LoraConfig
from fvdm.tracking.config import TrackingConfig


@dataclass(frozen=True)
class EngineConfig:
    """Optimizer and ZeRO-2. The defaults are the paper's.

    Attributes:
        lr: learning rate of AdamW, constant.
        warmup: steps over which the learning rate rises from 0; 0 is none.
        cooldown: steps at the end over which the learning rate falls to 0; 0 is none.
        betas: AdamW's betas.
        weight_decay: AdamW's weight decay, on all weights.
        grad_clip: largest norm of the gradient, once clipping has begun.
        grad_clip_start: step at which clipping begins; 0 clips from the start.
        precision: bf16 (float32 masters, gradients reduced in float32) or fp32.
        micro_batch: clips a rank takes at once; the rest of its share is accumulated. 0 takes its whole share.
        reduce_bucket_size: elements that are reduced in one message.
        overlap_comm: on GPUs, reduce gradients during the backward pass.
        timeout: seconds after which a rank that waits for a hung or lost peer gives up.
    """

    lr: float = 1e-4
    warmup: int = 0
    cooldown: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    grad_clip: float = 0.1
    grad_clip_start: int = 20_000
    precision: Literal["bf16", "fp32"] = "bf16"
    micro_batch: int = 0
    reduce_bucket_size: int = 20_000_000
    overlap_comm: bool = True
    timeout: int = 600

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        some, any_ = (1, math.inf), (0, math.inf)
        in_range(self, "engine", lr=any_, warmup=any_, cooldown=any_, betas=(0, 1), weight_decay=any_, grad_clip=any_)
        in_range(self, "engine", grad_clip_start=any_, micro_batch=any_, reduce_bucket_size=some, timeout=some)


@dataclass(frozen=True)
class PreviewConfig:
    """Videos made while training; a preview that fails costs that preview alone.

    Attributes:
        every: steps between previews; 0 is none.
        tasks: tasks of docs/tasks.md, without those that need further settings, such as any-frame.
        num: clips per task, shared out among the ranks.
        steps: sampling steps.
        solver: ddim, ddpm, dpm++ or unipc.
        guidance: classifier-free guidance scale of a class-conditional model.
        long_frames: frames of the tasks that slide over a video, such as `long`.
        fps: frames per second of the files.
    """

    every: int = 10_000
    tasks: tuple[str, ...] = ("generate", "image-to-video", "interpolate", "long")
    num: int = 4
    steps: int = 50
    solver: str = "ddim"
    guidance: float = 1.0
    long_frames: int = 32
    fps: float = 8.0

    def __post_init__(self) -> None:
        """Refuse, before a run begins, what could give no preview."""
        some = (1, math.inf)
        in_range(self, "previews", every=(0, math.inf), num=some, steps=some, long_frames=some, fps=(0.1, math.inf))
        from fvdm.diffusion.solvers import solver
        from fvdm.diffusion.tasks import on_window
        from fvdm.diffusion.timesteps import evenly_spaced

        solver(self.solver)
        for task in self.tasks:
            on_window(task, evenly_spaced(1), 16, self.long_frames)


@dataclass(frozen=True)
class ValidationConfig:
    """The held-out loss of the averaged weights, on fixed clips, noise and timesteps, comparable between runs.

    Attributes:
        every: steps between two measurements; also measured at the start of a run and at its end; 0 is none.
        path: folder or URL of the held-out shards; empty is data.path.
        split: their split.
        num: clips, shared out among the ranks.
        levels: timesteps of the grid, own t by neighbours' t; a clip costs levels (levels + 1) / 2 forward passes.
    """

    every: int = 0
    path: str = ""
    split: str = "test"
    num: int = 64
    levels: int = 4

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        some = (1, math.inf)
        in_range(self, "validation", every=(0, math.inf), num=some, levels=some)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. The defaults are the paper's, for XL on 256-pixel clips of 16 frames.

    Attributes:
        name: the run; its folder, and its name in MLflow. Run the same name again to resume.
        data: what is trained on.
        runs: folder of all runs.
        model: size and patch: S/2, B/2, L/2, XL/2 (or T, XS; patches /1, /4, /8); or `wan:` and a folder or hub name
            of diffusers' Wan transformer, such as wan:Wan-AI/Wan2.1-T2V-1.3B-Diffusers, or wan:1.3B, wan:14B or wan:5B
            for new weights.
        init: initial weights: a run, a folder of `fvdm convert`, or a checkpoint file of Latte or FVDM; empty is those
            of a `wan:` model, and random ones for other models; none is random ones. A run that resumes has its own.
        from_scratch: where all checkpoints of the run are corrupt, train it again from step 0 instead of refusing to; a
            complete checkpoint is resumed from all the same.
        conditional: use the class labels of the data.
        condition_dropout: probability that a clip's label is hidden, or its text replaced by the empty prompt, for
            guidance.
        attention: attention backend: auto, flash, sdpa, math or blockwise.
        activation_checkpointing: recompute the activations of every k-th block to save memory; 0 is none.
        compile: make the blocks faster with torch.compile; needs a C++ compiler, and a minute at the start.
        p: probability that a clip has a timestep per frame (PTSS), or as timesteps.rule says; 0 is a scalar-timestep
            model.
        steps: optimizer steps at which training ends.
        seed: of the initial weights, the order of the data and all noise.
        ema_decay: decay of the average of the weights, per step.
        log_every: steps between two reports.
        stop_every: steps between two checks of whether a rank received a signal to stop.
        max_skipped: steps in a row whose loss or gradient is not finite, after which the run stops.
        register_as: name under which the trained model (of XL, 2.7 GB) is logged and registered in MLflow when the
            run is complete; auto is the run's name, none leaves it out.
        diffusion: noise process and objective.
        timesteps: how the timesteps of a clip are sampled.
        lora: train low-rank updates of a pretrained model in place of all its weights.
        engine: optimizer and ZeRO-2.
        checkpoint: when checkpoints are written, and which are kept.
        previews: videos made while training.
        validation: the held-out loss.
        tracking: where the run is reported.
    """

    name: str
    data: DataConfig
    runs: str = "runs"
    model: str = "XL/2"
    init: str = ""
    from_scratch: bool = False
    conditional: bool = False
    condition_dropout: float = 0.1
    attention: Backend = "auto"
    activation_checkpointing: int = 0
    compile: bool = False
    p: float = 0.2
    steps: int = 250_000
    seed: int = 0
    ema_decay: float = 0.9999
    log_every: int = 100
    stop_every: int = 10
    max_skipped: int = 10
    register_as: str = "auto"
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    timesteps: TimestepsConfig = field(default_factory=TimestepsConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    previews: PreviewConfig = field(default_factory=PreviewConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        if not self.name:
            raise ValueError("name is empty: it is the name of the run's folder.")
        some, share = (1, math.inf), (0, 1)
        in_range(self, condition_dropout=share, p=share, ema_decay=share, activation_checkpointing=(0, math.inf))
        in_range(self, steps=some, log_every=some, stop_every=some, max_skipped=some, seed=(0, math.inf))

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.runs) / self.name

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / "checkpoints"


@dataclass(frozen=True)
class PlanDataConfig:
    """The data of the run.

    Attributes:
        path: folder of latent shards, or its URL.
    """

    path: str = ""


@dataclass(frozen=True, kw_only=True)
class PlanClipsConfig:
    """The clips that it trains on.

    Attributes:
        frames: latent frames of a clip; 0 is the model's own number.
        channels: latent channels; 0 takes those of the data, or of the model without data.
        size: side of the latent frames; 0 takes that of the data, or of the model without data.
        data: the data that channels and size are taken from.
    """

    frames: int = 0
    channels: int = 0
    size: int = 0
    data: PlanDataConfig = field(default_factory=PlanDataConfig)


@dataclass(frozen=True, kw_only=True)
class PlanClusterConfig:
    """The cluster that it runs on.

    Attributes:
        nodes: number of nodes.
        gpus_per_node: GPUs of a node; 0 is one CPU rank a node.
        gpu: whose data sheet the time and what fits are estimated from.
        mfu: share of the GPU's rate that is reached.
        bandwidth: GB/s of a rank to its peers.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    gpu: Literal["4090", "a100-40", "a100-80", "b200", "h100", "h200", "l40s"] = "h100"
    mfu: float = 0.4
    bandwidth: float = 25.0

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * max(1, self.gpus_per_node)


@dataclass(frozen=True)
class PlanConfig(PlanClusterConfig, PlanClipsConfig):
    """The training run that `fvdm plan` estimates.

    Attributes:
        model: size and patch, such as XL/2; or `wan:` and a folder or hub name of diffusers.
        batch_size: global batch in clips; 0 is one a rank.
        micro_batch: clips that a rank takes at once; 0 is its whole share.
        lora: low-rank updates of a pretrained model in place of all its weights.
        activation_checkpointing: recompute the activations of every k-th block; 0 is none.
        precision: of the weights.
    """

    model: str = "XL/2"
    batch_size: int = 0
    micro_batch: int = 0
    lora: LoraConfig = field(default_factory=LoraConfig)
    activation_checkpointing: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        some = (1, math.inf)
        in_range(self, nodes=some, mfu=(0.01, 1), bandwidth=(0.01, math.inf))
        in_range(self, frames=(0, math.inf), channels=(0, math.inf), size=(0, math.inf))
