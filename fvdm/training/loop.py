"""The training loop. Read `train` first, then `_loop`; the rest is the detail of one line of theirs.

A run is one folder, `runs/NAME`. To resume, run the same command again: it continues from the newest complete
checkpoint. All randomness is a function of (seed, number of the sample), so a resumed run is the run it would have
been, on the same or another number of ranks.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from fvdm import config as settings
from fvdm.checkpoints.layout import STEP
from fvdm.data.loader import batches
from fvdm.data.shards import LatentShards
from fvdm.distributed import Stop, StopFlag, from_environment, leave, seed_everything
from fvdm.models.backbone import Backbone
from fvdm.models.compilation import compile_blocks
from fvdm.serving.registry import log_model
from fvdm.tracking.config import check_uri, tracking_uri
from fvdm.tracking.tracker import Tracker
from fvdm.training.config import TrainConfig
from fvdm.training.ema import EMA
from fvdm.training.engine import Engine, initialise
from fvdm.training.finetuning import base_of, place
from fvdm.training.meter import Meter
from fvdm.training.noise import NoiseSampler
from fvdm.training.previews import Previews
from fvdm.training.run import Run, find_checkpoint, run_lock
from fvdm.training.setup import initial_model, model_config
from fvdm.training.validation import HeldOutLoss, held_out_shards

logger = logging.getLogger(__name__)

SUSPECTS = 16  # most videos that are named of a step that was not finite


def train(config: TrainConfig) -> Stop:
    """Train to `config.steps`, or until the job receives a signal to stop. Collective: every rank calls it.

    Returns:
        Stop.NO for a complete run; else why it stopped: run it again to resume.

    Raises:
        ValueError: for settings that do not fit each other, the data, the memory, or the run that is there.
        OSError: if the last checkpoint could not be written.
        TimeoutError: if another rank hangs.
    """
    stop = StopFlag()
    stop.install()
    check_uri(tracking_uri(config.tracking.uri))
    ranks = from_environment()
    torch.set_float32_matmul_precision("high")
    shards = LatentShards(config.data.path, config.data.split, config.data.cache, config.data.cache_gb)
    network = model_config(config, shards)
    seed_everything(config.seed)
    device = initialise(config.engine.timeout)
    with run_lock(config.folder, 0.8 * config.engine.timeout) if ranks.is_main else nullcontext():
        checkpoint = find_checkpoint(config, ranks)
        model = initial_model(config, network, shards, checkpoint is not None, ranks.local_rank == 0)
        base = base_of(config, network, model) if config.lora.rank and ranks.local_rank == 0 else None
        place(model, device, config.engine.precision)
        if config.compile:
            compile_blocks(model)
        engine = Engine(model, config.engine, config.data.batch_size, ranks)
        run = Run(config, network, engine, EMA(engine.masters, config.ema_decay), ranks, shards, base)
        if checkpoint:
            run.resume(checkpoint)
        tracker = run.begin_tracking() if ranks.is_main else None
        status = "FAILED"
        try:
            with translate_errors(run), run.watchdog:
                stop_reason = _loop(run, model, tracker, stop)
                run.finish()
                engine.close()  # Before the model is sent: only rank 0 waits for a server.
            if tracker and not stop_reason:
                _log_model(run, tracker)
            status = "KILLED" if stop_reason else "FINISHED"
        finally:
            if tracker:
                tracker.close(status)
    if ranks.is_main:
        _say_what_is_next(run, stop_reason)
    return stop_reason


@contextmanager
def translate_errors(run: Run) -> Iterator[None]:
    """Turn errors whose cause is known into a sentence: no memory for the first step, a rank that hangs."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if run.progress.step > run.first:  # It fitted before: another process's doing, which may pass.
            raise
        sentence = str(error).split(". ")[0]
        raise ValueError(f"{sentence}; lower engine.micro_batch, or set activation_checkpointing to 1") from None
    except RuntimeError as error:
        found = run.hang_detector.find(error)
        if not found:
            raise
        raise TimeoutError(
            f"{found} hung, or the node could not be reached: the other ranks waited for it after step "
            f"{run.progress.step} until engine.timeout"
        ) from None


