"""Settings of the noise process; no torch here, so that `--help` is instant."""

from dataclasses import dataclass
from typing import Literal, get_args

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
        if self.objective not in get_args(ObjectiveName):
            raise ValueError(
                f"objective {self.objective!r} is unknown; choose one of {', '.join(get_args(ObjectiveName))}"
            )
        if self.num_timesteps < 2 or not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError("a noise process needs 2 or more timesteps and betas 0 < beta_start <= beta_end < 1")
        if self.min_snr < 0:
            raise ValueError(f"min_snr is {self.min_snr}: choose 0 for none, or a positive bound such as 5")
