"""Causal video VAEs: as diffusers encodes and decodes, clips and latents in step, and what is not known is refused.

The models are tiny and random; what counts is that frames, latents and scaling are those of diffusers.
"""

import json

import diffusers
import pytest
import torch

from fvdm.media.frames import FrameMap
from fvdm.media.vae import VAE, load_vae, sample_latents
from fvdm.media.vae_kinds import KINDS
from tests.data_fixtures import cut

WAN = {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
WAN_22 = {
    "base_dim": 6,
    "decoder_base_dim": 6,
    "z_dim": 8,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.1 * k for k in range(8)],
    "latents_std": [1 + 0.1 * k for k in range(8)],
    "temperal_downsample": [False, True, True],
}
BLOCKS = (8, 8, 8, 8)
MODELS = {
    "Wan 2.1": ("AutoencoderKLWan", WAN, 4, 8, 16),
    "Wan 2.2": ("AutoencoderKLWan", WAN_22, 4, 16, 8),
    "HunyuanVideo": (
        "AutoencoderKLHunyuanVideo",
        {"block_out_channels": BLOCKS, "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4},
        *(4, 8, 4),
    ),
    "LTX-Video": (
        "AutoencoderKLLTXVideo",
        {
            "latent_channels": 8,
            "block_out_channels": BLOCKS,
            "decoder_block_out_channels": BLOCKS,
            "layers_per_block": (1,) * 5,
            "decoder_layers_per_block": (1,) * 5,
            "scaling_factor": 0.5,
        },
        *(8, 32, 8),
    ),
    "CogVideoX": (
        "AutoencoderKLCogVideoX",
        {"block_out_channels": BLOCKS, "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4},
        *(4, 8, 4),
    ),
}
EXACT = ("Wan 2.1", "Wan 2.2")


def build(name: str) -> torch.nn.Module:
    class_name, config, *_ = MODELS[name]
    torch.manual_seed(0)
    return getattr(diffusers, class_name)(**config)


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """Name, our VAE loaded from a folder, and diffusers' own model."""
    model = build(request.param)
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return request.param, load_vae(str(folder)), model.eval()


def clip(frames: int, side: int = 64) -> torch.Tensor:
    """Real frames, uint8 (f 3 side side)."""
    return torch.from_numpy(cut(0, frames)[:, :side, :side].copy()).permute(0, 3, 1, 2)


def frames_of(case, latents: int) -> int:
    return case[1].frame_map.pixel_frames(latents)


def test_the_table_is_right(case):
    name, vae, _ = case
    _, _, stride, factor, channels = MODELS[name]
    assert (vae.frame_map, vae.factor, vae.channels) == (FrameMap(stride), factor, channels)


@pytest.mark.parametrize("latents", [1, 2, 3])
def test_encoding_is_that_of_diffusers(case, latents):
    _, vae, model = case
    frames = clip(frames_of(case, latents))
    moments = vae.encode(frames)
    assert moments.shape == (latents, 2 * vae.channels, 64 // vae.factor, 64 // vae.factor)
    with torch.no_grad():
        x = (frames.float() / 127.5 - 1).transpose(0, 1)[None]
        theirs = model.encode(x).latent_dist
    torch.testing.assert_close(moments[:, : vae.channels], theirs.mean[0].transpose(0, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments[:, vae.channels :], theirs.logvar[0].transpose(0, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("latents", [1, 3])
def test_decoding_is_that_of_diffusers(case, latents):
    _, vae, model = case
    z = torch.randn(latents, vae.channels, 2, 2, generator=torch.Generator().manual_seed(0))
    frames = vae.decode(z)
    assert frames.shape == (frames_of(case, latents), 3, 2 * vae.factor, 2 * vae.factor)
    unscaled = vae.normalisation.invert(z).transpose(0, 1)[None]
    with torch.no_grad():
        theirs = model.decode(unscaled).sample[0].transpose(0, 1)
    expected = ((theirs + 1) * 127.5).round().clamp(0, 255)
    assert (frames.float() - expected).abs().max() <= 1


def test_a_stored_clip_comes_back_as_diffusers_brings_it_back(case):
    _, vae, model = case
    frames = clip(frames_of(case, 3)) if vae.frame_map.stride < 8 else clip(9)
    ours = vae.decode(vae.encode_mean(frames)).float()
    with torch.no_grad():
        mean = model.encode((frames.float() / 127.5 - 1).transpose(0, 1)[None]).latent_dist.mean
        theirs = ((model.decode(mean).sample[0].transpose(0, 1) + 1) * 127.5).round().clamp(0, 255)
    assert (ours - theirs).abs().max() <= 1


def test_normalisation_is_that_of_the_pipelines(case):
    name, vae, model = case
    z = torch.randn(2, vae.channels, 2, 2)
    config = model.config
    if name.startswith("Wan"):
        mean, std = (torch.tensor(config[f"latents_{key}"])[:, None, None] for key in ("mean", "std"))
        expected = (z - mean) / std
    else:
        expected = z * config.scaling_factor  # LTX: its means are 0 and its deviations 1 until they are loaded
    torch.testing.assert_close(vae.normalisation.apply(z), expected)
    torch.testing.assert_close(vae.normalisation.invert(vae.normalisation.apply(z)), z)


def test_ltx_normalises_by_the_numbers_in_its_weights():
    model = build("LTX-Video")
    model.latents_mean.copy_(torch.arange(8.0))
    model.latents_std.copy_(torch.arange(1.0, 9.0))
    vae = VAE("ltx", model, torch.device("cpu"), torch.float32)
    z = torch.randn(1, 8, 2, 2)
    expected = (z - torch.arange(8.0)[:, None, None]) * 0.5 / torch.arange(1.0, 9.0)[:, None, None]
    torch.testing.assert_close(vae.normalisation.apply(z), expected)


def test_leading_axes_are_kept(case):
    _, vae, _ = case
    frames = clip(frames_of(case, 2))
    two = torch.stack([frames, frames.flip(-1)])
    moments = vae.encode(two)
    torch.testing.assert_close(moments[1], vae.encode(two[1]))
    latents = sample_latents(moments, vae.normalisation, None)
    assert torch.equal(vae.decode(latents)[1], vae.decode(latents[1]))
    assert vae.encode(frames[0]).shape == moments.shape[2:]
    assert vae.decode(latents[0, 0]).shape == frames.shape[1:]


@pytest.mark.parametrize("name", EXACT)
def test_a_shorter_clip_is_an_exact_prefix(name):
    vae = VAE(name, build(name), torch.device("cpu"), torch.float32)
    moments = vae.encode(clip(17))
    latents = sample_latents(moments, vae.normalisation, None)
    frames = vae.decode(latents)
    for count in (1, 2, 4):
        pixels = vae.frame_map.pixel_frames(count)
        assert torch.equal(vae.encode(clip(17)[:pixels]), moments[:count])
        assert torch.equal(vae.decode(latents[:count]), frames[:pixels])


@pytest.mark.parametrize("name", EXACT)
def test_a_stream_gives_the_frames_of_each_latent_as_it_comes(name):
    vae = VAE(name, build(name), torch.device("cpu"), torch.float32)
    z = torch.randn(2, 3, vae.channels, 2, 2, generator=torch.Generator().manual_seed(0))
    asked = []
    stream = vae.decode_stream(asked.append(k) or z[:, k] for k in range(3))
    parts = []
    for k, part in enumerate(stream):
        assert asked == list(range(k + 1))
        assert part.shape[1] == len(vae.frame_map.span(k))
        parts.append(part)
    assert (torch.cat(parts, dim=1).int() - vae.decode(z).int()).abs().max() <= 1


def test_an_image_vae_streams_frame_by_frame():
    vae = load_vae()
    z = torch.randn(1, 3, vae.channels, 4, 4, generator=torch.Generator().manual_seed(0))
    frames = torch.cat(list(vae.decode_stream(z.unbind(1))), dim=1)
    assert (frames.int() - vae.decode(z).int()).abs().max() <= 1


def test_a_clip_that_leaves_a_remainder_is_refused(case):
    _, vae, _ = case
    stride = vae.frame_map.stride
    with pytest.raises(ValueError, match=f"a clip of {stride} frames.*give 1 or {stride + 1} frames"):
        vae.encode(clip(stride))


def test_a_folder_of_a_pipeline_gives_its_vae(tmp_path):
    build("Wan 2.1").save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    assert load_vae(str(tmp_path)).identity == load_vae(str(tmp_path / "vae")).identity


def test_an_unknown_class_is_refused_with_the_table(tmp_path):
    build("Wan 2.1").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKLMochi"}))
    with pytest.raises(ValueError, match="of a AutoencoderKLMochi are not known") as refusal:
        load_vae(str(tmp_path))
    assert all(kind.name in str(refusal.value) for kind in KINDS)
    assert "\n" not in str(refusal.value)


def test_an_even_number_of_latents_of_cogvideox_follows_the_frame_map():
    vae = VAE("cog", build("CogVideoX"), torch.device("cpu"), torch.float32)
    z = torch.randn(1, 4, vae.channels, 2, 2, generator=torch.Generator().manual_seed(0))
    assert vae.decode(z).shape[1] == 13
    assert vae.decode(z[:, :2]).shape[1] == 5


PEAK = """
import sys, torch
from benchmarks.process_memory import peak
from fvdm.media.vae import load_vae
vae = load_vae(sys.argv[1])
latents = (torch.zeros(1, vae.channels, 8, 8) for _ in range(int(sys.argv[2])))
frames = sum(part.shape[1] for part in vae.decode_stream(latents))
vae.encode(torch.zeros(4 * int(sys.argv[2]) - 3, 3, 64, 64, dtype=torch.uint8))
print(frames, round(peak() / 2**20))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_clip(tmp_path):
    import subprocess
    import sys

    build("Wan 2.1").save_pretrained(tmp_path)
    peaks = []
    for latents in (20, 200):
        words = [sys.executable, "-c", PEAK, str(tmp_path), str(latents)]
        frames, peak = map(int, subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())
        assert frames == 4 * latents - 3
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 40, f"peak memory in MB: {peaks}"
