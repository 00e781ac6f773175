"""The state of a training run: what it keeps in its folder, and how it resumes.

Resume is `find_checkpoint`, then `Run.resume`: every rank reads its slices of the flat vector (`read_slices`) and hands
them to the engine (`Engine.load_state`).
"""

import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fvdm import config as settings
from fvdm.checkpoints.find import clean, corrupt_checkpoints, prune, set_aside, set_corrupt_aside
from fvdm.checkpoints.layout import SLICES, checksum_mismatch, training_files
from fvdm.checkpoints.read import read_slices, read_state
from fvdm.checkpoints.save import save
from fvdm.checkpoints.writer import AsyncCheckpointWriter
from fvdm.data.sequence import resolve_lanes
from fvdm.data.shards import LatentShards
from fvdm.diffusion.process import Diffusion
from fvdm.distributed import HangDetector, Ranks, Watchdog, first_error
from fvdm.files import LockHeldError, lock, write_text
from fvdm.models.config import BackboneConfig, to_dict
from fvdm.models.lora_files import Base
from fvdm.tracking.description import training_description
from fvdm.tracking.provenance import command_line, environment, git_patch
from fvdm.tracking.tracker import Tracker
from fvdm.training.config import TrainConfig
from fvdm.training.data_identity import data_identity, data_mismatch, text_encoder
from fvdm.training.ema import EMA
from fvdm.training.engine import Engine
from fvdm.training.finetuning import check_resumed_lora
from fvdm.training.meter import ReadMeter

logger = logging.getLogger(__name__)

LOCK_TIMEOUT = 10.0  # seconds


@dataclass
class Progress:
    """How far a run has come; with the weights it is the whole state.

    Attributes:
        step: steps taken, skipped ones included.
        updates: steps that moved the weights; Adam's count.
        consumed: samples used up by all ranks.
        skipped: steps in a row that moved nothing.
        corrupt: corrupt samples in whose place others came, of all ranks.
    """

    step: int = 0
    updates: int = 0
    consumed: int = 0
    skipped: int = 0
    corrupt: int = 0


@contextmanager
def run_lock(folder: Path, timeout: float) -> Iterator[None]:
    """Let no second job train the same run at the same time.

    Args:
        folder: the run's.
        timeout: seconds to wait for the processes of an earlier start of the same job, on a node that was lost.

    Raises:
        ValueError: if the run is already being trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = {"host": platform.node(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID", "")}
    holder_file = folder / ".holder"
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(folder / ".lock", LOCK_TIMEOUT))  # the ranks of a killed job take a moment to end
        except LockHeldError:
            holder = _holder(holder_file)
            same_job = own["job"] and holder.get("job") == own["job"]
            try:
                stack.enter_context(lock(folder / ".lock", max(timeout - LOCK_TIMEOUT, 0) if same_job else 0))
            except LockHeldError:
                holder = _holder(holder_file)
                by = f"process {holder.get('pid')} on {holder.get('host')}"
                raise ValueError(
                    f"{folder} is being trained by another job, {by}; wait for it, or use another name"
                ) from None
        write_text(holder_file, json.dumps(own))
        yield


def _holder(path: Path) -> dict[str, Any]:
    """Host, process and job of the holder of a run's lock; empty if unknown."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def find_checkpoint(config: TrainConfig, ranks: Ranks) -> Path | None:
    """The run's newest complete checkpoint, or None for a new run. Collective.

    Rank 0 compares the sizes of its files; then the ranks share out the checksums, so that each byte is read once.
    Corrupt checkpoints are moved aside.

    Raises:
        ValueError: if there are checkpoints, but all are corrupt; see `refuse_corrupt`.
        OSError: if a file cannot be read, or a corrupt checkpoint not be moved.
    """
    while True:
        found: list[Path | Exception | None] = [None]
        if ranks.is_main:
            try:
                clean(config.checkpoints)
                found = [next(reversed(set_corrupt_aside(config.checkpoints)), None)]
                if found == [None]:
                    refuse_corrupt(config)
            except (ValueError, OSError) as error:
                found = [error]
        dist.broadcast_object_list(found)
        folder = found[0]
        if isinstance(folder, Exception):
            raise folder
        if folder is None:
            return None
        reason, failure = None, ""
        try:
            reason = checksum_mismatch(folder, training_files(folder)[ranks.rank :: ranks.world_size])
        except (OSError, ValueError) as error:
            failure = str(error)
        failure = first_error(failure)
        if failure:
            raise OSError(f"the checkpoint {folder} cannot be read: {failure}")
        reason = first_error(reason or "").partition(": ")[2]
        if not reason:
            return folder
        if ranks.is_main:
            set_aside(folder, reason)


def refuse_corrupt(config: TrainConfig) -> None:
    """Refuse to start a run again from step 0 because all its checkpoints are corrupt, unless the user asks for it.

    Raises:
        ValueError: lists them, and says what to type.
    """
    corrupt = corrupt_checkpoints(config.checkpoints)
    if corrupt and not config.from_scratch:
        listed = "; ".join(f"{folder}: {reason}" for folder, reason in corrupt.items())
        raise ValueError(
            f"run {config.name} has no complete checkpoint left ({listed}); to train it again from step 0, add "
            f"--from-scratch true; to leave it as it is, choose another --name"
        )


