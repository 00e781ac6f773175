"""Videos made while training, so that browsing the run shows the model getting better."""

import logging
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fvdm.data.config import DataConfig
from fvdm.data.loader import batches
from fvdm.data.shards import LatentShards
from fvdm.diffusion.guidance import Guidance
from fvdm.diffusion.process import Diffusion
from fvdm.diffusion.sampling import SamplerConfig
from fvdm.diffusion.solvers import solver
from fvdm.diffusion.tasks import on_window
from fvdm.diffusion.timesteps import spaced
from fvdm.diffusion.video import draw
from fvdm.distributed import Ranks
from fvdm.media.writing import card, tile, write_gif, write_mp4, write_strips
from fvdm.models.backbone import Backbone
from fvdm.tracking.tracker import Tracker
from fvdm.training.config import PreviewConfig

logger = logging.getLogger(__name__)


@torch.no_grad()
def preview(
    model: Backbone,
    diffusion: Diffusion,
    shards: LatentShards,
    data: DataConfig,
    config: PreviewConfig,
    ranks: Ranks,
    device: torch.device,
    folder: Path,
    step: int,
    tracker: Tracker | None,
) -> None:
    """Make the clips of every task, always from the same seeds and given frames, and report them.

    Collective: each rank makes its share, rank 0 writes `folder/step-N/TASK.mp4`, `.gif` and `.png`.
    """
    mine = list(ranks.share(config.num))
    source = next(batches(shards, replace(data, batch_size=config.num, workers=0, flip=False), device=device))
    clip = source.x_0[mine]
    y = source.y[mine] if model.config.conditional and source.y is not None else None
    how = SamplerConfig(solver(config.solver), Guidance(config.guidance if y is not None else 1.0))
    levels = spaced(how.solver.spacing, config.steps, diffusion.noise_levels())
    made: dict[str, Tensor] = {}
    for task in config.tasks:
        schedule = on_window(task, levels, clip.shape[1], config.long_frames).schedule
        if mine:
            made[task] = draw(model, diffusion, clip, schedule, mine, how, y).float().cpu()
    parts: list[dict[str, Tensor] | None] | None = [None] * ranks.world_size if ranks.is_main else None
    dist.gather_object(made, parts)
    if parts is not None and tracker is not None:
        latents = {task: torch.cat([part[task] for part in parts if part]) for task in config.tasks}
        try:
            _write(latents, shards, folder / f"step-{step:08d}", config.fps, step, tracker, device)
        except OSError as error:
            logger.warning("the preview videos of step %d could not be written: %s", step, error)


def _write(
    latents: dict[str, Tensor],
    shards: LatentShards,
    folder: Path,
    fps: float,
    step: int,
    tracker: Tracker,
    device: torch.device,
) -> None:
    from fvdm.media.vae import load_vae

    try:
        vae = load_vae(shards.manifest.vae, device)
        shards.require(vae_identity=vae.identity)
    except ValueError as error:
        logger.warning("no preview videos: %s", error)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for task, z in latents.items():
        video = vae.decode(z.to(device)).cpu()  # (b f 3 h w)
        write_mp4(tile(list(video)), folder / f"{task}.mp4", fps)
        write_gif(tile(list(video)), folder / f"{task}.gif", fps)
        rows, columns = card(len(video))
        write_strips(video, folder / f"{task}.png", columns, rows)
        for suffix in ("mp4", "gif"):
            tracker.artifact(folder / f"{task}.{suffix}", f"previews/step-{step:08d}")
        tracker.image(folder / f"{task}.png", f"previews/{task}", step)