def _loop(run: Run, model: Backbone, tracker: Tracker | None, stop: StopFlag) -> Stop:
    config, engine, progress, ranks = run.config, run.engine, run.progress, run.ranks
    sample_noise = NoiseSampler(config, model, engine.device)
    data = batches(
        run.shards,
        replace(config.data, batch_size=engine.micro_batch * ranks.world_size, lanes=run.lanes),
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=config.seed,
        start=progress.consumed,
        step_size=config.data.batch_size,
        local_world_size=ranks.local_world_size,
        device=engine.device,
    )
    meter = Meter(run.diffusion.num_timesteps, engine.device)
    previews, held_out = _previews(run), _held_out(run)
    saved, stop_reason = progress.step, Stop.NO
    if held_out and not progress.step:
        _evaluate(run, tracker, held_out)
    while progress.step < config.steps and not stop_reason:
        moved, seen = False, []
        for _ in range(engine.micro_batches):
            batch = next(data)
            t, noise, y = sample_noise(batch)  # (b f), (b f c h w), (b)
            loss = run.diffusion.training_losses(engine, batch.x_0, t, y, noise)  # (b f)
            engine.backward(loss.mean())
            moved = engine.step(progress.step, config.steps)
            meter.add(loss, t)
            run.read_meter.add(batch)
            seen.append((batch.keys, loss.detach()))
        if moved:
            run.ema.update()
        progress.consumed = batch.consumed
        _count(run, moved, seen)
        run.watchdog.beat(progress.step)
        if progress.step % config.log_every == 0 or progress.step == config.steps:
            _report(run, meter, tracker)
        preview = _due(config.previews.every, progress.step)
        validate = held_out and (_due(config.validation.every, progress.step) or progress.step == config.steps)
        if preview or validate or _due(config.stop_every, progress.step):
            stop_reason = stop.agreed(engine.device)
        if _due(config.checkpoint.every, progress.step) or progress.step == config.steps:
            run.save()
            saved = progress.step
            if tracker:
                tracker.metrics({"checkpoint/stalled_seconds": run.writer.stalled}, progress.step)
        # After the checkpoint that is due; and not in a job that must stop, which has little time left.
        if (preview or validate) and not stop_reason:
            _evaluate(run, tracker, held_out if validate else None, previews if preview else None)
    if saved != progress.step:
        run.save()
    return Stop.NO if progress.step >= config.steps else stop_reason


def _due(every: int, step: int) -> bool:
    return bool(every) and step % every == 0


def _evaluate(
    run: Run, tracker: Tracker | None, held_out: HeldOutLoss | None, previews: Previews | None = None
) -> None:
    """Measure the averaged weights, and show what they make. Collective."""
    with run.engine.weights(run.ema.shards) as average:
        if held_out:
            held_out.measure(average, run.progress.step, tracker)
        if previews:
            previews.make(average, run.progress.step, tracker)


def _held_out(run: Run) -> HeldOutLoss | None:
    config = run.config
    if not config.validation.every:
        return None
    return HeldOutLoss(
        diffusion=run.diffusion,
        shards=held_out_shards(config.validation, config.data, run.shards),
        data=config.data,
        config=config.validation,
        ranks=run.ranks,
        device=run.engine.device,
        micro_batch=run.engine.micro_batch,
    )


def _previews(run: Run) -> Previews:
    config = run.config
    return Previews(
        diffusion=run.diffusion,
        shards=run.shards,
        data=config.data,
        config=config.previews,
        ranks=run.ranks,
        device=run.engine.device,
        folder=config.folder / "previews",
        shift=config.timesteps.shift,
    )


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


def _report(run: Run, meter: Meter, tracker: Tracker | None) -> None:
    values, frames, seconds = meter.read()
    progress, config = run.progress, run.config
    values |= run.read_data_metrics()
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


def _log_model(run: Run, tracker: Tracker) -> None:
    """Log the trained model; an error there is no reason to call a finished run failed."""
    config = run.config
    if config.register_as == "none":
        return
    name = config.name if config.register_as == "auto" else config.register_as
    checkpoint = config.checkpoints / STEP.format(run.progress.step)
    try:
        log_model(tracker, checkpoint, config.folder / "models", name)
    except (ValueError, OSError) as error:
        logger.warning("the model is not logged to MLflow: %s; fvdm register does it later", error)


def _say_what_is_next(run: Run, stop_reason: Stop) -> None:
    config, step = run.config, run.progress.step
    if stop_reason:
        logger.info(
            "%s stopped at step %d of %d; run the same command again to resume", config.name, step, config.steps
        )
    else:
        logger.info(
            "%s is complete at step %d; make videos with: fvdm generate --checkpoint %s",
            *(config.name, step, config.folder),
        )


def main(parse: Callable[[type[TrainConfig]], TrainConfig] = settings.parse) -> None:
    """`python -m fvdm.training.loop --config FILE.yaml`: one rank of a training run, under torchrun or alone.

    Raises:
        SystemExit: 0 at the end, 75 when it was stopped, 2 for a mistake of the user's, 1 for a disk or a hung peer.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True)
    try:
        stop_reason = train(parse(TrainConfig))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        leave(2 if isinstance(error, ValueError) else 1)  # A full disk or a peer that hangs may be well next time.
    raise SystemExit(75 if stop_reason else 0)


if __name__ == "__main__":
    main()