class Run:
    """The parts of a training run, and what it keeps in its folder."""

    def __init__(
        self,
        config: TrainConfig,
        network: BackboneConfig,
        engine: Engine,
        ema: EMA,
        ranks: Ranks,
        shards: LatentShards,
        base: Base | None = None,
    ) -> None:
        """Collective: opens process groups."""
        self.base = base
        self.config, self.network, self.engine, self.ema = config, network, engine, ema
        self.ranks, self.shards = ranks, shards
        self.diffusion = Diffusion(config.diffusion)
        self.progress = Progress()
        self.lanes = resolve_lanes(config.data, shards, config.data.batch_size)
        self.read_meter = ReadMeter(engine.device)
        self.first = 0  # the step at which this start began
        self.root = config.checkpoints
        self.hang_detector = HangDetector(config.engine.timeout)
        # Before NCCL ends the process: asking the ranks takes up to 0.3 of the timeout.
        on_gpu = engine.device.type == "cuda"
        self.watchdog = Watchdog(self.hang_detector, 0.6 * config.engine.timeout, enabled=on_gpu)
        self.writer = AsyncCheckpointWriter(config.checkpoint.background, config.checkpoint.timeout)

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: if it is of another model, another base of a LoRA, or of other latents.
        """
        state = read_state(folder)
        mismatched = data_mismatch(state, settings.flatten(self.config), self.shards)
        reason = ""
        try:
            check_resumed_lora(state, self.config, self.base)
        except ValueError as error:
            reason = str(error)
        reason = first_error(reason)  # One rank of a node knows the base model.
        if reason:
            raise ValueError(reason.partition(": ")[2])
        if state["names"] != {name: list(shape) for name, shape in self.engine.names.items()}:
            raise ValueError(
                f"{folder} holds a model of another shape ({state['settings']['model']}) than {self.config.model} on "
                f"these data; give the run another name, or its own settings"
            )
        slices = read_slices(folder, SLICES, self.engine.slices)
        self.progress = Progress(**state["progress"])
        self.lanes = state.get("lanes", 0)  # of a run that began before there were lanes: one permutation
        self.first = self.progress.step
        self.engine.load_state(slices, self.progress.updates)
        for shard, values in zip(self.ema.shards, slices["ema"], strict=True):
            shard[: len(values)] = values.to(self.engine.device)
        if self.ranks.is_main:
            logger.info("resuming %s from step %d", self.config.name, self.progress.step)
            if mismatched:
                logger.warning("from here on its samples are not those of the unbroken run: %s", "; ".join(mismatched))
            if self.config.data.lanes not in (None, self.lanes):
                logger.warning(
                    "data.lanes stays %d, as this run began; a run of another name may have others", self.lanes
                )

    def read_data_metrics(self) -> dict[str, float]:
        """What reading the data took since the last call, of all ranks, by name of the metric. Collective."""
        counted, corrupt = self.read_meter.read()
        self.progress.corrupt += corrupt
        values = {}
        if self.config.data.corrupt == "skip":
            values["data/corrupt_samples"] = float(self.progress.corrupt)
        if self.shards.location.remote:
            values |= {f"data/{name}": value for name, value in vars(counted).items()}
        return values

    def save(self) -> None:
        """Write a checkpoint and remove those that the policy does not keep. Collective."""
        step, begin = self.progress.step, [part.start for part in self.engine.slices]
        self.progress.corrupt += self.read_meter.read_corrupt()
        state = {
            "progress": dict(vars(self.progress)),
            "names": self.engine.names,
            "settings": settings.plain(self.config),
            "network": to_dict(self.network),
            "vae": self.shards.manifest.vae,
            "normalisation": self.shards.manifest.normalisation,
            "classes": list(self.shards.classes),
            "text": text_encoder(self.shards),
            "size": self.shards.manifest.size,
            "lanes": self.lanes,
        } | data_identity(self.shards)
        if self.base:
            state |= {"base": settings.plain(self.base), "lora": settings.plain(self.config.lora)}

        def write(slices: dict[str, Tensor]) -> None:
            ranks = self.ranks
            folder = save(self.root, step, slices, begin, state, ranks.rank, ranks.world_size, self.writer.barrier)
            if ranks.is_main:
                prune(self.root, self.config.checkpoint)
                logger.info("checkpoint %s", folder)

        self.writer.begin(self.engine.state() | self.engine.own("ema", self.ema.shards), write)

    def finish(self) -> None:
        """Wait for the last checkpoint. Collective.

        Raises:
            OSError: on all ranks, if it could not be written.
        """
        error = self.writer.wait()
        if error:
            raise OSError(
                f"the last checkpoint, of step {self.progress.step}, could not be written ({error}); make room on the "
                f"disk of {self.root} and start the run again: it resumes from the previous checkpoint"
            )

    def begin_tracking(self) -> Tracker:
        """Record settings, environment and source changes, and start (or continue) the MLflow run."""
        folder = self.config.folder
        settings.save(self.config, folder / "config.yaml")
        write_text(folder / "environment.json", json.dumps(environment(), indent=1))
        write_text(folder / "git.patch", git_patch())
        flat = settings.flatten(self.config)
        text = training_description(
            flat,
            command_line(),
            parameters=self.engine.total,
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
