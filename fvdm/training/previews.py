"""Videos made while training, so that browsing the run shows the model getting better."""

import logging
import time
from dataclasses import dataclass, replace
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
from fvdm.diffusion.video import sample_video
from fvdm.distributed import Ranks
from fvdm.media.writing import card, tile, write_gif, write_mp4, write_strips
from fvdm.models.backbone import Backbone
from fvdm.tracking.tracker import Tracker
from fvdm.training.attempt import attempt, free_memory, one_line
from fvdm.training.config import PreviewConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Previews:
    """Makes the clips of every task, always from the same seeds and given frames.

    A preview that fails, on one rank or on all, costs that preview and nothing else.

    Attributes:
        diffusion: noise process.
        shards: the given frames come from them, and the VAE that decodes.
        data: frames and stride of a clip.
        config: what is made.
        ranks: this process among its peers.
        device: where the model is.
        folder: rank 0 writes `folder/step-N/TASK.mp4`, `.gif` and `.png`.
        shift: of the spacing `shift`, for a model that it suits.
    """

    diffusion: Diffusion
    shards: LatentShards
    data: DataConfig
    config: PreviewConfig
    ranks: Ranks
    device: torch.device
    folder: Path
    shift: float = 3.0

    def make(self, model: Backbone, step: int, tracker: Tracker | None) -> None:
        """Make, write and report the clips of a step. Collective: each rank makes its share."""
        began = time.monotonic()
        own, error = attempt(lambda: self.sample(model))
        if error:
            if self.ranks.is_main:
                logger.warning("no preview of step %d: %s", step, error)
            return
        parts: list[dict[str, Tensor]] | None = [{}] * self.ranks.world_size if self.ranks.is_main else None
        dist.gather_object(own, parts)
        if parts is None or tracker is None:
            return
        try:
            latents = {task: torch.cat([part[task] for part in parts if part]) for task in self.config.tasks}
            self.write(latents, step, tracker)
        except Exception as caught:
            free_memory()
            logger.warning("no preview of step %d: %s", step, one_line(caught))
            return
        tasks = ", ".join(self.config.tasks)
        logger.info("preview of step %d: %s in %.0f s", step, tasks, time.monotonic() - began)

    @torch.no_grad()
    def sample(self, model: Backbone) -> dict[str, Tensor]:
        """This rank's clips of each task, latents `(b f c h w)` on the CPU; empty for a rank without a share."""
        own = list(self.ranks.share(self.config.num))
        data = replace(self.data, batch_size=self.config.num, workers=0, flip=False, lanes=None)
        source = next(batches(self.shards, data, device=self.device))
        clip = source.x_0[own]
        y = source.y[own] if model.config.conditional and source.y is not None else None
        sampler = SamplerConfig(solver(self.config.solver), Guidance(self.config.guidance if y is not None else 1.0))
        spacing = model.config.spacing or sampler.solver.spacing
        levels = spaced(spacing, self.config.steps, self.diffusion.noise_levels(), self.shift)
        made: dict[str, Tensor] = {}
        for task in self.config.tasks if own else ():
            schedule = on_window(task, levels, clip.shape[1], self.config.long_frames).schedule
            made[task] = sample_video(model, self.diffusion, clip, schedule, own, sampler, y).float().cpu()
        return made

    def write(self, latents: dict[str, Tensor], step: int, tracker: Tracker) -> None:
        """Decode and write the clips of each task, and report the files.

        Raises:
            ValueError: if the VAE of the latents cannot be loaded.
            OSError: if a file cannot be written.
        """
        from fvdm.media.vae import load_vae

        vae = load_vae(self.shards.manifest.vae, self.device)
        self.shards.require(vae_identity=vae.identity)
        folder = self.folder / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for task, z in latents.items():
            video = vae.decode(z.to(self.device)).cpu()  # (b f 3 h w)
            write_mp4(tile(list(video)), folder / f"{task}.mp4", self.config.fps)
            write_gif(tile(list(video)), folder / f"{task}.gif", self.config.fps)
            rows, columns = card(len(video))
            write_strips(video, folder / f"{task}.png", columns, rows)
            for suffix in ("mp4", "gif"):
                tracker.artifact(folder / f"{task}.{suffix}", f"previews/step-{step:08d}")
            tracker.image(folder / f"{task}.png", f"previews/{task}", step)
