"""A training run: its settings, the parts it is made of, and how it is kept in, and taken up from, its folder."""

import json
import logging
import math
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fvdm import config as settings
from fvdm.checkpoints import checkpoint as ckpt
from fvdm.checkpoints.writer import Writer
from fvdm.data.shards import LatentShards
from fvdm.diffusion.process import Diffusion
from fvdm.distributed import HangDetector, Ranks
from fvdm.files import LockHeldError, lock, write_text
from fvdm.models.backbone import Backbone
from fvdm.models.config import BackboneConfig, to_dict
from fvdm.models.loading import load_weights, preset
from fvdm.tracking.description import training_description
from fvdm.tracking.provenance import command_line, environment, git_patch
from fvdm.tracking.tracker import Tracker
from fvdm.training.config import TrainConfig
from fvdm.training.continuity import changes, identity
from fvdm.training.ema import EMA
from fvdm.training.engine import Engine, accumulation

logger = logging.getLogger(__name__)

LOCK_PATIENCE = 10.0  # seconds


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


def model_config(config: TrainConfig, shards: LatentShards) -> BackboneConfig:
    """The network that fits the settings and the data.

    Raises:
        ValueError: if labels are wanted and the data has none, or the network cannot take its latents.
    """
    if config.conditional and not shards.classes:
        raise ValueError(f"conditional is set, but the shards in {config.data.path} have no class labels")
    network = preset(config.model).fit(
        shards.latent_shape,
        config.data.frames,
        len(shards.classes) if config.conditional else 0,
        config.diffusion.learned_variance,
    )
    return replace(network, attention=config.attention, activation_checkpointing=config.activation_checkpointing)


def initial_weights(init: str, model: Backbone) -> None:
    """Begin with other weights than random ones: most come to a timestep per frame from a scalar-timestep model.

    Args:
        init: see `TrainConfig`; of a run, its averaged weights.
        model: takes them.

    Raises:
        ValueError: if there are none, or they are of another network.
    """
    weights = load_weights(init)
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
        if ckpt.validate(folder, deep=False) is None:
            changes(ckpt.read_state(folder), settings.flatten(config), shards)
            break
    if config.init and not Path(config.init).exists():
        raise ValueError(f"init {config.init}: there is no such file or folder")
    accumulation(config.data.batch_size, config.engine.micro_batch, world_size)


@contextmanager
def run_lock(folder: Path, patience: float) -> Iterator[None]:
    """Refuse a second training of the same run while one goes on.

    Args:
        folder: the run's.
        patience: seconds to wait for what is left of an earlier start of the same job, on a node that was lost.

    Raises:
        ValueError: if the run is already being trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    me = {"host": platform.node(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID", "")}
    holder_file = folder / ".holder"
    with ExitStack() as held:
        try:
            held.enter_context(lock(folder / ".lock", LOCK_PATIENCE))  # the ranks of a killed job take a moment to end
        except LockHeldError:
            holder = _holder(holder_file)
            same_job = me["job"] and holder.get("job") == me["job"]
            try:
                held.enter_context(lock(folder / ".lock", max(patience - LOCK_PATIENCE, 0) if same_job else 0))
            except LockHeldError:
                holder = _holder(holder_file)
                by = f"process {holder.get('pid')} on {holder.get('host')}"
                raise ValueError(
                    f"{folder} is being trained by another job, {by}; wait for it, or use another name"
                ) from None
        write_text(holder_file, json.dumps(me))
        yield


def _holder(path: Path) -> dict[str, Any]:
    """Host, process and job of who holds a run; empty where that is not known."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


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
        network: BackboneConfig,
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
        self.hang_detector = HangDetector(config.engine.timeout)
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
            "network": to_dict(self.network),
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
        text = training_description(
            flat,
            command_line(),
            parameters=sum(math.prod(shape) for shape in self.engine.names.values()),
            latent_shape=self.shards.latent_shape,
            videos=len(self.shards),
            vae=self.shards.manifest.vae,
            classes=self.network.classes,
            ranks=self.ranks.world_size,
        )
        tracker = Tracker(folder, self.config.tracking, self.config.name, flat, {"kind": "train"}, description=text)
        tracker.artifact(folder / "config.yaml")
        tracker.artifact(folder / "environment.json")
        tracker.artifact(folder / "git.patch")
        return tracker
