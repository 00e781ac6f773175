"""What flying digits are scored by: their paths, their names, and what a frame takes from its neighbours."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("torchmetrics", reason="pip install torchmetrics")

from data_prep.moving_digits import SPEEDS, bounce, clips, paint, read_digits
from fvdm.diffusion.config import DiffusionConfig
from fvdm.diffusion.process import Diffusion
from fvdm.evaluation.digits import centres, identity, name_digits, path_residual, straight_line, train_classifier
from fvdm.evaluation.scores import LEVELS, OWN, neighbour_table

PLAIN = Diffusion(DiffusionConfig(learned_variance=False))


def disc(kinds: int = 2) -> torch.Tensor:
    """Digits of a kind: round, so that their centre is where they are."""
    y, x = torch.meshgrid(torch.arange(28) - 13.5, torch.arange(28) - 13.5, indexing="ij")
    return torch.stack([((x**2 + y**2).sqrt() < 6 + kind).float() for kind in range(kinds)])


def test_digits_are_where_their_paths_say():
    made = clips(disc(), 4, 24, 48, held_out=False, seed=0)
    again = clips(disc(), 4, 24, 48, held_out=False, seed=0)
    other = clips(disc(), 4, 24, 48, held_out=True, seed=0)
    video, truth = torch.stack([clip.video for clip in made]), np.stack([clip.centres for clip in made])
    assert np.abs(centres(video) - truth).max() < 0.4
    assert torch.equal(video, torch.stack([clip.video for clip in again]))
    assert not np.allclose(truth, np.stack([clip.centres for clip in other])), "held-out clips fly other ways"
    speed = np.linalg.norm(np.diff(truth, axis=1), axis=2)
    assert speed.max() <= 48 / 20 + 1e-6


def test_a_path_that_can_be_flown_leaves_nothing_and_others_do():
    truth = np.stack([clip.centres for clip in clips(disc(), 8, 16, 48, held_out=False, seed=3)])
    generator = np.random.default_rng(0)
    assert path_residual(truth, 48, SPEEDS).max() < 0.4
    assert path_residual(truth[:, generator.permutation(16)], 48, SPEEDS).min() > 0.5
    assert path_residual(np.repeat(truth[:, :1], 16, axis=1), 48, SPEEDS).min() > 0.5, "standing still is no flight"
    np.testing.assert_allclose(bounce(np.array([-1.0, 0, 5, 6, 11]), 5), [1, 0, 5, 4, 1])


def test_a_straight_line_is_right_until_the_digit_meets_a_wall():
    corners = np.stack([np.linspace(2, 15.5, 16), np.full(16, 8.0)], axis=1)
    video = paint(F.interpolate(disc()[:1, None], size=(16, 16), mode="area")[0, 0], corners, 32)[None]
    truth = centres(video)
    for given in ((0, 15), (0, 1), tuple(range(8))):
        made = straight_line(video, given)
        assert torch.equal(made[:, list(given)], video[:, list(given)])
        assert np.abs(centres(made) - truth).max() < 0.3, given
    changed = video.clone()
    changed[:, 2:] = 0
    assert torch.equal(straight_line(changed, (0, 1)), straight_line(video, (0, 1))), "only given frames are looked at"
    stopped = straight_line(video.flip(-1).flip(1)[:, 8:], (0, 1))  # flies towards the wall from nearby
    assert centres(stopped).min() > 32 / 4 - 0.5, "the digit stays in the frame"
    with pytest.raises(ValueError, match="a straight line needs two"):
        straight_line(video, (0,))


def strokes(count, generator):
    """Digits of two kinds that nobody confuses: upright strokes (1) and rings (0), each a little different."""
    y, x = torch.meshgrid(torch.arange(28) - 13.5, torch.arange(28) - 13.5, indexing="ij")
    width = 2 + 2 * torch.rand((count, 1, 1), generator=generator)
    labels = torch.arange(count) % 2
    upright = ((x.abs() < width) & (y.abs() < 11)).float()
    rings = (((x**2 + y**2).sqrt() - 8).abs() < width / 2).float()
    return torch.where(labels[:, None, None] == 1, upright, rings), labels


def test_a_classifier_names_digits_wherever_they_fly_and_identity_counts_the_commonest():
    generator = torch.Generator().manual_seed(0)
    images, labels = strokes(200, generator)
    net, accuracy = train_classifier(images, labels, 32, epochs=25)
    assert accuracy == 1
    other, kinds = strokes(2, generator)
    made = clips(other, 4, 12, 32, held_out=True, seed=0)
    sure = name_digits(net, torch.stack([clip.video for clip in made]))
    np.testing.assert_allclose(sure.sum(axis=2), 1, rtol=1e-5)
    assert (sure.argmax(axis=2) == kinds[[clip.digit for clip in made]].numpy()[:, None]).mean() > 0.95
    np.testing.assert_allclose(identity(np.array([[1, 1, 2, 1], [3, 3, 3, 3]])), [0.75, 1])


def test_digits_are_read_from_both_forms_and_a_wrong_file_is_refused(tmp_path):
    images = (disc() * 255).byte().numpy()
    np.savez(tmp_path / "d.npz", images=images, labels=[0, 3])
    np.savez(tmp_path / "nameless.npz", images=images)
    (tmp_path / "src").mkdir()
    for number, image in zip((0, 3), disc(), strict=True):
        (tmp_path / "src" / f"{number}.json").write_text(json.dumps({"data": image.flatten().tolist()}))
    packed, loose = read_digits(str(tmp_path / "d.npz")), read_digits(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(packed, loose, strict=True))
    assert packed[1].tolist() == [0, 3]
    assert read_digits(str(tmp_path / "nameless.npz"))[1] is None
    with pytest.raises(ValueError, match="holds no digits"):
        read_digits(str(tmp_path / "none.npz"))


def test_the_neighbour_table_tells_a_copy_from_an_estimate():
    x_0 = torch.randn(6, 5, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def says(answer):
        """A noise estimate that comes to `answer` as the clean clip."""

        def model(x, t, y):
            alpha, sigma = (level.float() for level in PLAIN.levels(t))
            return (x - alpha * answer) / sigma.clamp(min=1e-6)

        return model

    right = neighbour_table(says(x_0), PLAIN, x_0, seed=1).numpy()
    copied = neighbour_table(says(torch.roll(x_0, -1, dims=1)), PLAIN, x_0, seed=1).numpy()
    assert right.shape == (6, len(OWN), len(LEVELS), 3)
    assert np.abs(right[..., [0, 2]]).max() < 1e-3
    np.testing.assert_allclose(copied[..., 0], copied[..., 1], rtol=1e-3)
    np.testing.assert_allclose(copied[..., 2], 1, atol=1e-3)


def test_the_neighbour_table_is_made_where_the_latents_are():
    """The meta device stands for a GPU: it too refuses tensors of the CPU."""
    x_0, hidden = torch.zeros(2, 5, 2, 4, 4, device="meta"), torch.full((2,), 7, device="meta")
    classes = []

    def model(x, t, y):
        classes.append(y)
        return x * t[..., None, None, None]

    table = neighbour_table(model, Diffusion(PLAIN.config), x_0, 1, hidden)
    assert table.device.type == "meta"
    assert table.shape == (2, len(OWN), len(LEVELS), 3)
    assert all(y is hidden for y in classes)
