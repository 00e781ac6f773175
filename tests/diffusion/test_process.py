import math

import numpy as np
import pytest
import torch

from fvdm.diffusion.config import DiffusionConfig
from fvdm.diffusion.process import OBJECTIVES, Diffusion, discretized_log_likelihood, normal_kl
from fvdm.diffusion.timesteps import sample_timesteps

SHAPE = (3, 4, 2, 6, 6)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fixed_output(x, t, y=None, seed=5):
    return randn(x.shape[0], x.shape[1], 2 * x.shape[2], *x.shape[3:], seed=seed)


def test_table_is_the_linear_schedule_with_a_clean_entry_in_front():
    diffusion = Diffusion()
    betas = np.linspace(1e-4, 0.02, 1000)
    assert diffusion.alpha_bar[0] == 1.0
    assert np.allclose(diffusion.alpha_bar[1:].numpy(), np.cumprod(1 - betas), rtol=1e-12)
    assert diffusion.alpha_bar[1] == pytest.approx(0.9999)


def test_q_sample_noises_each_frame_by_its_own_timestep():
    diffusion = Diffusion()
    x_0, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    t = sample_timesteps(SHAPE[:2], 1.0, generator=torch.Generator().manual_seed(2))
    t[0, 0] = 0
    x_t = diffusion.q_sample(x_0, t, noise)
    for b in range(SHAPE[0]):
        for f in range(SHAPE[1]):
            a = diffusion.alpha_bar[t[b, f]]
            expected = a.sqrt() * x_0[b, f].double() + (1 - a).sqrt() * noise[b, f].double()
            assert torch.allclose(x_t[b, f].double(), expected, atol=1e-6)
    assert torch.equal(x_t[0, 0], x_0[0, 0])


def test_a_scalar_timestep_raises():
    x = randn(*SHAPE)
    for t in (torch.tensor(5), torch.full((3,), 5), torch.full((3, 1), 5)):
        with pytest.raises(ValueError, match="one timestep per frame"):
            Diffusion().q_sample(x, t, x)


def reference_loss(output, x_0, noise, t):
    """One frame of Gaussian diffusion at the official index t - 1, in float64, written from IDDPM's formulas."""
    betas = np.linspace(1e-4, 0.02, 1000)
    bars = np.cumprod(1 - betas)
    i = t - 1
    before = bars[i - 1] if i else 1.0
    variance = betas[i] * (1 - before) / (1 - bars[i])
    lowest = betas[1] * (1 - bars[0]) / (1 - bars[1])
    low, high = math.log(variance if i else lowest), math.log(betas[i])
    eps, v = np.split(output, 2)
    x_t = np.sqrt(bars[i]) * x_0 + np.sqrt(1 - bars[i]) * noise
    guess = (x_t - np.sqrt(1 - bars[i]) * eps) / np.sqrt(bars[i])

    def mean(x):
        return (
            betas[i] * np.sqrt(before) / (1 - bars[i]) * x + (1 - before) * np.sqrt(1 - betas[i]) / (1 - bars[i]) * x_t
        )

    log_variance = low + (v + 1) / 2 * (high - low)
    if i:
        kl = 0.5 * (
            log_variance - low - 1 + np.exp(low - log_variance) + (mean(x_0) - mean(guess)) ** 2 / np.exp(log_variance)
        )
        term = kl.mean() / math.log(2)
    else:
        from scipy.stats import norm

        sd = np.exp(0.5 * log_variance)
        cdf_high = np.where(x_0 > 0.999, 1, norm.cdf((x_0 - mean(guess) + 1 / 255) / sd))
        cdf_low = np.where(x_0 < -0.999, 0, norm.cdf((x_0 - mean(guess) - 1 / 255) / sd))
        term = -np.log(np.clip(cdf_high - cdf_low, 1e-12, None)).mean() / math.log(2)
    return ((noise - eps) ** 2).mean() + term


def test_losses_equal_iddpm_frame_by_frame():
    diffusion = Diffusion()
    x_0, noise = 0.5 * randn(*SHAPE), randn(*SHAPE, seed=1)
    t = torch.tensor([[1, 2, 500, 1000], [1, 1, 1, 1], [999, 3, 1, 250]])
    # Close to the truth, so that the likelihood of the last step is not clamped.
    output = torch.cat([noise + 0.1 * randn(*SHAPE, seed=2), 0.5 * randn(*SHAPE, seed=3)], dim=2)
    losses = diffusion.training_losses(lambda x, t, y: output, x_0, t, None, noise)
    assert losses.shape == SHAPE[:2]
    assert losses.dtype == torch.float32
    for b in range(3):
        for f in range(4):
            args = (z[b, f].double().numpy() for z in (output, x_0, noise))
            assert losses[b, f].item() == pytest.approx(reference_loss(*args, t[b, f].item()), rel=2e-4)


