"""Ways to complete a clip of which some frames are given: what a timestep per frame is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fvdm.diffusion.sampling import SamplerConfig
from fvdm.diffusion.solvers import solver
from fvdm.diffusion.tasks import on_window
from fvdm.diffusion.timesteps import spaced
from fvdm.diffusion.video import place, sample_video
from fvdm.evaluation.replacement import replacement
from fvdm.generation.pipeline import Trained

CompletionName = Literal["held", "replacement", "repaint", "frozen", "vae"]


@dataclass(frozen=True)
class Completion:
    """Draws the frames of a task that are not given.

    Attributes:
        name: held, given frames held at t = 0; replacement or repaint, a model of one timestep per clip; frozen, the
            nearest given frame before, standing still; vae, the truth through the VAE.
        trained: the model.
        solver: solver of `held`; the others take DDIM.
        steps: sampling steps.
        resamples: how often repaint takes each step.
    """

    name: str
    trained: Trained
    solver: str = "ddim"
    steps: int = 50
    resamples: int = 1

    def __call__(self, task: str, truth: Tensor, given: Sequence[int], seeds: Sequence[int]) -> Tensor:
        """Videos, uint8 `(b f 3 h w)`, of the truth's shape; the task's given frames of it, in the first window."""
        if self.name == "frozen":
            return freeze_given(truth, given)
        trained = self.trained
        network, vae = trained.model.config, trained.vae
        if self.name == "vae":
            return vae.decode(vae.encode_mean(truth)).cpu()
        latents = place(vae.encode_mean(truth[:, list(given)]), given, network.frames)
        y = trained.model.null(len(truth))
        length = truth.shape[1]
        if self.name == "held":
            sampler = SamplerConfig(solver(self.solver))
            levels = spaced(sampler.solver.spacing, self.steps, trained.diffusion.noise_levels())
            schedule = on_window(task, levels, network.frames, length).schedule
            made = sample_video(trained.model, trained.diffusion, latents, schedule, seeds, sampler, y)
        else:
            repeats = self.resamples if self.name == "repaint" else 1
            made = replacement(trained.model, trained.diffusion, latents, given, seeds, self.steps, repeats, length, y)
        return vae.decode(made).cpu()


def freeze_given(truth: Tensor, given: Sequence[int]) -> Tensor:
    """Clips `(b f ...)` in which the nearest given frame before a frame (or the first given one) stands still."""
    return truth[:, [max((g for g in given if g <= k), default=given[0]) for k in range(truth.shape[1])]]
