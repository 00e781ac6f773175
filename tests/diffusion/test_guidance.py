from dataclasses import replace

import pytest
import torch

from fvdm.diffusion import Diffusion, DiffusionConfig, full_sequence, sample
from fvdm.diffusion.guidance import Guidance, guided, noisy_given
from fvdm.models import build, preset
from tests.denoisers import DIFFUSION, clean
from tests.latte import randomised

SHAPE = (3, 8, 4, 4, 4)


class Recorder:
    """Answers with the label in the estimate and ten times it in the variance; remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, x, t, y):
        self.asked.append((x, t, y))
        label = torch.zeros(len(x)) if y is None else y
        out = torch.zeros(x.shape[0], x.shape[1], 8, 4, 4) + label[:, None, None, None, None]
        out[:, :, 4:] *= 10
        return out


def noise():
    return clean(SHAPE, seed=7)


def ask(how, t, y=None, model=None, null=5):
    model = model or Recorder()
    hidden = None if y is None else torch.full_like(y, null)
    return guided(model, how, DIFFUSION, noise, hidden)(clean(), t.expand(3, 8), y, t.expand(8)), model


Y = torch.tensor([1, 2, 3])


def test_guidance_extrapolates_the_estimate_only_in_one_forward():
    out, model = ask(Guidance(3.0), torch.tensor(9), Y)
    ((_, _, y),) = model.asked
    assert y.tolist() == [1, 2, 3, 5, 5, 5]
    assert out[:, 0, 0, 0, 0].tolist() == [5 + 3 * (k - 5) for k in (1, 2, 3)]
    assert out[:, 0, 4, 0, 0].tolist() == [10, 20, 30]


def test_without_guidance_the_model_is_asked_as_it_is():
    model, t = Recorder(), torch.full((8,), 9)
    guided(model, Guidance(), DIFFUSION, noise)(clean(), t.expand(3, 8), Y, t)
    assert model.asked[0][2] is Y
    assert noisy_given(model, DIFFUSION, 0, noise) is model


def test_the_interval_is_per_frame_and_outside_it_costs_nothing():
    t = torch.tensor([0, 99, 100, 500, 900, 901, 1000, 300])
    out, _ = ask(Guidance(3.0, interval=(100, 900)), t, Y)
    guided_frames = out[0, :, 0, 0, 0] != 1
    assert guided_frames.tolist() == [False, False, True, True, True, False, False, True]
    _, model = ask(Guidance(3.0, interval=(100, 900)), torch.full((8,), 950), Y)
    assert len(model.asked[0][0]) == 3


def test_history_guidance_pushes_away_from_a_model_that_sees_noise_for_the_given_frames():
    t = torch.tensor([0, 0, 400, 400, 400, 400, 400, 400])

    def model(x, t, y=None):
        """The estimate is the mean of the clean frames that it sees."""
        seen = (t == 0).float()
        mean = (x.mean((2, 3, 4)) * seen).sum(1) / seen.sum(1).clamp(min=1)
        return mean[:, None, None, None, None].expand(*x.shape[:2], 8, 4, 4)

    out, _ = ask(Guidance(history=2.5), t, model=model)
    mean = clean()[:, :2].mean((1, 2, 3, 4))
    assert torch.allclose(out[:, 3, 0, 0, 0], 2.5 * mean, atol=1e-5)
    recorder = Recorder()
    ask(Guidance(2.0, history=2.5), t, Y, recorder, 9)
    x, asked_t, y = recorder.asked[0]
    assert y.tolist() == [1, 2, 3, 9, 9, 9, 1, 2, 3]
    assert torch.equal(x[6:, :2], noise()[:, :2])
    assert torch.equal(x[6:, 2:], clean()[:, 2:])
    assert asked_t[6].tolist() == [1000, 1000] + [400] * 6


def test_rescaling_gives_each_frame_its_deviation_back():
    y = torch.zeros(3, dtype=torch.long)

    def model(x, t, y):
        with_class = torch.cat([x, x], dim=2)
        return torch.where((y == 0)[:, None, None, None, None], with_class, 0.5 * with_class.flip(0))

    t = torch.tensor(500)
    plain = clean().flatten(2).std(2)
    for rescale, expected in ((0.0, False), (1.0, True)):
        out, _ = ask(Guidance(4.0, rescale=rescale), t, y, model, 1)
        assert torch.allclose(out[:, :, :4].flatten(2).std(2), plain, atol=1e-5) == expected


def test_given_noise_is_seen_by_the_network_alone():
    recorder = Recorder()
    t = torch.tensor([0, 0, 400, 1000, 5, 0, 7, 8])
    noisy_given(recorder, DIFFUSION, 30, noise)(clean(), t.expand(3, 8), None)
    x, asked_t, _ = recorder.asked[0]
    assert asked_t[1].tolist() == [30, 30, 400, 1000, 5, 30, 7, 8]
    assert torch.equal(x[:, 2:5], clean()[:, 2:5])
    expected = DIFFUSION.q_sample(clean(), torch.full((3, 8), 30), noise())
    assert torch.equal(x[:, 5], expected[:, 5])
    assert not torch.equal(x[:, 5], clean()[:, 5])
    several = torch.tensor([30, 0, 9, 9, 9, 200, 9, 9])
    noisy_given(recorder, DIFFUSION, several, noise)(clean(), t.expand(3, 8), None)
    x, asked_t, _ = recorder.asked[1]
    assert asked_t[1].tolist() == [30, 0, 400, 1000, 5, 200, 7, 8]
    assert torch.equal(x[:, 0], expected[:, 0])
    assert torch.equal(x[:, 1:5], clean()[:, 1:5])


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="rescale"):
        Guidance(rescale=2.0)
    with pytest.raises(ValueError, match="lower timestep first"):
        Guidance(interval=(900, 100))
    with pytest.raises(ValueError, match="0 \\(none\\) to 1000"):
        noisy_given(Recorder(), DIFFUSION, 1001, noise)


def conditional():
    return randomised(build(replace(preset("T/2"), size=4, frames=8, num_classes=3, learned_variance=False))).eval()


def drawn(model, **options):
    diffusion = Diffusion(DiffusionConfig(learned_variance=False))
    return sample(model, clean(), full_sequence(3, 8), diffusion, guidance=3.0, **options)


def test_guidance_pushes_away_from_the_condition_that_the_model_says_is_null():
    model, y = conditional(), torch.tensor([0, 1, 2])
    assert model.null(2).tolist() == [3, 3]
    assert torch.equal(drawn(model, y=y), drawn(model, y=y, negative=torch.full((3,), 3)))
    assert not torch.equal(drawn(model, y=y), drawn(model, y=y, negative=torch.zeros(3, dtype=torch.long)))


def test_guidance_without_a_condition_or_a_null_condition_is_refused():
    model = conditional()
    with pytest.raises(ValueError, match="needs a condition y"):
        drawn(model)
    with pytest.raises(ValueError, match="the condition that says nothing"):
        drawn(lambda x, t, y: model(x, t, y), y=torch.tensor([0, 1, 2]))


def test_an_unconditional_backbone_has_nothing_to_be_guided_by():
    model = randomised(build(replace(preset("T/2"), size=4, frames=8, learned_variance=False))).eval()
    diffusion = Diffusion(DiffusionConfig(learned_variance=False))
    assert model.null(2) is None
    assert torch.equal(drawn(model), sample(model, clean(), full_sequence(3, 8), diffusion))
