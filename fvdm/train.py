"""Training: composition only. Read `train` first, then `_loop`; everything else is the detail of one line of theirs.

A run is one folder, `runs/NAME`. To resume, run the same command again: it goes on from the newest whole checkpoint.
All that is random is a function of (seed, number of the sample), so a resumed run is the run it would have been,
on the same or another number of ranks.
"""

import fcntl
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fvdm import checkpoint as ckpt
from fvdm import config as settings
from fvdm.attention import Backend
from fvdm.checkpoint import CheckpointConfig
from fvdm.data import Batch, DataConfig, batches
from fvdm.diffusion import Diffusion, DiffusionConfig
from fvdm.distributed import Ranks, Stop, StopFlag, from_environment, seed_everything
from fvdm.ema import EMA
from fvdm.engine import Engine, EngineConfig, accumulation, initialise
from fvdm.model import ModelConfig, VideoDiT, preset
from fvdm.previews import PreviewConfig, preview
from fvdm.shards import LatentShards
from fvdm.timesteps import sample_timesteps
from fvdm.tracking import Tracker, TrackingConfig

logger = logging.getLogger(__name__)

LOCK_ATTEMPTS = 10  # a second apart


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. The defaults are the paper's, for XL on 256-pixel clips of 16 frames.

    Attributes:
        name: the run; its folder, and its name in MLflow. Run the same name again to resume.
        data: what is trained on.
        runs: folder of all runs.
        model: size and patch: S/2, B/2, L/2, XL/2 (or T, XS; patches /1, /4, /8).
        conditional: use the class labels of the data.
        class_dropout: probability that a clip's label is hidden, for guidance.
        attention: attention backend: auto, flash, sdpa or math.
        recompute: recompute the activations of every k-th block to save memory; 0 is none.
        p: probability that a clip has one timestep per frame (PTSS); 0 is a scalar-timestep model.
        steps: optimizer steps at which training ends.
        seed: of the initial weights, the order of the data and all noise.
        ema_decay: decay of the average of the weights, per step.
        log_every: steps between two reports.
        stop_every: steps between two looks at whether a rank was told to stop.
        max_skipped: steps in a row whose loss or gradient is not finite, after which the run stops.
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
    conditional: bool = False
    class_dropout: float = 0.1
    attention: Backend = "auto"
    recompute: int = 0
    p: float = 0.2
    steps: int = 250_000
    seed: int = 0
    ema_decay: float = 0.9999
    log_every: int = 100
    stop_every: int = 10
    max_skipped: int = 10
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    previews: PreviewConfig = field(default_factory=PreviewConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.runs) / self.name


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


def check(config: TrainConfig, world_size: int) -> None:
    """Find, before a job waits in a queue, what would end it at its start.

    Raises:
        ValueError: if the data cannot be read, or model, data, batch and ranks do not fit each other.
    """
    model_config(config, LatentShards(config.data.path, config.data.split, config.data.cache))
    accumulation(config.data.batch_size, config.engine.micro_batch, world_size)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Refuse a second training of the same run while one goes on.

    Raises:
        ValueError: if the run is already being trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        for _ in range(LOCK_ATTEMPTS):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(1)  # The ranks of a killed job take a moment to end.
        else:
            raise ValueError(f"{folder} is being trained by another job; wait for it, or use another name")
        yield


def train(config: TrainConfig) -> Stop:
    """Train to `config.steps`, or until the job is told to stop. Collective: every rank calls it.

    Returns:
        Stop.NO for a complete run; else what it was told: run it again to go on.

    Raises:
        ValueError: for settings that do not fit each other, the data, or the run that is there.
    """
    stop = StopFlag()
    stop.install()
    ranks = from_environment()
    torch.set_float32_matmul_precision("high")
    shards = LatentShards(config.data.path, config.data.split, config.data.cache)
    network = model_config(config, shards)
    seed_everything(config.seed)
    device = initialise(config.engine.timeout)
    engine = Engine(VideoDiT(network).to(device), config.engine, config.data.batch_size, ranks)
    ema = EMA(engine.masters, config.ema_decay)
    with only_one(config.folder) if ranks.is_main else _nothing():
        run = Run(config, network, engine, ema, ranks, shards)
        run.resume()
        tracker = run.begin_tracking() if ranks.is_main else None
        status = "FAILED"
        try:
            told = _loop(run, tracker, stop)
            status = "KILLED" if told else "FINISHED"
        finally:
            if tracker:
                tracker.close(status)
    engine.close()
    return told


