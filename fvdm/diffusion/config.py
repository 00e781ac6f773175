"""Settings of the noise process; no torch here, so that `--help` is instant."""

from dataclasses import dataclass
from typing import Literal, get_args

from fvdm.choices import one_of

NUM_TIMESTEPS = 1000
ObjectiveName = Literal["eps", "v", "flow"]


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise process and the objective. The defaults are the paper's.

    Attributes:
        num_timesteps: T, the number of noise levels.
        beta_start: the first beta of the linear schedule; the discrete form of beta(0) = 0.1.
        beta_end: the last beta of the linear schedule; the discrete form of beta(T) = 20.
        objective: what the network estimates: eps, the noise (the paper's); v, `alpha eps - sigma x_0` (Salimans and
            Ho), from which short runs learn the large shapes sooner; or flow, `eps - x_0` (rectified flow), whose
            noise process is the straight line `alpha = 1 - t / T`, `sigma = t / T` in place of the betas.
        learned_variance: the network also predicts where the reverse variance lies in its range (IDDPM).
        min_snr: each frame's squared error is weighted by its own timestep, so that it counts in x_0 as
            min(SNR, min_snr) (Hang et al. 2023, who use 5); 0 weights the estimates of all timesteps alike.
    """

    num_timesteps: int = NUM_TIMESTEPS
    beta_start: float = 1e-4
    beta_end: float = 0.02
    objective: ObjectiveName = "eps"
    learned_variance: bool = True
    min_snr: float = 0.0

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        one_of("objective", self.objective, get_args(ObjectiveName))
        if self.num_timesteps < 2 or not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError("a noise process needs 2 or more timesteps and betas 0 < beta_start <= beta_end < 1")
        if self.min_snr < 0:
            raise ValueError(f"min_snr is {self.min_snr}: choose 0 for none, or a positive bound such as 5")


@dataclass(frozen=True)
class TimestepsConfig:
    """How training samples the timesteps of a clip. The defaults are the paper's PTSS.

    Attributes:
        rule: how the frames differ, in a clip whose frames differ (with probability p): ptss, each frame independently
            (FVDM); chunk, each chunk of frames independently; nondecreasing, never falling from a frame to the next
            (AR-Diffusion's FoPP).
        chunk: frames of a chunk, for the rule chunk.
        level: which levels of noise come most often: uniform, all alike; shift, high ones, as flow matching has it;
            logit-normal, middle ones.
        shift: for the level shift: 1 is uniform, Wan uses 3 (480p) and 5 (720p).
        logit_mean: for the level logit-normal: mean of the logit of t / T.
        logit_std: for the level logit-normal: standard deviation of the logit of t / T.
    """

    rule: Literal["ptss", "chunk", "nondecreasing"] = "ptss"
    chunk: int = 4
    level: Literal["uniform", "shift", "logit-normal"] = "uniform"
    shift: float = 3.0
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if self.chunk < 1:
            raise ValueError(f"timesteps.chunk is {self.chunk}: it must be at least 1.")
        if not (self.shift > 0 and self.logit_std > 0):
            raise ValueError("timesteps.shift and timesteps.logit_std must be above 0.")
