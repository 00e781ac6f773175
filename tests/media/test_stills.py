"""Still images of every kind through the one reader, judged by content and not by name."""

import numpy as np
import pytest
from PIL import Image

from fvdm.generation.inputs import read_source
from fvdm.media.layouts import list_videos
from fvdm.media.stills import frame_files, kind_of, read_still
from fvdm.media.videos import Preprocess, VideoError, count_frames, read_video
from tests.data_fixtures import cut, write_video

PICTURE = cut(0)[0]


def save(path, pixels=PICTURE, mode=None, **options):
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("format_", "options", "error"),
    [
        ("png", {}, 0),
        ("tiff", {}, 0),
        ("bmp", {}, 0),
        ("ppm", {}, 0),
        ("jpeg", {"quality": 95}, 8),
        ("webp", {"quality": 95}, 8),
        ("webp", {"lossless": True}, 0),
        ("avif", {"quality": 95}, 8),
        ("gif", {}, 40),
        ("jpeg2000", {}, 8),
    ],
)
@pytest.mark.parametrize("name", ["a", "a.jfif", "a.xyz", "a.mp4", "a.webp"])
def test_a_still_is_one_frame_without_a_rate_whatever_its_name(tmp_path, format_, options, error, name):
    path = save(tmp_path / name, format=format_, **options)
    assert kind_of(path) == "image"
    assert np.abs(read_still(path).astype(int) - PICTURE).mean() <= error
    source = read_source(str(path), 64)
    assert len(source.frames) == 1
    assert source.fps is None
    assert source.side == (176, 144)
    assert count_frames(path) == 1


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("P", "png"), ("P", "gif"), ("RGBA", "png"), ("RGBA", "webp"), ("LA", "png"), ("CMYK", "jpg"), ("CMYK", "tif")],
)
def test_palettes_alpha_and_ink_become_rgb(tmp_path, mode, suffix):
    path = save(tmp_path / f"a.{suffix}", mode=mode)
    expected = PICTURE if mode != "LA" else np.asarray(Image.fromarray(PICTURE).convert("L"))[..., None]
    assert np.abs(read_still(path).astype(int) - expected).mean() < (
        20 if mode == "P" else 12
    )  # the palette is that of the web


def ramp16():
    return (np.arange(64, dtype=np.uint32)[None].repeat(48, 0) * 1040).astype(np.uint16)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_of_grey_keep_their_upper_eight(tmp_path, suffix):
    path = save(tmp_path / f"a.{suffix}", ramp16())
    assert np.array_equal(read_still(path), (ramp16() >> 8).astype(np.uint8)[..., None].repeat(3, 2))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("pixel_format", ["rgb48le", "rgba64le"])
def test_sixteen_bits_of_colour_keep_their_upper_eight(tmp_path, suffix, pixel_format):
    import av

    if suffix == "png":
        pixel_format = pixel_format.replace("le", "be")
    pixels = np.stack([ramp16(), ramp16()[:, ::-1], ramp16()], 2)
    if "a" in pixel_format:
        pixels = np.concatenate([pixels, np.full_like(pixels[..., :1], 65535)], 2)
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream(suffix, rate=1)
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = pixel_format
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format=pixel_format)))
        container.mux(stream.encode())
    assert np.abs(read_still(path).astype(int) - (pixels[..., :3] >> 8)).max() <= 1


def test_floating_point_pixels_are_refused(tmp_path):
    path = save(tmp_path / "a.tif", np.zeros((8, 8), np.float32))
    with pytest.raises(VideoError, match=r"'a\.tif' cannot be decoded: its pixels are floating-point"):
        read_still(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_the_side_is_that_of_the_upright_image(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    path = save(tmp_path / f"a.{suffix}", exif=exif)
    undo = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda x: np.rot90(x),
    }[orientation]
    assert np.abs(read_still(path).astype(int) - undo(PICTURE)).mean() < 8
    assert read_source(str(path), 64).side == ((176, 144) if orientation < 5 else (144, 176))


@pytest.mark.parametrize("suffix", ["webp", "gif", "png", "avif"])
@pytest.mark.parametrize("milliseconds", [100, 40])
def test_an_animated_image_is_a_video(tmp_path, suffix, milliseconds):
    frames = [Image.fromarray(frame) for frame in cut(0, 12)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    assert kind_of(tmp_path / f"a.{suffix}") == "animation"
    *_, info = read_video(tmp_path / f"a.{suffix}", 64, Preprocess(min_frames=1), 64)
    assert info.frames == 12
    assert info.fps == 1000 / milliseconds
    assert count_frames(tmp_path / f"a.{suffix}") == 12
    (tmp_path / "plain").write_bytes((tmp_path / f"a.{suffix}").read_bytes())
    assert len(read_source(str(tmp_path / "plain"), 64).frames) == 12


@pytest.mark.parametrize("suffix", [".webp", ".avif", ".jfif", ".png", ""])
def test_folders_of_any_image_are_videos(tmp_path, suffix):
    (tmp_path / "v" / "clip").mkdir(parents=True)
    for number, frame in enumerate(cut(0, 12)):
        format_ = {"": "png", ".jfif": "jpeg"}.get(suffix, suffix[1:])
        save(tmp_path / "v" / "clip" / f"f{number}{suffix}", frame, format=format_)
    (tmp_path / "v" / "clip" / "notes.txt").write_text("no frame")
    listing = list_videos(tmp_path / "v")
    assert [(source.name, source.kind) for source in listing.sources] == [("clip", "frames")]
    assert len(frame_files(tmp_path / "v" / "clip", "natural")) == 12
    frames = read_source(str(tmp_path / "v" / "clip"), 144).frames.float()
    expected = np.stack([frame[:, 16:160].transpose(2, 0, 1) for frame in cut(0, 12)])
    assert np.abs(frames.numpy() - expected).mean() < 8


def test_an_image_beside_a_video_of_its_name_is_no_frame(tmp_path):
    for name in ("a", "b", "c"):
        write_video(tmp_path / f"{name}.mp4", cut(0)[:, ::2, ::2])
        save(tmp_path / f"{name}.webp")
    listing = list_videos(tmp_path)
    assert [source.name for source in listing.sources] == ["a.mp4", "b.mp4", "c.mp4"]
    assert listing.ignored["image beside a video of its name"] == 3


def test_what_is_no_image_has_a_reason(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(VideoError, match=r"'a\.png' cannot be decoded: not an image"):
        read_still(tmp_path / "a.png")
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    assert kind_of(tmp_path / "a.heic") == "image"
    with pytest.raises(ValueError, match=r"a HEIC image.*save it as JPEG or PNG"):
        read_source(str(tmp_path / "a.heic"), 64)
    with pytest.raises(OSError, match="none"):
        kind_of(tmp_path / "none")