def test_the_variational_term_trains_the_variance_only():
    diffusion = Diffusion()
    x_0, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    output = fixed_output(x_0, None).requires_grad_()
    t = torch.full(SHAPE[:2], 300)
    diffusion.training_losses(lambda x, t, y: output, x_0, t, None, noise).sum().backward()
    eps = output.detach()[:, :, :2]
    expected = 2 * (eps - noise) / noise[0, 0].numel()
    assert torch.allclose(output.grad[:, :, :2], expected, atol=1e-6)
    assert output.grad[:, :, 2:].abs().sum() > 0


def test_a_frames_loss_does_not_depend_on_the_timesteps_of_others():
    diffusion = Diffusion()
    x_0, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    one = torch.tensor([[1, 700, 20, 5]]).expand(3, 4)
    other = torch.tensor([[1, 2, 900, 1]]).expand(3, 4)
    a, b = (diffusion.training_losses(fixed_output, x_0, t, None, noise) for t in (one, other))
    assert torch.equal(a[:, 0], b[:, 0])
    assert not torch.equal(a[:, 1], b[:, 1])


def test_clean_frames_have_no_loss_and_no_nan():
    x_0 = randn(*SHAPE)
    t = torch.tensor([[0, 10, 0, 1000]]).expand(3, 4)
    losses = Diffusion().training_losses(fixed_output, x_0, t)
    assert (losses[:, [0, 2]] == 0).all()
    assert (losses[:, [1, 3]] > 0).all()


def test_without_learned_variance_the_loss_is_the_squared_error():
    diffusion = Diffusion(DiffusionConfig(learned_variance=False))
    x_0, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    losses = diffusion.training_losses(lambda x, t, y: torch.zeros_like(x), x_0, torch.full((3, 4), 9), None, noise)
    assert torch.allclose(losses, noise.square().mean((2, 3, 4)))


