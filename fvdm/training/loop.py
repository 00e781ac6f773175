"""Training: composition only. Read `train` first, then `_loop`; everything else is the detail of one line of theirs.

A run is one folder, `runs/NAME`. To resume, run the same command again: it goes on from the newest whole checkpoint.
All that is random is a function of (seed, number of the sample), so a resumed run is the run it would have been,
on the same or another number of ranks.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fvdm import config as settings
from fvdm.checkpoints.checkpoint import STEP
from fvdm.data.loader import Batch, batches
from fvdm.data.shards import LatentShards
from fvdm.diffusion.timesteps import sample_timesteps
from fvdm.distributed import Ranks, Stop, StopFlag, from_environment, seed_everything
from fvdm.models.backbone import Backbone
from fvdm.models.compilation import compile_blocks
from fvdm.models.loading import build
from fvdm.serving.registry import log_model
from fvdm.tracking.tracker import Tracker
from fvdm.training.config import TrainConfig
from fvdm.training.ema import EMA
from fvdm.training.engine import Engine, initialise
from fvdm.training.previews import preview
from fvdm.training.run import Run, initial_weights, model_config, newest_checkpoint, run_lock

logger = logging.getLogger(__name__)

SUSPECTS = 16  # videos that are named at most, of a step that was not finite


def train(config: TrainConfig) -> Stop:
    """Train to `config.steps`, or until the job is told to stop. Collective: every rank calls it.

    Returns:
        Stop.NO for a complete run; else what it was told: run it again to go on.

    Raises:
        ValueError: for settings that do not fit each other, the data, the memory, or the run that is there.
        OSError: if the last checkpoint could not be written.
        TimeoutError: if another rank hangs.
    """
    stop = StopFlag()
    stop.install()
    ranks = from_environment()
    torch.set_float32_matmul_precision("high")
    shards = LatentShards(config.data.path, config.data.split, config.data.cache)
    network = model_config(config, shards)
    seed_everything(config.seed)
    device = initialise(config.engine.timeout)
    with run_lock(config.folder, 0.8 * config.engine.timeout) if ranks.is_main else _nothing():
        checkpoint = newest_checkpoint(config, ranks)
        model = build(network).to(device)
        if config.compile:
            compile_blocks(model)
        if config.init and checkpoint is None:
            initial_weights(config.init, model)
        engine = Engine(model, config.engine, config.data.batch_size, ranks)
        run = Run(config, network, engine, EMA(engine.masters, config.ema_decay), ranks, shards)
        if checkpoint:
            run.resume(checkpoint)
        tracker = run.begin_tracking() if ranks.is_main else None
        status = "FAILED"
        try:
            with _explained(run):
                told = _loop(run, model, tracker, stop)
                run.finish()
                engine.close()  # Before the model is sent: only rank 0 waits for a server.
            if tracker and not told:
                _log_model(run, tracker)
            status = "KILLED" if told else "FINISHED"
        finally:
            if tracker:
                tracker.close(status)
    return told


@contextmanager
def _explained(run: Run) -> Iterator[None]:
    """Say of an error what can be known of its cause."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if run.progress.step > run.first:  # It fitted before: another process's doing, which may pass.
            raise
        sentence = str(error).split(". ")[0]
        raise ValueError(f"{sentence}; lower engine.micro_batch, or set activation_checkpointing to 1") from None
    except RuntimeError as error:
        hung = run.hang_detector.hung(error)
        if not hung:
            raise
        raise TimeoutError(
            f"{hung} hung, or the node could not be reached: the others have waited in vain after step "
            f"{run.progress.step}"
        ) from None


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _loop(run: Run, model: Backbone, tracker: Tracker | None, stop: StopFlag) -> Stop:
    config, engine, progress, ranks = run.config, run.engine, run.progress, run.ranks
    draw = Draw(config, model, ranks, engine.device)
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
        moved, seen = False, []
        for _ in range(engine.micro_batches):
            batch = next(data)
            t, noise, y = draw(batch)  # (b f), (b f c h w), (b)
            loss = run.diffusion.training_losses(engine, batch.x_0, t, y, noise)  # (b f)
            engine.backward(loss.mean())
            moved = engine.step(progress.step, config.steps)
            meter.add(loss, t)
            seen.append((batch.keys, loss.detach()))
        if moved:
            run.ema.update()
        progress.consumed = batch.consumed
        _count(run, moved, seen)
        if progress.step % config.log_every == 0 or progress.step == config.steps:
            _report(run, meter, tracker)
        due = bool(config.previews.every) and progress.step % config.previews.every == 0
        if due or progress.step % config.stop_every == 0:
            told = stop.agreed(engine.device)
        if due and not told:  # Little time is left then, and it is the checkpoint's.
            _preview(run, tracker)
        if progress.step % config.checkpoint.every == 0:
            run.save()
            saved = progress.step
            if tracker:
                tracker.metrics({"checkpoint/stalled_seconds": run.writer.stalled}, progress.step)
    if saved != progress.step:
        run.save()
    return Stop.NO if progress.step >= config.steps else told


