"""The built-in VAE and the door to all others: pictures to latents and back, scaling, identity, refusals."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from fvdm.media.vae import BUILTIN, VAE, Normalisation, load_vae, sample_latents
from tests.data_fixtures import make_vae

HELD_OUT = {"street": ("vtest_0", "vtest_3", "vtest_6"), "photograph": ("fruits",)}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def vae() -> VAE:
    return load_vae()


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Real frames that the VAE never saw: uint8 (4 3 128 128)."""
    names = [name for group in HELD_OUT.values() for name in group]
    arrays = [np.array(Image.open(Path(__file__).parents[1] / "data" / f"{name}.png")) for name in names]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


@pytest.fixture
def copied(tmp_path) -> Path:
    """The built-in VAE's folder, to spoil."""
    return Path(shutil.copytree(BUILTIN, tmp_path / "vae"))


def configure(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def scale_weights(folder: Path, name: str, by: float) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / WEIGHTS)
    weights[name] *= by
    save_file(weights, folder / WEIGHTS)


def psnr(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """In dB, of each picture (n 3 h w) -> (n)."""
    return 10 * torch.log10(255**2 / (made.float() - wanted.float()).square().flatten(1).mean(1))


def test_held_out_real_frames_come_back(vae, pictures):
    made = psnr(vae.decode(vae.encode_mean(pictures)), pictures)
    street, photograph = made.split([len(group) for group in HELD_OUT.values()])
    assert street.mean() >= 27
    assert photograph.mean() >= 27


def test_shapes_and_types(vae, pictures):
    moments = vae.encode(pictures)
    side = 128 // vae.factor
    assert moments.shape == (4, 2 * vae.channels, side, side)
    assert moments.dtype == torch.float32
    back = vae.decode(torch.zeros(2, vae.channels, 4, 6))
    assert back.shape == (2, 3, 4 * vae.factor, 6 * vae.factor)
    assert back.dtype == torch.uint8


def test_nothing_is_trained(vae, pictures):
    assert not any(parameter.requires_grad for parameter in vae.model.parameters())
    assert not vae.model.training
    assert not vae.encode(pictures[:1]).requires_grad


def test_leading_axes_are_kept(vae, pictures):
    pictures = pictures[..., :64, :64]
    moments = vae.encode(pictures.reshape(2, 2, 3, 64, 64))
    torch.testing.assert_close(moments.flatten(0, 1), vae.encode(pictures))
    latents = sample_latents(moments, vae.normalisation, None)
    assert torch.equal(vae.decode(latents).flatten(0, 1), vae.decode(latents.flatten(0, 1)))
    assert vae.encode(pictures[0]).shape == moments.shape[2:]


def test_chunks_change_nothing(vae, pictures):
    latents = vae.encode_mean(pictures[..., :64, :64])
    whole = vae.decode(latents, chunk=100).int()
    for chunk in (1, 3):
        assert (vae.decode(latents, chunk=chunk).int() - whole).abs().max() <= 1  # the last bit of a float may round


def test_latents_have_unit_variance(vae, pictures):
    latents = vae.encode_mean(pictures)
    deviation = latents.std(dim=(0, 2, 3))
    assert ((deviation > 0.5) & (deviation < 2)).all()
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1


def test_sample_latents_is_the_scaled_posterior():
    normalisation = Normalisation(shift=(1.0, 2.0), scale=(0.5, 4.0))
    moments = torch.randn(3, 5, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(3, 5, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    mean, log_variance = moments[:, :, :2], moments[:, :, 2:]
    for given, z in ((None, mean), (noise, mean + log_variance.exp().sqrt() * noise)):
        wanted = torch.stack([(z[:, :, 0] - 1) * 0.5, (z[:, :, 1] - 2) * 4], dim=2)
        torch.testing.assert_close(sample_latents(moments, normalisation, given), wanted)


def test_normalisation_there_and_back(vae):
    z = torch.randn(2, 3, vae.channels, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(vae.normalisation.invert(vae.normalisation.apply(z)), z)
    assert Normalisation.from_dict(json.loads(json.dumps(vae.normalisation.to_dict()))) == vae.normalisation


def test_scaling_factor_and_shift_of_other_vaes(tmp_path):
    folder = make_vae(tmp_path)
    configure(folder, scaling_factor=0.25, shift_factor=0.5)
    assert load_vae(str(folder)).normalisation == Normalisation((0.5,), (0.25,))
    configure(folder, scaling_factor=0.18215, shift_factor=None)
    assert load_vae(str(folder)).normalisation == Normalisation((0.0,), (0.18215,))


def test_a_folder_is_the_same_vae(vae, pictures, copied):
    other = load_vae(str(copied))
    assert other.name == str(copied)
    assert other.identity == vae.identity
    assert torch.equal(other.encode(pictures[:1]), vae.encode(pictures[:1]))


def test_identity_tells_weights_and_scaling(vae, copied):
    scale_weights(copied, "decoder.conv_out.weight", 1.01)
    trained_on = load_vae(str(copied)).identity
    configure(copied, latents_std=[2.0] * vae.channels)
    rescaled = load_vae(str(copied)).identity
    assert len({vae.identity, trained_on, rescaled}) == 3
    assert all(len(identity) == len("sha256:") + 64 for identity in (vae.identity, trained_on, rescaled))


def test_log_variance_is_bounded(vae, copied, pictures):
    scale_weights(copied, "quant_conv.bias", 1e6)
    log_variance = load_vae(str(copied)).encode(pictures[:1]).chunk(2, dim=1)[1]
    assert log_variance.min() >= -30
    assert log_variance.max() <= 20


def test_it_is_small():
    assert sum(path.stat().st_size for path in BUILTIN.iterdir()) <= 8e6


@pytest.mark.parametrize("name", ["bultin", "no/such/folder", "./nowhere", ""])
def test_an_unknown_name_is_refused_without_the_hub(name, monkeypatch):
    from diffusers import AutoencoderKL

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match=f"cannot load the VAE '{name}': give builtin.*no such folder"):
        load_vae(name)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("weights cut short", lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5000])),
        ("weights missing", lambda folder: (folder / WEIGHTS).unlink()),
        ("no JSON", lambda folder: (folder / "config.json").write_text("{")),
        ("weights of another shape", lambda folder: configure(folder, block_out_channels=[16, 32, 32])),
        ("means of another number", lambda folder: configure(folder, latents_mean=[0.0], latents_std=[1.0])),
    ],
)
def test_a_broken_folder_is_refused(name, spoil, copied):
    spoil(copied)
    with pytest.raises(ValueError, match="cannot load the VAE") as refusal:
        load_vae(str(copied))
    assert "\n" not in str(refusal.value)


def test_unfit_pictures_and_latents_are_refused(vae):
    with pytest.raises(ValueError, match="multiples of"):
        vae.encode(torch.zeros(1, 3, 32, 32 + vae.factor - 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="3 channels"):
        vae.encode(torch.zeros(1, 1, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8"):
        vae.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="channels"):
        vae.decode(torch.zeros(1, vae.channels + 1, 4, 4))


@pytest.mark.parametrize("attention", [True, False])
def test_fewer_passes_leave_every_bit(attention):
    """Against diffusers' own forward, in the same memory format; with channels that change, and with attention."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    model = AutoencoderKL(
        **blocks, block_out_channels=[8, 16], norm_num_groups=4, mid_block_add_attention=attention, layers_per_block=1
    )
    theirs = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
    ours = VAE("ours", model, torch.device("cpu"), torch.float32).model
    pictures, latents = (
        torch.randn(2, c, 24, 24).contiguous(memory_format=torch.channels_last)
        for c in (3, model.config.latent_channels)
    )
    with torch.no_grad():
        parameters = [vae.encode(pictures.clone()).latent_dist.parameters for vae in (ours, theirs)]
        assert torch.equal(*parameters)
        assert torch.equal(ours.decode(latents).sample, theirs.decode(latents).sample)
