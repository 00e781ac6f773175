"""Videos made while training, so that browsing the run shows the model getting better."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fvdm.data import DataConfig, batches
from fvdm.diffusion import Diffusion
from fvdm.distributed import Ranks
from fvdm.media import tile, write_gif, write_mp4, write_strips
from fvdm.shards import LatentShards
from fvdm.tasks import Sampling, given_frames, run
from fvdm.tracking import Tracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreviewConfig:
    """Videos made while training.

    Attributes:
        every: steps between previews; 0 is none.
        tasks: what is made of each.
        num: clips per task, shared out among the ranks.
        steps: DDIM steps.
        guidance: classifier-free guidance scale of a class-conditional model.
        long_frames: frames of the task `long`.
        fps: frames per second of the files.
    """

    every: int = 10_000
    tasks: tuple[str, ...] = ("generate", "image-to-video", "interpolate", "long")
    num: int = 4
    steps: int = 50
    guidance: float = 1.0
    long_frames: int = 32
    fps: float = 8.0


@torch.no_grad()
def preview(
    model: nn.Module,
    diffusion: Diffusion,
    shards: LatentShards,
    data: DataConfig,
    config: PreviewConfig,
    ranks: Ranks,
    device: torch.device,
    folder: Path,
    step: int,
    tracker: Tracker | None,
    null_class: int = 0,
) -> None:
    """Make the clips of every task, always from the same seeds and given frames, and report them.

    Collective: each rank makes its share, rank 0 writes `folder/step-N/TASK.mp4`, `.gif` and `.png`.
    """
    mine = list(ranks.share(config.num))
    source = next(batches(shards, replace(data, batch_size=config.num, workers=0, flip=False), device=device))
    clip = source.x_0[mine]
    y = None if not null_class or source.y is None else source.y[mine]
    how = Sampling(config.steps, guidance=config.guidance if y is not None else 1.0, null_class=null_class)
    made: dict[str, Tensor] = {}
    for task in config.tasks:
        given = given_frames(task, clip.shape[1])
        length = config.long_frames if task == "long" else clip.shape[1]
        if mine:
            made[task] = run(model, diffusion, clip, given, mine, how, length, y).float().cpu()
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
    from fvdm.vae import load_vae

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
        write_strips(video, folder / f"{task}.png")
        for suffix in ("mp4", "gif"):
            tracker.artifact(folder / f"{task}.{suffix}", f"previews/step-{step:08d}")
        tracker.image(folder / f"{task}.png", f"previews/{task}", step)