class Draw:
    """What training draws for a sample: timesteps, noise, whether its condition is dropped; from the sample's own
    seed, on the device.
    """

    def __init__(self, config: TrainConfig, model: Backbone, ranks: Ranks, device: torch.device) -> None:
        self.config, self.model, self.ranks = config, model, ranks
        self.generator = torch.Generator(device)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """`t (b f)`, noise `(b f c h w)` and condition `(b ...)` of a batch."""
        b, f = batch.x_0.shape[:2]
        # Batches are slices of one numbered sequence of samples: see fvdm.data.loader.
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
        null = self.model.null(b)
        if null is None:
            return t, noise, None
        assert batch.y is not None
        hidden = (hide < self.config.class_dropout).view(-1, *[1] * (batch.y.ndim - 1))
        return t, noise, torch.where(hidden, null, batch.y)


def _count(run: Run, moved: bool, seen: list[tuple[list[str], Tensor]]) -> None:
    progress = run.progress
    progress.step += 1
    progress.updates += moved
    progress.skipped = 0 if moved else progress.skipped + 1
    if moved:
        return
    videos = _suspects(run, seen)
    logger.warning("step %d skipped: not finite, with %s", progress.step, videos)
    if progress.skipped >= run.config.max_skipped:
        raise ValueError(
            f"{progress.skipped} steps in a row up to step {progress.step} were not finite, the last with the videos "
            f"{videos}; look at these, lower engine.lr, or resume from an older checkpoint"
        )


def _suspects(run: Run, seen: list[tuple[list[str], Tensor]]) -> str:
    """A step's videos whose losses were not finite; all of them, where only the gradient was not. Collective.

    Args:
        run: the run.
        seen: keys and losses `(b f)` of each of this rank's micro-batches.
    """
    own = [pair for keys, loss in seen for pair in zip(keys, loss.isfinite().all(1).tolist(), strict=True)]
    everyones: list[list[tuple[str, bool]]] = [[] for _ in range(run.ranks.world_size)]
    dist.all_gather_object(everyones, own)
    pairs = [pair for part in everyones for pair in part]
    keys = [key for key, finite in pairs if not finite] or [key for key, _ in pairs]
    names = dict(zip(run.shards.keys, run.shards.sources, strict=True))
    more = f" and {len(keys) - SUSPECTS} more" if len(keys) > SUSPECTS else ""
    return ", ".join(names[key] for key in keys[:SUSPECTS]) + more


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
        )


def _log_model(run: Run, tracker: Tracker) -> None:
    """Log the trained model; what goes wrong with it ends no training that is done."""
    config = run.config
    if config.register_as == "none":
        return
    name = config.name if config.register_as == "auto" else config.register_as
    checkpoint = config.checkpoints / STEP.format(run.progress.step)
    try:
        log_model(tracker, checkpoint, config.folder / "models", name)
    except (ValueError, OSError) as error:
        logger.warning("the model is not logged to MLflow: %s; fvdm register does it later", error)


def main(parse: Callable[[type[TrainConfig]], TrainConfig] = settings.parse) -> None:
    """`python -m fvdm.training.loop --config FILE.yaml`: one rank of a training, under torchrun or alone."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True)
    try:
        told = train(parse(TrainConfig))
    except (ValueError, OSError) as error:
        settings.fail(error)
    raise SystemExit(75 if told else 0)


if __name__ == "__main__":
    main()
