"""Rules and levels of training's timesteps, each by its distribution."""

import math
from collections import Counter
from itertools import combinations_with_replacement

import pytest
import torch

from fvdm.diffusion.config import TimestepsConfig
from fvdm.diffusion.timesteps import sample_timesteps
from fvdm.diffusion.training_timesteps import sample_training_timesteps


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(shape, p=1.0, num_timesteps=1000, seed=0, **settings):
    return sample_training_timesteps(shape, p, TimestepsConfig(**settings), num_timesteps, generator=generator(seed))


@pytest.mark.parametrize("p", [0.0, 0.2, 1.0])
def test_the_default_is_ptss_with_the_same_numbers(p):
    assert torch.equal(
        sample_training_timesteps((64, 16), p, generator=generator(3)),
        sample_timesteps((64, 16), p, generator=generator(3)),
    )


@pytest.mark.parametrize("rule", ["ptss", "chunk", "nondecreasing"])
@pytest.mark.parametrize("level", ["uniform", "shift", "logit-normal"])
def test_with_probability_p_the_frames_differ_and_all_are_in_range(rule, level):
    t = sample((2000, 8), 0.2, rule=rule, level=level)
    assert t.shape == (2000, 8)
    assert t.dtype == torch.long
    assert 1 <= t.min() <= t.max() <= 1000
    share = (t != t[:, :1]).any(1).double().mean().item()
    assert share == pytest.approx(0.2, abs=0.03)
    assert not (sample((500, 8), 0.0, rule=rule, level=level).diff(dim=1) != 0).any()


def test_chunks_share_a_timestep_and_are_independent():
    t = sample((4000, 10), rule="chunk", chunk=4)
    for chunk in t.split(4, dim=1):
        assert torch.equal(chunk, chunk[:, :1].expand_as(chunk))
    first, second, last = t[:, 0].double(), t[:, 4].double(), t[:, 8].double()
    for each in (first, second, last):
        assert each.mean().item() == pytest.approx(500.5, abs=4 * 289 / math.sqrt(4000))
    for a, b in ((first, second), (second, last), (first, last)):
        assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.07


def test_nondecreasing_sequences_have_the_probabilities_of_fopp():
    """Three frames of four levels: P = mean over the frames of 1/T / (sequences that have its t at that frame)."""
    frames, last, clips = 3, 4, 40_000
    found = Counter(map(tuple, sample((clips, frames), num_timesteps=last, rule="nondecreasing").tolist()))
    sequences = list(combinations_with_replacement(range(1, last + 1), frames))
    assert set(found) == set(sequences)
    for sequence in sequences:
        same = [sum(other[k] == sequence[k] for other in sequences) for k in range(frames)]
        wanted = sum(1 / last / count for count in same) / frames
        assert found[sequence] / clips == pytest.approx(wanted, abs=4 * math.sqrt(wanted / clips))


def test_nondecreasing_never_falls_under_any_level():
    for level in ("uniform", "shift", "logit-normal"):
        assert (sample((500, 16), rule="nondecreasing", level=level).diff(dim=1) >= 0).all()


@pytest.mark.parametrize(
    ("settings", "quantile"),
    [
        ({"level": "shift", "shift": 3.0}, lambda u: 3 * u / (1 + 2 * u)),
        ({"level": "shift", "shift": 5.0}, lambda u: 5 * u / (1 + 4 * u)),
        (
            {"level": "logit-normal", "logit_mean": 0.5, "logit_std": 0.8},
            lambda u: torch.sigmoid(0.5 + 0.8 * torch.distributions.Normal(0.0, 1.0).icdf(u)),
        ),
    ],
)
@pytest.mark.parametrize("rule", ["ptss", "chunk"])
def test_levels_have_their_distribution(rule, settings, quantile):
    t = sample((20_000, 1), rule=rule, **settings).flatten().double() / 1000
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.double)
    assert torch.allclose(t.quantile(u), quantile(u).double(), atol=0.015)


def test_a_shift_of_1_is_uniform():
    assert torch.equal(sample((100, 8), level="shift", shift=1.0), sample((100, 8)))


def test_settings_out_of_range_are_refused():
    for settings in ({"chunk": 0}, {"shift": 0.0}, {"logit_std": -1.0}):
        with pytest.raises(ValueError, match=r"timesteps\."):
            TimestepsConfig(**settings)
