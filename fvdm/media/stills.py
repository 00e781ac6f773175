"""Images: what kind of file something is, judged by its content, and the one reader of still images.

A file whose suffix is that of a still image is taken for one without being opened, because a folder may hold a million
frames; a wrong one is reported when it is read. Every other file is judged by its first bytes.
"""

import os
import re
import warnings
from collections.abc import Iterator
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fvdm.media.preprocess import Frame, VideoError, frame_of

STILL_SUFFIXES = frozenset([".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".pgm", ".ppm", ".tif", ".tiff"])
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # that Pillow may open
HEAD = 189  # first bytes that tell what a file is
# The first bytes of videos, at the offset given.
_VIDEO_MAGIC = (
    (4, b"ftyp"),
    (8, b"AVI "),
    (0, b"\x1aE\xdf\xa3"),
    (0, b"FLV\x01"),
    (0, b"\0\0\1\xba"),
)
_IMAGE_MAGIC = (
    (0, b"\xff\xd8\xff"),
    (0, b"\x89PNG\r\n\x1a\n"),
    (0, b"II*\0"),
    (0, b"MM\0*"),
    (0, b"\0\0\0\x0cjP  "),
    (0, b"\xff\x4f\xff\x51"),
    (0, b"GIF8"),
)
_BRANDS = frozenset([b"avif", b"avis", b"mif1", b"heic", b"heix", b"heif", b"msf1", b"hevc", b"hevx"])
_HEIF = "a HEIC image, which cannot be decoded here: save it as JPEG or PNG"

Kind = Literal["image", "animation", "video"]


def kind_of(path: str | os.PathLike[str]) -> Kind | None:
    """What a file holds, by its content.

    Returns:
        `image`: one still image; `animation`: an image file of several frames; `video`: a container of videos; None
        if its first bytes are of nothing known.

    Raises:
        OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if _is_image(head):
        return "animation" if _is_animated(path, head) else "image"
    if head[:1] == head[HEAD - 1 :] == b"G":  # the packets of MPEG-TS
        return "video"
    return "video" if any(head[at : at + len(magic)] == magic for at, magic in _VIDEO_MAGIC) else None


def _is_image(head: bytes) -> bool:
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    if head[4:8] == b"ftyp":
        return head[8:12] in _BRANDS
    if re.match(rb"P[1-6]\s[\s\d#]", head):
        return True
    if head[:2] == b"BM":
        return len(head) > 26 and head[6:10] == b"\0\0\0\0" and head[15:18] == b"\0\0\0"
    return any(head[at : at + len(magic)] == magic for at, magic in _IMAGE_MAGIC)


def _is_animated(path: str | os.PathLike[str], head: bytes) -> bool:
    """A corrupt file counts as a still image: reading it gives the reason."""
    if not head.startswith((b"RIFF", b"GIF8", b"\x89PNG")) and head[4:8] != b"ftyp":
        return False  # the other pages of a TIFF, and the other eye of an MPO, are no frames of a video
    try:
        with _open(path) as image:
            return bool(getattr(image, "is_animated", False))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return head[8:12] in (b"avis", b"msf1")


def _open(path: str | os.PathLike[str]) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # photographs may be large; twice that raises
        Image.init()  # else formats that are named before they are registered raise KeyError
        return Image.open(path, formats=FORMATS)


def read_still(path: str | os.PathLike[str]) -> np.ndarray:
    """A still image as uint8 (h w 3): upright by its EXIF orientation, alpha dropped, 16 bits cut to the upper 8.

    Raises:
        VideoError: if it cannot be read or decoded; names the file.
    """
    name = os.path.basename(path)
    try:
        with _open(path) as image:
            if image.format == "PNG":
                image.verify()  # its checksums; loading the pixels does not look at all of them
        with _open(path) as image:
            return _rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = _unidentified(path) if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        raise VideoError(f"{name!a} cannot be decoded: {reason}", error) from None


def _unidentified(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        head = file.read(12)
    return _HEIF if head[4:8] == b"ftyp" and head[8:12] in _BRANDS - {b"avif", b"avis"} else "not an image"


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 (h w 3) of an image.

    Raises:
        ValueError: for numbers with a point, whose range is not known.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("P", "PA", "LA", "La", "RGBa"):
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def read_animation(path: str | os.PathLike[str]) -> Iterator[tuple[float, np.ndarray]]:
    """The frames of an animated image: time in seconds and uint8 (h w 3). Times alone are `animation_times`.

    Raises:
        VideoError: if it cannot be decoded.
    """
    try:
        with _open(path) as image:
            time = 0.0
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                image.load()
                yield time, _rgb(image)
                time += float(image.info.get("duration") or 100) / 1000
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise VideoError(f"cannot be decoded: {' '.join(str(error).split())}", error) from None


def is_frame(path: str) -> bool:
    """Whether a file of a folder is a frame of its video: a still image."""
    if os.path.splitext(path)[1].lower() in STILL_SUFFIXES:
        return True
    try:
        return os.path.isfile(path) and kind_of(path) == "image"
    except OSError:
        return False


def frame_files(folder: str | os.PathLike[str], order: str) -> list[str]:
    """Paths of the images in a folder, in the order of time.

    Args:
        folder: the folder; hidden files and files that are no images are left out.
        order: `natural` or `underscore`, see `Preprocess`.

    Raises:
        VideoError: the folder cannot be read, or a name has no number after its last underscore.
    """
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise VideoError(f"folder cannot be read: {error.strerror}", error) from None
    names = [name for name in names if name[0] != "." and is_frame(os.path.join(os.fspath(folder), name))]
    key = _after_underscore if order == "underscore" else _natural
    return [os.path.join(os.fspath(folder), name) for name in sorted(names, key=key)]


def _after_underscore(name: str) -> tuple[int, str]:
    number = os.path.splitext(name)[0].rpartition("_")[2]
    if not (number.isascii() and number.isdigit()):
        raise VideoError(f"{name!a}: no frame number after the last underscore")
    return int(number), name


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(int(part), "") if part[0] in "0123456789" else (-1, part) for part in parts], name


def folder_frames(folder: str | os.PathLike[str], order: str) -> Iterator[Frame]:
    """The frames of a folder of images, in order.

    Raises:
        VideoError: names the image that cannot be read.
    """
    for file in frame_files(folder, order):
        yield frame_of(read_still(file))