@contextmanager
def _nothing() -> Iterator[None]:
    yield


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
        self.root = config.folder / "checkpoints"

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one; rank 0 decides which.

        Raises:
            ValueError: if the run there is of another model.
        """
        found = [ckpt.newest(self.root) if self.ranks.is_main else None]
        dist.broadcast_object_list(found)
        folder = found[0]
        if folder is None:
            return
        state = ckpt.read_state(folder)
        if state["names"] != {name: list(shape) for name, shape in self.engine.names.items()}:
            raise ValueError(
                f"{folder} holds a model of another shape ({state['settings']['model']}) than {self.config.model} on "
                f"these data; give the run another name, or its own settings"
            )
        slices = {name: ckpt.read_slice(folder, name, self.engine.slice) for name in ckpt.SLICES}
        self.progress = Progress(**state["progress"])
        self.engine.load_state(slices, self.progress.updates)
        self.ema.shards[0][: len(self.engine.slice)] = slices["ema"].to(self.engine.device)
        if self.ranks.is_main:
            logger.info("resuming %s from step %d", self.config.name, self.progress.step)

    def save(self) -> None:
        """Write a checkpoint and remove those that the policy does not keep. Collective."""
        own = slice(len(self.engine.slice))
        folder = ckpt.save(
            self.root,
            self.progress.step,
            self.engine.state() | {"ema": self.ema.shards[0][own]},
            self.engine.slice.start,
            {
                "progress": vars(self.progress),
                "names": self.engine.names,
                "settings": settings.plain(self.config),
                "network": settings.plain(self.network),
                "vae": self.shards.manifest.vae,
                "normalisation": self.shards.manifest.normalisation,
                "classes": list(self.shards.classes),
                "size": self.shards.manifest.size,
            },
            self.ranks.rank,
            self.ranks.world_size,
            dist.barrier,
        )
        if self.ranks.is_main:
            ckpt.prune(self.root, self.config.checkpoint)
            logger.info("checkpoint %s", folder)

    def begin_tracking(self) -> Tracker:
        """Write down what this run is, and begin (or continue) its MLflow run."""
        folder = self.config.folder
        settings.save(self.config, folder / "config.yaml")
        ckpt.write_text(folder / "environment.json", json.dumps(environment(), indent=1))
        flat = settings.flatten(self.config) | {f"network.{k}": v for k, v in vars(self.network).items()}
        tracker = Tracker(folder, self.config.tracking, self.config.name, flat, {"kind": "train"})
        tracker.artifact(folder / "config.yaml")
        tracker.artifact(folder / "environment.json")
        return tracker


def _loop(run: Run, tracker: Tracker | None, stop: StopFlag) -> Stop:
    config, engine, progress, ranks = run.config, run.engine, run.progress, run.ranks
    draw = Draw(config, run.network, ranks, engine.device)
    data = batches(
        run.shards,
        replace(config.data, batch_size=engine.micro_batch * ranks.world_size),
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=config.seed,
        start=progress.consumed,
        device=engine.device,
    )
    meter = Meter(run.diffusion.num_timesteps, engine.device)
    saved, told = progress.step, Stop.NO
    while progress.step < config.steps and not told:
        moved = False
        for _ in range(engine.micro_batches):
            batch = next(data)
            t, noise, y = draw(batch)  # (b f), (b f c h w), (b)
            loss = run.diffusion.training_losses(engine, batch.x_0, t, y, noise)  # (b f)
            engine.backward(loss.mean())
            moved = engine.step(progress.step, config.steps)
            meter.add(loss, t)
        if moved:
            run.ema.update()
        _count(progress, moved, batch, config)
        if progress.step % config.log_every == 0 or progress.step == config.steps:
            _report(run, meter, tracker)
        if progress.step % config.stop_every == 0:
            told = stop.agreed(engine.device)
        if config.previews.every and progress.step % config.previews.every == 0:
            _preview(run, tracker)
        if progress.step % config.checkpoint.every == 0:
            run.save()
            saved = progress.step
    if saved != progress.step:
        run.save()
    return Stop.NO if progress.step >= config.steps else told


class Draw:
    """What training draws for a sample: timesteps, noise, a hidden label; from the sample's own seed, on the device."""

    def __init__(self, config: TrainConfig, network: ModelConfig, ranks: Ranks, device: torch.device) -> None:
        self.config, self.ranks = config, ranks
        self.null_class = network.num_classes
        self.generator = torch.Generator(device)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """`t (b f)`, noise `(b f c h w)` and labels `(b)` of a batch."""
        b, f = batch.x_0.shape[:2]
        # Batches are slices of one numbered sequence of samples: see fvdm.data.
        first = batch.consumed - b * self.ranks.world_size + b * self.ranks.rank
        noise = torch.empty_like(batch.x_0)
        t = torch.empty((b, f), dtype=torch.long, device=noise.device)
        hide = torch.empty(b, device=noise.device)
        for i in range(b):
            seed = np.random.SeedSequence([self.config.seed, first + i]).generate_state(1, np.uint64)[0]
            self.generator.manual_seed(int(seed >> np.uint64(1)))
            t[i] = sample_timesteps(
                (1, f), self.config.p, self.config.diffusion.num_timesteps, generator=self.generator
            )
            noise[i].normal_(generator=self.generator)
            hide[i].uniform_(generator=self.generator)
        if not self.null_class:
            return t, noise, None
        assert batch.y is not None
        return t, noise, torch.where(hide < self.config.class_dropout, self.null_class, batch.y)


