"""The map from pixel frames to latent frames: its properties for every stride and length."""

import pytest

from fvdm.media.frames import FrameMap
from fvdm.media.vae import load_vae

STRIDES = (1, 2, 4, 6, 8)


@pytest.mark.parametrize("stride", STRIDES)
def test_there_and_back(stride):
    frame_map = FrameMap(stride)
    for latents in range(50):
        pixels = frame_map.pixel_frames(latents)
        assert frame_map.latent_frames(pixels) == latents
        assert frame_map.is_valid(pixels) == (latents > 0)


@pytest.mark.parametrize("stride", STRIDES)
def test_latent_frames_is_the_most_that_the_pixels_cover(stride):
    frame_map = FrameMap(stride)
    for pixels in range(100):
        latents = frame_map.latent_frames(pixels)
        assert frame_map.pixel_frames(latents) <= pixels < frame_map.pixel_frames(latents + 1)
        assert frame_map.is_valid(pixels) == (pixels > 0 and frame_map.pixel_frames(latents) == pixels)


@pytest.mark.parametrize("stride", STRIDES)
def test_spans_cover_every_pixel_frame_once_in_order(stride):
    frame_map = FrameMap(stride)
    covered = [frame for latent in range(20) for frame in frame_map.span(latent)]
    assert covered == list(range(frame_map.pixel_frames(20)))
    assert frame_map.span(0) == range(1)
    assert all(frame_map.span(i) == range(stride * (i - 1) + 1, stride * i + 1) for i in range(1, 20))


def test_stride_one_is_one_to_one():
    assert all(FrameMap().span(i) == range(i, i + 1) for i in range(20))
    assert all(FrameMap().latent_frames(n) == FrameMap().pixel_frames(n) == n for n in range(20))
    assert all(FrameMap().is_valid(n) for n in range(1, 20))


def test_81_frames_at_a_stride_of_4_are_21_latents():
    assert FrameMap(4).latent_frames(81) == 21
    assert FrameMap(4).span(20) == range(77, 81)


@pytest.mark.parametrize("stride", [0, -1])
def test_a_stride_below_one_is_refused(stride):
    with pytest.raises(ValueError, match="at least 1"):
        FrameMap(stride)


def test_the_builtin_vae_is_one_to_one():
    assert load_vae().frame_map == FrameMap(1)