def test_kl_and_likelihood_agree_with_known_values():
    m1, l1, m2, l2 = (torch.tensor(z, dtype=torch.float64) for z in (0.3, -0.2, -0.1, 0.4))
    p, q = (torch.distributions.Normal(m, (s / 2).exp()) for m, s in ((m1, l1), (m2, l2)))
    assert normal_kl(m1, l1, m2, l2) == pytest.approx(torch.distributions.kl_divergence(p, q).item())
    bins = torch.arange(256) * 2 / 255 - 1
    log = discretized_log_likelihood(bins, torch.full((256,), 0.1), torch.full((256,), -1.0))
    assert log.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_the_posterior_is_bayes_rule():
    """q(x_s | x_t, x_0) from the joint Gaussian of x_s and x_t given x_0, for a skipping step."""
    diffusion = Diffusion()
    t, s = torch.tensor([[700]]), torch.tensor([[430]])
    x_0, x_t = randn(1, 1, 1, 1, 1).double(), randn(1, 1, 1, 1, 1, seed=1).double()
    a, b = diffusion.alpha_bar[700], diffusion.alpha_bar[430]
    gain = (a / b).sqrt() * (1 - b) / (1 - a)
    mean, low, high = diffusion.posterior(x_0, x_t, t, s)
    assert mean.item() == pytest.approx((b.sqrt() * x_0 + gain * (x_t - a.sqrt() * x_0)).item(), abs=1e-6)
    assert low.exp().item() == pytest.approx(((1 - b) - gain * (a / b).sqrt() * (1 - b)).item(), rel=1e-5)
    assert high.exp().item() == pytest.approx((1 - a / b).item(), rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_perfect_estimate_has_no_error_and_gives_back_both_parts(objective):
    diffusion = Diffusion(DiffusionConfig(objective=objective, learned_variance=False))
    x_0, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    t = torch.tensor([[1, 300, 700, 900]]).expand(3, 4)
    target = diffusion.target(x_0, t, noise)
    assert (diffusion.training_losses(lambda x, t, y: target, x_0, t, None, noise) == 0).all()
    prediction = diffusion.predict(target, diffusion.q_sample(x_0, t, noise), t)
    assert torch.allclose(prediction.x_0, x_0, atol=1e-4)
    assert torch.allclose(prediction.eps, noise, atol=1e-4)


def test_rectified_flow_is_a_straight_line_per_frame():
    diffusion = Diffusion(DiffusionConfig(objective="flow", learned_variance=False))
    x_0, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    t = torch.tensor([[0, 250, 999, 1000]]).expand(3, 4)
    share = (t / 1000)[..., None, None, None]
    assert torch.allclose(diffusion.q_sample(x_0, t, noise), (1 - share) * x_0 + share * noise, atol=1e-6)
    assert torch.equal(diffusion.target(x_0, t, noise), noise - x_0)
    assert torch.equal(diffusion.q_sample(x_0, t, noise)[:, 0], x_0[:, 0])
    assert torch.equal(diffusion.q_sample(x_0, t, noise)[:, 3], noise[:, 3])


def test_the_posterior_of_a_flow_is_bayes_rule_too():
    diffusion = Diffusion(DiffusionConfig(objective="flow"))
    x_0, x_t = randn(1, 1, 1, 1, 1).double(), randn(1, 1, 1, 1, 1, seed=1).double()
    for t, s in ((700, 430), (1000, 999), (2, 1)):
        (a, sigma_a), (b, sigma_b) = ((1 - k / 1000, k / 1000) for k in (t, s))
        between = sigma_a**2 - (a / b * sigma_b) ** 2
        variance = between * sigma_b**2 / sigma_a**2
        wanted = a / b * sigma_b**2 / sigma_a**2 * x_t + b * between / sigma_a**2 * x_0
        mean, low, high = diffusion.posterior(x_0, x_t, torch.tensor([[t]]), torch.tensor([[s]]))
        assert mean.item() == pytest.approx(wanted.item(), abs=1e-6)
        assert low.exp().item() == pytest.approx(variance, rel=1e-4)
        assert high.exp().item() == pytest.approx(between, rel=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("learned_variance", [False, True])
def test_losses_of_every_objective_are_finite_and_per_frame(objective, learned_variance):
    diffusion = Diffusion(DiffusionConfig(objective=objective, learned_variance=learned_variance, min_snr=5.0))
    t = torch.tensor([[0, 1, 2, 500], [999, 1000, 7, 3], [1000, 1000, 1, 1]])

    def model(x, t, y=None):
        return torch.tanh(fixed_output(x, t)[:, :, : (4 if learned_variance else 2)])

    losses = diffusion.training_losses(model, randn(*SHAPE), t)
    assert losses.isfinite().all()
    assert (losses[t == 0] == 0).all()
    assert (losses[t > 0] > 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_min_snr_counts_the_error_of_x_0_by_the_bounded_snr_of_its_frame(objective):
    """Hang et al., equation 8: one weight on x_0, whatever is estimated; per frame, by its own t."""
    diffusion = Diffusion(DiffusionConfig(objective=objective, learned_variance=False, min_snr=5.0))
    x_0, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    t = torch.tensor([[1, 150, 400, 900], [10, 20, 30, 40], [950, 500, 300, 2]])
    off = 0.1 * randn(*SHAPE, seed=2)
    estimate = diffusion.target(x_0, t, noise) + off
    losses = diffusion.training_losses(lambda x, t, y: estimate, x_0, t, None, noise)
    got = diffusion.predict(estimate, diffusion.q_sample(x_0, t, noise), t).x_0
    alpha, sigma = (level.flatten(1) for level in diffusion.levels(t))
    weight = (alpha / sigma).square().clamp(max=5.0)
    wanted = weight * (got.double() - x_0).square().flatten(2).mean(2)
    assert torch.allclose(losses.double(), wanted, rtol=1e-2)


def test_min_snr_of_0_leaves_the_loss_alone():
    x_0, noise, t = randn(*SHAPE), randn(*SHAPE, seed=1), torch.full((3, 4), 77)
    plain = Diffusion().training_losses(fixed_output, x_0, t, None, noise)
    assert torch.equal(
        Diffusion(DiffusionConfig(min_snr=0.0)).training_losses(fixed_output, x_0, t, None, noise), plain
    )
    assert (Diffusion().weight(t) == 1).all()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"objective": "x"}, "eps, v, flow"),
        ({"min_snr": -1.0}, "min_snr"),
        ({"beta_end": 1.5}, "betas"),
    ],
)
def test_bad_settings_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        DiffusionConfig(**changes)
