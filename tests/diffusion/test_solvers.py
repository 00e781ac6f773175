"""The solvers against Gaussian data, whose score and whose probability-flow ODE are known exactly.

Order means: half the step, a 2^order times smaller error. It is measured per frame, where all frames walk together and
where each walks in its own time.
"""

import numpy as np
import pytest
import torch

from benchmarks.solver_errors import END, ORDERS, TOP, asynchronous
from fvdm.diffusion.config import DiffusionConfig
from fvdm.diffusion.process import Diffusion
from fvdm.diffusion.sampling import sample
from fvdm.diffusion.solvers import SOLVERS, solver
from fvdm.diffusion.timesteps import SPACINGS, spaced
from tests.denoisers import DIFFUSION, clean

MEAN, SPREAD = 0.7, 0.4  # of the data, in every number
STEPS = (8, 16, 32, 64)


def gaussian(diffusion=DIFFUSION, covariance=None):
    """The exact denoiser of data with mean MEAN and a covariance `(f f)` between frames."""

    def model(x, t, y=None):
        f = x.shape[1]
        c = SPREAD**2 * torch.eye(f, dtype=torch.float64) if covariance is None else covariance
        alpha, sigma = (level[0].flatten() for level in diffusion.levels(t[:1]))
        total = torch.diag(alpha) @ c @ torch.diag(alpha) + torch.diag(sigma**2)
        off = x.double() - (alpha * MEAN)[None, :, None, None, None]
        eps = sigma[:, None] * torch.linalg.solve(total, off.transpose(0, 1).flatten(1))
        eps = eps.view(f, len(x), *x.shape[2:]).transpose(0, 1)
        x_0 = (x.double() - sigma[None, :, None, None, None] * eps) / alpha[None, :, None, None, None].clamp(min=1e-9)
        return diffusion.target(x_0, t, eps)

    return model


def exact(x, t, t_next, diffusion=DIFFUSION):
    """Where the ODE leads each independent frame: it keeps its place in the distribution."""
    a, s = diffusion.levels(t)
    a_next, s_next = diffusion.levels(t_next)
    place = (x.double() - a * MEAN) / (a**2 * SPREAD**2 + s**2).sqrt()
    return a_next * MEAN + (a_next**2 * SPREAD**2 + s_next**2).sqrt() * place


def synchronous(steps, end=END):
    return torch.linspace(TOP, end, steps + 1).round().long()[:, None].repeat(1, 4)


def order(errors):
    """Of each frame, from its errors at steps that double: `(n f) -> (f)`, by a line through their logarithms."""
    doublings = np.arange(len(errors))
    return np.array([-np.polyfit(doublings, np.log2(e), 1)[0] for e in np.stack(errors).T])


def errors(name, make, wanted, objective="eps", covariance=None):
    """Of each frame, at each number of steps: `(n f)`; `wanted(x, matrix, diffusion)` is the exact solution."""
    diffusion = Diffusion(DiffusionConfig(objective=objective, learned_variance=False))
    out = []
    for n in STEPS:
        schedule = make(n)
        x = clean((1, schedule.shape[1], 1, 4, 4))
        got = sample(gaussian(diffusion, covariance), x, schedule, diffusion, solver=solver(name))
        out.append((got - wanted(x, schedule, diffusion)).abs().amax((0, 2, 3, 4)).numpy())
    return np.stack(out)


def independent(x, schedule, diffusion):
    return exact(x, schedule[:1], schedule[-1:], diffusion)


@pytest.mark.parametrize("objective", ["eps", "v", "flow"])
@pytest.mark.parametrize(("name", "theory"), ORDERS.items())
def test_the_order_of_convergence(name, theory, objective):
    # Where the errors of the two ends of the way cancel, they tell of no order: the two processes bend at other places.
    end = 64 if objective == "flow" else END
    found = order(errors(name, lambda steps: synchronous(steps, end), independent, objective)[1:])
    assert (abs(found - theory) < 0.2 * theory).all(), found


@pytest.mark.parametrize(("name", "theory"), ORDERS.items())
def test_the_order_is_kept_by_frames_that_start_late_stop_early_or_wait(name, theory):
    found = errors(name, asynchronous, independent)
    assert (found[:, 0] < 1e-12).all(), "a held frame is exact"
    assert (abs(order(found[:, 1:]) - theory) < 0.12 * theory).all(), order(found[:, 1:])


