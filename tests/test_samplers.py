from dataclasses import replace

import pytest
import torch

from fvdm.diffusion import Diffusion, DiffusionConfig
from fvdm.model import VideoDiT, preset
from fvdm.samplers import SOLVERS, ddim, draw_noise, extend, generators, sample, start
from fvdm.tasks import TASKS, Sampling, given_frames, place, run
from fvdm.timesteps import full_sequence, hold_clean
from tests.latte import randomised

DIFFUSION = Diffusion()
SHAPE = (3, 8, 4, 4, 4)


def oracle(x_0, diffusion=DIFFUSION):
    """A denoiser that knows the answer: the noise that is really in x_t, and the lowest variance."""

    def model(x_t, t, y=None):
        alpha, sigma = diffusion.levels(t)
        eps = ((x_t.double() - alpha * x_0.double()) / sigma.clamp(min=1e-9)).float()
        estimate = diffusion.target(x_0, t, eps)
        return torch.cat([estimate, torch.full_like(estimate, -1.0)], dim=2)

    return model


def clean(shape=SHAPE, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(**changes):
    """The exact denoiser of unit Gaussian data, disturbed by a random network: samples are of the size of latents."""
    config = replace(preset("T/2"), size=4, frames=8, **changes)
    net = randomised(VideoDiT(config)).eval()

    def model(x, t, y=None):
        alpha, sigma = DIFFUSION.levels(t)
        eps, v = net(x, t, y).chunk(2, dim=2)
        return torch.cat([sigma.float() * x + 0.3 * alpha.float() * eps, v.clamp(-1, 1)], dim=2)

    return model


def matrices():
    f, s = SHAPE[1], 20
    yield "generate", full_sequence(s, f)
    yield "image-to-video", hold_clean(full_sequence(s, f), [0])
    yield "interpolate", hold_clean(full_sequence(s, f), [0, -1])
    yield "continue", hold_clean(full_sequence(s, f), range(4))
    # Each frame starts, and ends, some rows after the one before it.
    levels = full_sequence(s, 1)[:, 0]
    rows = torch.arange(s + 1 + 3 * (f - 1))[:, None] - 3 * torch.arange(f)
    yield "pyramid", levels[rows.clamp(0, s)]


@pytest.mark.parametrize("objective", ["eps", "v"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("name", "schedule"), list(matrices()), ids=[name for name, _ in matrices()])
def test_an_oracle_recovers_x_0_under_every_matrix(solver, name, schedule, objective):
    x_0, diffusion = clean(), Diffusion(DiffusionConfig(objective=objective))
    generator = generators(range(SHAPE[0]))
    x = start(x_0, schedule, diffusion, generator)
    out = sample(oracle(x_0, diffusion), x, schedule, diffusion, solver=SOLVERS[solver](), generator=generator)
    assert (out - x_0).abs().max() < 1e-5


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_an_oracle_recovers_x_0_with_noisy_ddim(eta):
    x_0, schedule = clean(), full_sequence(30, 8)
    generator = generators(range(3))
    x = start(x_0, schedule, DIFFUSION, generator)
    out = sample(oracle(x_0), x, schedule, DIFFUSION, solver=ddim(eta), generator=generator)
    assert (out - x_0).abs().max() < 1e-5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("task", TASKS)
def test_given_frames_leave_bit_identical(task, guidance, solver):
    net = network(num_classes=3)
    given = given_frames(task, 8)
    clip = place(clean((2, len(given), 4, 4, 4)), given, 8)
    how = Sampling(steps=4, guidance=guidance, solver=SOLVERS[solver](), null_class=3)
    length = 20 if task == "long" else 8
    out = run(net, DIFFUSION, clip, given, [0, 1], how, length, torch.tensor([0, 2]))
    assert out.shape == (2, length, 4, 4, 4)
    assert out.isfinite().all()
    assert torch.equal(out[:, list(given)], clip[:, list(given)])
    free = [k for k in range(length) if k not in given]
    assert not torch.equal(out[:, free], torch.zeros_like(out[:, free]))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_does_not_depend_on_its_batch(solver):
    net = network()
    how = Sampling(steps=5, solver=SOLVERS[solver]())

    def draw(seeds):
        return run(net, DIFFUSION, torch.zeros(len(seeds), 8, 4, 4, 4), (), seeds, how)

    whole = draw(range(8))
    parts = [torch.cat([draw(range(k, min(k + size, 8))) for k in range(0, 8, size)]) for size in (1, 3)]
    for part in parts:
        assert (part - whole).abs().max() < 1e-5
    assert not torch.equal(whole[0], whole[1])


def test_a_standing_frame_stands_at_any_level():
    """Not only at t = 0: a frame that waits at T, or anywhere between, is not touched either."""
    schedule = full_sequence(6, 8)
    schedule[:, 3] = 1000
    schedule[:, 5] = 333
    x = clean()
    for make in SOLVERS.values():
        out = sample(network(), x, schedule, DIFFUSION, solver=make(), generator=generators(range(3)))
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


def test_guidance_extrapolates_the_noise_estimate_only():
    seen = []

    def model(x, t, y):
        seen.append(y.tolist())
        out = torch.zeros(x.shape[0], 8, 8, 4, 4)
        out[:, :, :4] = y[:, None, None, None, None]
        out[:, :, 4:] = 10 * y[:, None, None, None, None]
        return out

    from fvdm.samplers import guided

    out = guided(model, 3.0, null_class=5)(clean(), torch.full((3, 8), 9), torch.tensor([1, 2, 3]))
    assert seen == [[1, 2, 3, 5, 5, 5]]
    assert out[:, 0, 0, 0, 0].tolist() == [5 + 3 * (1 - 5), 5 + 3 * (2 - 5), 5 + 3 * (3 - 5)]
    assert out[:, 0, 4, 0, 0].tolist() == [10, 20, 30]


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


def test_long_video_has_the_papers_window_arithmetic():
    windows = []

    def draw(clip, held):
        windows.append(len(held))
        out = clip.clone()
        out[:, len(held) :] = len(windows)
        return out

    first = torch.zeros(1, 16, 1, 1, 1)
    video = extend(draw, first, 128, 8)
    assert windows == [8] * 14
    assert video.shape[1] == 128
    assert video.flatten().tolist() == [0.0] * 16 + [float(k) for k in range(1, 15) for _ in range(8)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schedule": full_sequence(4, 7)}, "7 frames, the clip has 8"),
        ({"guidance": 2.0}, "needs class labels"),
        ({"solver": SOLVERS["ddpm"](), "generator": generators([1])}, "3 generators"),
    ],
)
def test_misuse_is_refused(change, words):
    arguments = {"schedule": full_sequence(4, 8)} | change
    schedule = arguments.pop("schedule")
    with pytest.raises(ValueError, match=words):
        sample(network(), clean(), schedule, DIFFUSION, **arguments)


def test_unknown_tasks_and_settings_are_refused():
    with pytest.raises(ValueError, match="image-to-video"):
        given_frames("img2vid", 8)
    with pytest.raises(ValueError, match="2 given frames are wanted, 3 came"):
        place(clean((1, 3, 4, 4, 4)), (0, 7), 8)
    with pytest.raises(ValueError, match="eta"):
        ddim(2.0)
    with pytest.raises(ValueError, match="overlap"):
        run(network(), DIFFUSION, clean(), (), range(3), Sampling(steps=1, overlap=8))