def _count(progress: Progress, moved: bool, batch: Batch, config: TrainConfig) -> None:
    progress.step += 1
    progress.updates += moved
    progress.consumed = batch.consumed
    progress.skipped = 0 if moved else progress.skipped + 1
    if not moved:
        logger.warning("step %d skipped: not finite, with %s", progress.step, ", ".join(batch.keys))
    if progress.skipped >= config.max_skipped:
        raise ValueError(
            f"{progress.skipped} steps in a row up to step {progress.step} were not finite, the last with the samples "
            f"{', '.join(batch.keys)}; look at these, lower engine.lr, or resume from an older checkpoint"
        )


class Meter:
    """Sums the losses on the device, by timestep and by whether the clip's frames share it; reads them when asked."""

    BUCKETS = 4

    def __init__(self, num_timesteps: int, device: torch.device) -> None:
        self.num_timesteps = num_timesteps
        self.sums = torch.zeros(2, 2 * self.BUCKETS, device=device, dtype=torch.float64)  # (loss, count)
        self.since = time.monotonic()

    @torch.no_grad()
    def add(self, loss: Tensor, t: Tensor) -> None:
        """Count losses `(b f)` of frames at `t (b f)`."""
        alone = (t != t[:, :1]).any(1, keepdim=True)
        place = (t - 1).clamp(min=0) * self.BUCKETS // self.num_timesteps + self.BUCKETS * alone
        values = torch.stack([loss.detach().double().flatten(), torch.ones_like(loss).double().flatten()])
        self.sums.index_add_(1, place.flatten(), values)

    def read(self) -> tuple[dict[str, float], float, float]:
        """Mean losses since the last call by name, clips' frames counted, seconds passed. Collective."""
        sums = self.sums.clone()
        dist.all_reduce(sums)
        loss, count = sums.cpu().view(2, 2, self.BUCKETS).numpy()
        now = time.monotonic()
        seconds, self.since = now - self.since, now
        self.sums.zero_()
        edges = np.linspace(0, self.num_timesteps, self.BUCKETS + 1).astype(int)
        groups = {"loss/mean": (slice(None), slice(None)), "loss/one_t": (0,), "loss/t_per_frame": (1,)}
        groups |= {f"loss/t_{edges[k] + 1:04d}_{edges[k + 1]:04d}": (slice(None), k) for k in range(self.BUCKETS)}
        means = {name: loss[at].sum() / count[at].sum() for name, at in groups.items() if count[at].sum()}
        return means, float(count.sum()), seconds


def _report(run: Run, meter: Meter, tracker: Tracker | None) -> None:
    values, frames, seconds = meter.read()
    progress, config = run.progress, run.config
    if tracker is None:
        return
    clips = frames / config.data.frames
    norm = run.engine.gradient_norm
    values |= {
        "optim/lr": run.engine.zero.param_groups[0]["lr"],
        "optim/gradient_norm": float(norm) if norm is not None else float("nan"),
        "optim/steps_skipped": float(progress.step - progress.updates),
        "speed/clips_per_second": clips / seconds,
        "speed/seconds_per_step": seconds * config.data.batch_size / clips,
        "progress/clips": float(progress.consumed),
    }
    tracker.metrics(values, progress.step)
    left = (config.steps - progress.step) * values["speed/seconds_per_step"]
    logger.info(
        "step %d/%d  loss %.4f  %.2f clips/s  %s left",
        progress.step,
        config.steps,
        values["loss/mean"],
        values["speed/clips_per_second"],
        time.strftime("%H:%M:%S", time.gmtime(left)) if left < 86400 else f"{left / 86400:.1f} days",
    )


def _preview(run: Run, tracker: Tracker | None) -> None:
    with run.engine.weights(run.ema.shards) as model:
        preview(
            model,
            run.diffusion,
            run.shards,
            run.config.data,
            run.config.previews,
            run.ranks,
            run.engine.device,
            run.config.folder / "previews",
            run.progress.step,
            tracker,
            null_class=run.network.num_classes,
        )


def environment() -> dict[str, Any]:
    """Versions of what the run runs on, for the record."""
    from importlib.metadata import version

    packages = ("fvdm", "torch", "deepspeed", "webdataset", "diffusers", "mlflow", "submitit", "numpy")
    return {
        "python": platform.python_version(),
        "host": platform.node(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "packages": {name: version(name) for name in packages},
    }


def main(parse: Callable[[type[TrainConfig]], TrainConfig] = settings.parse) -> None:
    """`python -m fvdm.train --config FILE.yaml`: one rank of a training, under torchrun or alone."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True)
    try:
        told = train(parse(TrainConfig))
    except ValueError as error:
        settings.fail(error)
    raise SystemExit(75 if told else 0)


if __name__ == "__main__":
    main()
