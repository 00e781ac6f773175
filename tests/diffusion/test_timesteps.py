import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fvdm.diffusion.config import DiffusionConfig
from fvdm.diffusion.process import Diffusion
from fvdm.diffusion.timesteps import (
    SPACINGS,
    check_schedule,
    evenly_spaced,
    full_sequence,
    hold_clean,
    leading,
    sample_timesteps,
    shifted,
    spaced,
    staggered,
    trailing,
)

NOISE = {objective: Diffusion(DiffusionConfig(objective=objective)).noise_levels() for objective in ("eps", "flow")}


def draw(shape, p, seed=0):
    return sample_timesteps(shape, p, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
def test_each_clip_flips_its_own_coin(p):
    t = draw((20_000, 8), p)
    assert t.dtype == torch.long
    assert t.shape == (20_000, 8)
    assert t.min() >= 1
    assert t.max() <= 1000
    alone = (t != t[:, :1]).any(1).float().mean().item()
    assert alone == pytest.approx(p, abs=0.015)


def test_timesteps_are_uniform_on_1_to_1000_either_way():
    for p in (0.0, 1.0):
        t = draw((40_000, 4), p)
        first = torch.bincount(t[:, 0] - 1, minlength=1000).double()
        expected = 40.0
        chi_squared = ((first - expected) ** 2 / expected).sum().item()
        assert 850 < chi_squared < 1150
        assert set(t[:, 0].tolist()) >= {1, 1000}


def test_frames_are_independent_when_each_has_its_own():
    t = draw((50_000, 2), 1.0).double()
    assert torch.corrcoef(t.T)[0, 1].abs() < 0.02


def test_same_seed_same_timesteps():
    assert torch.equal(draw((16, 16), 0.2, 3), draw((16, 16), 0.2, 3))
    assert not torch.equal(draw((16, 16), 0.2, 3), draw((16, 16), 0.2, 4))


@pytest.mark.parametrize(("shape", "p"), [((4, 4), -0.1), ((4, 4), 1.1), ((4,), 0.2), ((0, 4), 0.2)])
def test_bad_arguments_are_refused(shape, p):
    with pytest.raises(ValueError, match=r"probability|shape"):
        sample_timesteps(shape, p)


def test_the_papers_spacing_of_50():
    levels = evenly_spaced(50)
    assert levels[:3].tolist() == [1000, 980, 959]
    assert (levels.flip(0)[1:6] - 1).tolist() == [0, 20, 41, 61, 82]
    assert levels[-1] == 0


@pytest.mark.parametrize("objective", NOISE)
@pytest.mark.parametrize("spacing", SPACINGS)
@given(steps=st.integers(1, 1000))
def test_every_spacing_has_distinct_falling_levels_down_to_0(spacing, objective, steps):
    levels = spaced(spacing, steps, NOISE[objective])
    assert levels.dtype == torch.long
    assert len(levels) == steps + 1
    assert (levels[:-1] > levels[1:]).all()
    assert levels[-1] == 0
    assert levels[0] == 1000 if spacing != "leading" else levels[0] <= 1000


def test_the_spacings_by_example():
    assert trailing(4).tolist() == [1000, 750, 500, 250, 0]
    assert leading(4).tolist() == [751, 501, 251, 1, 0]
    noise = NOISE["eps"]
    roots = noise[spaced("karras", 10, noise)[:-1]] ** (1 / 7)
    assert torch.allclose(roots.diff(), roots.diff().mean(), rtol=0.1)
    steps = noise[spaced("log-snr", 8, noise)[:-1]].log().diff()
    assert torch.allclose(steps, steps.mean(), rtol=0.25)
    assert shifted(4, shift=1.0).tolist() == trailing(4).tolist()
    assert shifted(4, shift=3.0).tolist() == [1000, 900, 750, 500, 0]
    with pytest.raises(ValueError, match="more than 0"):
        shifted(4, shift=0.0)
    with pytest.raises(ValueError, match="even, trailing, leading, karras"):
        spaced("cosine", 5, noise)


@given(st.integers(1, 20), st.lists(st.integers(0, 30), min_size=1, max_size=9))
def test_a_staggered_frame_walks_its_levels_from_its_row_on(steps, begins):
    levels = evenly_spaced(steps)
    schedule = staggered(levels, begins)
    check_schedule(schedule)
    for column, begin in zip(schedule.T, begins, strict=True):
        assert torch.equal(column[begin : begin + steps + 1], levels)
        assert (column[:begin] == 1000).all()
        assert (column[begin + steps :] == 0).all()


@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_hold_clean_touches_the_given_frames_only(steps, frames, data):
    schedule = full_sequence(steps, frames)
    before = schedule.clone()
    given_frames = data.draw(st.lists(st.integers(-frames, frames - 1), max_size=frames))
    held = hold_clean(schedule, given_frames)
    inside = {k % frames for k in given_frames}
    assert torch.equal(schedule, before)
    for k in range(frames):
        assert torch.equal(held[:, k], torch.zeros_like(held[:, k]) if k in inside else before[:, k])
    check_schedule(held)


def test_bad_schedules_are_refused():
    with pytest.raises(ValueError, match="frames 0 to 3"):
        hold_clean(full_sequence(5, 4), [4])
    with pytest.raises(ValueError, match="rises"):
        check_schedule(full_sequence(5, 4).flip(0))
    with pytest.raises(ValueError, match="leaves"):
        check_schedule(full_sequence(5, 4) + 1)
    with pytest.raises(ValueError, match="holds integers"):
        check_schedule(full_sequence(5, 4).float())
    with pytest.raises(ValueError, match="1 and 1000"):
        full_sequence(1001, 4)
