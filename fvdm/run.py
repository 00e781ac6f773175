"""A training run: its settings, the parts it is made of, and how it is kept in, and taken up from, its folder."""

import fcntl
import json
import logging
import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from fvdm import checkpoint as ckpt
from fvdm import config as settings
from fvdm.attention import Backend
from fvdm.checkpoint import CheckpointConfig
from fvdm.continuity import changes, identity
from fvdm.convert import read_model
from fvdm.data import DataConfig
from fvdm.diffusion import Diffusion, DiffusionConfig
from fvdm.distributed import Ranks, RollCall
from fvdm.ema import EMA
from fvdm.engine import Engine, EngineConfig, accumulation
from fvdm.files import write_text
from fvdm.model import ModelConfig, VideoDiT, preset
from fvdm.previews import PreviewConfig
from fvdm.provenance import environment, git_patch
from fvdm.shards import LatentShards
from fvdm.tracking import Tracker, TrackingConfig
from fvdm.writer import Writer

logger = logging.getLogger(__name__)

LOCK_PATIENCE = 10.0  # seconds


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. The defaults are the paper's, for XL on 256-pixel clips of 16 frames.

    Attributes:
        name: the run; its folder, and its name in MLflow. Run the same name again to resume.
        data: what is trained on.
        runs: folder of all runs.
        model: size and patch: S/2, B/2, L/2, XL/2 (or T, XS; patches /1, /4, /8).
        init: weights to begin with: a run, a folder of fvdm.convert, or a checkpoint file of Latte or FVDM; a run that
            is resumed has its own.
        conditional: use the class labels of the data.
        class_dropout: probability that a clip's label is hidden, for guidance.
        attention: attention backend: auto, flash, sdpa or math.
        recompute: recompute the activations of every k-th block to save memory; 0 is none.
        compile: make the blocks faster with torch.compile; needs a C++ compiler, and a minute at the start.
        p: probability that a clip has one timestep per frame (PTSS); 0 is a scalar-timestep model.
        steps: optimizer steps at which training ends.
        seed: of the initial weights, the order of the data and all noise.
        ema_decay: decay of the average of the weights, per step.
        log_every: steps between two reports.
        stop_every: steps between two looks at whether a rank was told to stop.
        max_skipped: steps in a row whose loss or gradient is not finite, after which the run stops.
        register_as: name under which the trained model (of XL, 2.7 GB) is logged and registered in MLflow when the
            training is complete; auto is the run's name, none leaves it out.
        diffusion: noise process and objective.
        engine: optimizer and ZeRO-2.
        checkpoint: when checkpoints are written, and which are kept.
        previews: videos made while training.
        tracking: where the run is reported.
    """

    name: str
    data: DataConfig
    runs: str = "runs"
    model: str = "XL/2"
    init: str = ""
    conditional: bool = False
    class_dropout: float = 0.1
    attention: Backend = "auto"
    recompute: int = 0
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
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    previews: PreviewConfig = field(default_factory=PreviewConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of its range."""
        if not self.name:
            raise ValueError("name is empty: it is the name of the run's folder.")
        some, share = (1, math.inf), (0, 1)
        settings.in_range(self, class_dropout=share, p=share, ema_decay=share, recompute=(0, math.inf))
        settings.in_range(self, steps=some, log_every=some, stop_every=some, max_skipped=some, seed=(0, math.inf))

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.runs) / self.name

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / "checkpoints"


@dataclass
class Progress:
    """How far a run has come; with the weights it is the whole state.

    Attributes:
        step: steps taken, skipped ones included.
        updates: steps that moved the weights; Adam's count.
        consumed: samples used up by all ranks.
        skipped: steps in a row that moved nothing.
    """

    step: int = 0
    updates: int = 0
    consumed: int = 0
    skipped: int = 0


def model_config(config: TrainConfig, shards: LatentShards) -> ModelConfig:
    """The network that fits the settings and the data.

    Raises:
        ValueError: if labels are wanted and the data has none, or frames are not square.
    """
    c, h, w = shards.latent_shape
    if h != w:
        raise ValueError(f"the latents in {config.data.path} are {h} x {w}; the model takes square frames")
    if config.conditional and not shards.classes:
        raise ValueError(f"conditional is set, but the shards in {config.data.path} have no class labels")
    return replace(
        preset(config.model),
        channels=c,
        size=h,
        frames=config.data.frames,
        num_classes=len(shards.classes) if config.conditional else 0,
        learned_variance=config.diffusion.learned_variance,
        attention=config.attention,
        recompute=config.recompute,
    )


def initial_weights(init: str, model: VideoDiT) -> None:
    """Begin with other weights than random ones: most come to a timestep per frame from a scalar-timestep model.

    Args:
        init: see `TrainConfig`; of a run, its averaged weights.
        model: takes them.

    Raises:
        ValueError: if there are none, or they are of another network.
    """
    path = Path(init)
    if path.is_file() or (path / "config.json").is_file():
        weights = dict(read_model(path).state_dict())
    else:
        weights = ckpt.read_weights(ckpt.resolve(path))
    theirs, own = ({(name, w.shape) for name, w in each.items()} for each in (weights, model.state_dict()))
    odd = sorted({name for name, _ in theirs ^ own})
    if odd:
        raise ValueError(
            f"the weights of --init {init} do not fit the model of this run: {len(odd)} differ, such as {odd[0]}; "
            f"choose the same size, latent channels, classes and learned variance"
        )
    model.load_state_dict(weights)


