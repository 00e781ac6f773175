import pytest
import torch

from fvdm.diffusion.sampling import SamplerConfig, draw_noise, generators, sample, start, stream, windows
from fvdm.diffusion.solvers import SOLVERS, ddim
from fvdm.diffusion.timesteps import evenly_spaced, full_sequence, hold_clean, spaced, staggered, together
from fvdm.diffusion.video import sample_video
from tests.denoisers import DIFFUSION, clean, disturbed, oracle

SHAPE = (3, 8, 4, 4, 4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_does_not_depend_on_its_batch(solver):
    net = disturbed()
    sampler = SamplerConfig(SOLVERS[solver]())
    schedule = together(spaced(sampler.solver.spacing, 5, DIFFUSION.noise_levels()), 8)

    def draw(seeds):
        return sample_video(net, DIFFUSION, torch.zeros(len(seeds), 8, 4, 4, 4), schedule, seeds, sampler)

    complete = draw(range(8))
    parts = [torch.cat([draw(range(k, min(k + size, 8))) for k in range(0, 8, size)]) for size in (1, 3)]
    for part in parts:
        assert (part - complete).abs().max() < 1e-5
    assert not torch.equal(complete[0], complete[1])


def test_a_standing_frame_stands_at_any_level():
    """Not only at t = 0: a frame that waits at T, or anywhere between, is not touched either."""
    schedule = full_sequence(6, 8)
    schedule[:, 3] = 1000
    schedule[:, 5] = 333
    x = clean()
    for make in SOLVERS.values():
        out = sample(disturbed(), x, schedule, DIFFUSION, solver=make(), generator=generators(range(3)))
        assert torch.equal(out[:, [3, 5]], x[:, [3, 5]])
        assert not torch.equal(out[:, 4], x[:, 4])


def test_rows_in_which_nothing_moves_cost_nothing():
    calls = []

    def model(x, t, y):
        calls.append(t)
        return torch.zeros(*x.shape[:2], 8, 4, 4)

    schedule = full_sequence(5, 8).repeat_interleave(3, dim=0)
    sample(model, clean(), schedule, DIFFUSION)
    assert len(calls) == 5


def test_start_noises_every_frame_to_its_own_level():
    schedule = full_sequence(5, 8)
    schedule[:, 0], schedule[0, 1] = 0, 700
    schedule[1:, 1] = schedule[1:, 1].clamp(max=700)
    x_0 = clean()
    x = start(x_0, schedule, DIFFUSION, generators([4, 5, 6]))
    noise = draw_noise(SHAPE, generators([4, 5, 6]), "cpu")
    assert torch.equal(x[:, 0], x_0[:, 0])
    assert torch.equal(x[:, 2:], noise[:, 2:])
    a = DIFFUSION.alpha_bar[700].item()
    assert torch.allclose(x[:, 1], a**0.5 * x_0[:, 1] + (1 - a) ** 0.5 * noise[:, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schedule": full_sequence(4, 7)}, "7 frames, the clip has 8"),
        ({"guidance": 2.0}, "needs a condition y"),
        ({"solver": SOLVERS["ddpm"](), "generator": generators([1])}, "3 generators"),
    ],
)
def test_misuse_is_refused(change, words):
    arguments = {"schedule": full_sequence(4, 8)} | change
    schedule = arguments.pop("schedule")
    with pytest.raises(ValueError, match=words):
        sample(oracle(clean()), clean(), schedule, DIFFUSION, **arguments)


def test_a_window_of_a_wide_matrix_sees_what_is_finished_and_never_goes_back():
    schedule = staggered(evenly_spaced(4), [0] * 8 + [4] * 4 + [8] * 4)
    blocks = windows(schedule, 8)
    assert [first for first, _ in blocks] == [0, 4, 8]
    assert all(block.shape[1] == 8 for _, block in blocks)
    assert (blocks[1][1][:, :4] == 0).all()
    with pytest.raises(ValueError, match="frames 0 to 11 move together"):
        windows(full_sequence(4, 12), 8)


def test_a_hole_in_a_long_video_is_seen_from_both_sides():
    held = [k for k in range(100) if not 40 <= k < 44]
    ((first, schedule),) = windows(hold_clean(full_sequence(4, 100), held), 16)
    assert first == 34
    assert (schedule[0] > 0).nonzero().flatten().tolist() == [6, 7, 8, 9]


def test_history_follows_its_frame_when_the_window_slides():
    """A wide matrix in sliding windows is the same as in one, for a denoiser that looks at each frame alone."""
    schedule = staggered(evenly_spaced(6), [3 * k for k in range(20)])

    def model(x, t, y=None):
        _, sigma = DIFFUSION.levels(t)
        return torch.cat([torch.tanh(sigma.float() * x), torch.zeros_like(x)], dim=2)

    x = start(torch.zeros(2, 20, 4, 4, 4), schedule, DIFFUSION, generators([0, 1]))
    for make in (SOLVERS["dpm++"], SOLVERS["unipc"], ddim):
        complete = sample(model, x, schedule, DIFFUSION, solver=make())
        frames = iter(x.split(1, dim=1))
        parts = stream(
            model,
            lambda n, frames=frames: torch.cat([next(frames) for _ in range(n)], dim=1),
            windows(schedule, 5),
            DIFFUSION,
            SamplerConfig(make()),
        )
        assert torch.equal(torch.cat(list(parts), dim=1), complete)


def test_blocks_that_do_not_follow_each_other_are_refused():
    x, schedule = clean(), full_sequence(4, 8)

    def walk(*blocks):
        return list(stream(disturbed(), lambda n: x[:, :n], blocks, DIFFUSION))

    with pytest.raises(ValueError, match="other timesteps"):
        walk((0, schedule), (2, schedule))
    with pytest.raises(ValueError, match="cannot follow"):
        walk((4, schedule), (2, schedule))