def coupled(covariance):
    """The ODE of frames that depend on each other, along an asynchronous matrix, by a Runge-Kutta solver in its own
    right: the corners of the matrix are the ends of its pieces."""
    from scipy.integrate import solve_ivp
    from scipy.interpolate import CubicSpline

    log_bar = CubicSpline(np.arange(1, 1001), DIFFUSION.alpha_bar[1:].log().numpy())
    slope, c = log_bar.derivative(), covariance.numpy()

    def solution(x, schedule, diffusion):
        z = x[0].double().flatten(1).numpy()
        half = (len(schedule) - 1) // 4
        for row in range(0, 4 * half, half):
            begin, end = (schedule[k].double().numpy() for k in (row, row + half))

            def rate(s, flat, begin=begin, end=end):
                t = begin + s * (end - begin)
                bar = np.exp(log_bar(t))
                total = np.sqrt(bar)[:, None] * c * np.sqrt(bar) + np.diag(1 - bar)
                now = flat.reshape(len(c), -1)
                score = -np.linalg.solve(total, now - (np.sqrt(bar) * MEAN)[:, None])
                return (0.5 * (slope(t) * (end - begin))[:, None] * (now + score)).ravel()

            z = solve_ivp(rate, (0, 1), z.ravel(), method="DOP853", rtol=1e-10, atol=1e-10).y[:, -1].reshape(z.shape)
        return torch.from_numpy(z).view(x.shape)

    return solution


@pytest.mark.parametrize(("name", "theory"), ORDERS.items())
def test_the_order_is_kept_when_frames_depend_on_each_other(name, theory):
    near = (torch.arange(5)[:, None] - torch.arange(5)).abs().double()
    covariance = SPREAD**2 * 0.7**near
    found = errors(name, asynchronous, coupled(covariance), covariance=covariance)
    assert (abs(order(found[:, 1:]) - theory) < 0.12 * theory).all(), order(found[:, 1:])


def test_15_steps_of_dpm_solver_are_as_good_as_50_of_ddim():
    """From pure noise to clean data: the mean error over the data's distribution, each in the spacing that suits it."""
    x = clean((1, 1, 1, 64, 64))

    def error(name, steps, spacing):
        schedule = spaced(spacing, steps, DIFFUSION.noise_levels())[:, None]
        diffusion = Diffusion(DiffusionConfig(learned_variance=False))
        got = sample(gaussian(diffusion), x, schedule, diffusion, solver=solver(name))
        return (got - exact(x, schedule[:1], schedule[-1:])).square().mean().sqrt().item()

    best = min(error("ddim", 50, spacing) for spacing in SPACINGS)
    for name in ("dpm++", "unipc"):
        assert error(name, 15, "log-snr") < best


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(
    ("name", "scheduler", "settings"),
    [
        ("dpm++", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}),
        ("unipc", "UniPCMultistepScheduler", {"solver_type": "bh2"}),
    ],
)
def test_where_all_frames_walk_together_it_is_the_published_solver(name, scheduler, settings, steps):
    """Against the implementations of diffusers, for the same timesteps; their index 0..999 is our 1..1000."""
    import diffusers

    levels = spaced("karras", steps, DIFFUSION.noise_levels())
    theirs = getattr(diffusers, scheduler)(beta_end=0.02, solver_order=2, final_sigmas_type="zero", **settings)
    theirs.set_timesteps(steps)
    theirs.timesteps = levels[:-1] - 1
    bar = theirs.alphas_cumprod[theirs.timesteps]
    theirs.sigmas = torch.cat([((1 - bar) / bar).sqrt(), torch.zeros(1)])
    diffusion = Diffusion(DiffusionConfig(learned_variance=False))
    model, x = gaussian(diffusion), clean((1, 1, 4, 8, 8))
    expected = x[0]
    for index in theirs.timesteps:
        eps = model(expected[None], torch.full((1, 1), int(index) + 1))[0].float()
        expected = theirs.step(eps, index, expected).prev_sample
    got = sample(model, x, levels[:, None], diffusion, solver=solver(name))[0]
    assert (got - expected).abs().max() < 1e-4


def test_flow_from_pure_noise_has_no_infinity():
    """At T a flow has no signal at all, and lambda is minus infinity."""
    diffusion = Diffusion(DiffusionConfig(objective="flow", learned_variance=False))
    x = clean((1, 2, 1, 8, 8))
    for name in SOLVERS:
        for spacing, steps in (("trailing", 30), ("log-snr", 30), ("shift", 90)):  # a shift makes the last step long
            schedule = spaced(spacing, steps, diffusion.noise_levels(), 5.0)[:, None].repeat(1, 2)
            generator = [torch.Generator().manual_seed(0)]
            out = sample(gaussian(diffusion), x, schedule, diffusion, solver=solver(name), generator=generator)
            assert out.isfinite().all()
            if name in ("dpm++", "unipc"):
                assert (out - exact(x, schedule[:1], schedule[-1:], diffusion)).abs().max() < 0.05


@pytest.mark.parametrize(("name", "eta", "sentence"), [("euler", 0.0, "ddim, ddpm"), ("unipc", 0.5, "eta belongs")])
def test_unknown_solvers_are_refused(name, eta, sentence):
    with pytest.raises(ValueError, match=sentence):
        solver(name, eta)
    with pytest.raises(ValueError, match="eta"):
        solver("ddim", 2.0)