def check(config: TrainConfig, world_size: int) -> None:
    """Find, before a job waits in a queue, what would end it at its start.

    Raises:
        ValueError: if the data cannot be read, or model, data, batch, ranks and the run so far do not fit each other.
    """
    shards = LatentShards(config.data.path, config.data.split, config.data.cache)
    model_config(config, shards)
    for folder in reversed(ckpt.checkpoints(config.checkpoints)):
        if ckpt.why_broken(folder, deep=False) is None:
            changes(ckpt.read_state(folder), settings.flatten(config), shards)
            break
    if config.init and not Path(config.init).exists():
        raise ValueError(f"init {config.init}: there is no such file or folder")
    accumulation(config.data.batch_size, config.engine.micro_batch, world_size)


@contextmanager
def only_one(folder: Path, patience: float) -> Iterator[None]:
    """Refuse a second training of the same run while one goes on.

    Args:
        folder: the run's.
        patience: seconds to wait for what is left of an earlier start of the same job, on a node that was lost.

    Raises:
        ValueError: if the run is already being trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    me = {"host": platform.node(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID", "")}
    with (folder / ".lock").open("a+") as lock:
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                lock.seek(0)
                holder = json.loads(lock.readline() or "{}")
            same_job = me["job"] and holder.get("job") == me["job"]
            if time.monotonic() - began > (patience if same_job else LOCK_PATIENCE):
                by = f"process {holder.get('pid')} on {holder.get('host')}"
                raise ValueError(f"{folder} is being trained by another job, {by}; wait for it, or use another name")
            time.sleep(1)  # The ranks of a killed job take a moment to end.
        lock.truncate(0)
        lock.write(json.dumps(me) + "\n")
        lock.flush()
        yield


def newest_checkpoint(config: TrainConfig, ranks: Ranks) -> Path | None:
    """Where the run goes on from: its newest whole checkpoint, as rank 0 finds it. Collective."""
    found: list[Path | None] = [None]
    if ranks.is_main:
        ckpt.clean(config.checkpoints)
        found = [ckpt.newest(config.checkpoints)]
    dist.broadcast_object_list(found)
    return found[0]


class Run:
    """The parts of a training run, and what is kept of it."""

    def __init__(
        self,
        config: TrainConfig,
        network: ModelConfig,
        engine: Engine,
        ema: EMA,
        ranks: Ranks,
        shards: LatentShards,
    ) -> None:
        self.config, self.network, self.engine, self.ema = config, network, engine, ema
        self.ranks, self.shards = ranks, shards
        self.diffusion = Diffusion(config.diffusion)
        self.progress = Progress()
        self.first = 0  # the step at which this start began
        self.root = config.checkpoints
        self.roll_call = RollCall(config.engine.timeout)
        self.writer = Writer(config.checkpoint.background, config.checkpoint.timeout)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: if it is of another model, or of other latents.
        """
        state = ckpt.read_state(folder)
        changed = changes(state, settings.flatten(self.config), self.shards)
        if state["names"] != {name: list(shape) for name, shape in self.engine.names.items()}:
            raise ValueError(
                f"{folder} holds a model of another shape ({state['settings']['model']}) than {self.config.model} on "
                f"these data; give the run another name, or its own settings"
            )
        slices = {name: ckpt.read_slice(folder, name, self.engine.slice) for name in ckpt.SLICES}
        self.progress = Progress(**state["progress"])
        self.first = self.progress.step
        self.engine.load_state(slices, self.progress.updates)
        self.ema.shards[0][: len(self.engine.slice)] = slices["ema"].to(self.engine.device)
        if self.ranks.is_main:
            logger.info("resuming %s from step %d", self.config.name, self.progress.step)
            if changed:
                logger.warning("from here on its samples are not those of the unbroken run: %s", "; ".join(changed))

    def save(self) -> None:
        """Write a checkpoint and remove those that the policy does not keep. Collective."""
        own = slice(len(self.engine.slice))
        step, begin = self.progress.step, self.engine.slice.start
        state = {
            "progress": dict(vars(self.progress)),
            "names": self.engine.names,
            "settings": settings.plain(self.config),
            "network": settings.plain(self.network),
            "vae": self.shards.manifest.vae,
            "normalisation": self.shards.manifest.normalisation,
            "classes": list(self.shards.classes),
            "size": self.shards.manifest.size,
        } | identity(self.shards)

        def write(slices: dict[str, Tensor]) -> None:
            ranks = self.ranks
            folder = ckpt.save(self.root, step, slices, begin, state, ranks.rank, ranks.world_size, self.writer.barrier)
            if ranks.is_main:
                ckpt.prune(self.root, self.config.checkpoint)
                logger.info("checkpoint %s", folder)

        self.writer.begin(self.engine.state() | {"ema": self.ema.shards[0][own]}, write)

    def finish(self) -> None:
        """Wait for the last checkpoint. Collective.

        Raises:
            OSError: on all ranks, if it could not be written.
        """
        error = self.writer.wait()
        if error:
            raise OSError(
                f"the last checkpoint, of step {self.progress.step}, could not be written ({error}); make room on the "
                f"disk of {self.root} and start the run again: it goes on from the checkpoint before"
            )

    def begin_tracking(self) -> Tracker:
        """Write down what this run is, and begin (or continue) its MLflow run."""
        folder = self.config.folder
        settings.save(self.config, folder / "config.yaml")
        write_text(folder / "environment.json", json.dumps(environment(), indent=1))
        write_text(folder / "git.patch", git_patch())
        flat = settings.flatten(self.config)
        tracker = Tracker(folder, self.config.tracking, self.config.name, flat, {"kind": "train"})
        tracker.artifact(folder / "config.yaml")
        tracker.artifact(folder / "environment.json")
        tracker.artifact(folder / "git.patch")
        return tracker
