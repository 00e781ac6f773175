"""How one frame is scaled and cropped, and the records that all readers share."""

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from fvdm.config import FORMER_NAMES

MAX_PIXELS = 64_000_000  # per video frame; a corrupt header can promise any size
MAX_ASPECT = 16  # longer to shorter side
_LOST = frozenset([errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EHOSTDOWN])  # disk or network
_REFUSED = frozenset([errno.EACCES, errno.EPERM, errno.ENOENT, errno.EMFILE, errno.ENFILE])  # whatever is in the file


@dataclass(frozen=True)
class Preprocess:
    """How frames become squares, and what else is stored. All of it is written into the manifest.

    Attributes:
        resize: `shorter-side` scales the shorter side to the size, then crops the centre; `centre-square`
            crops the largest centred square, then scales it. They differ by less than a pixel.
        antialias: low-pass before shrinking. The papers' code does not; larger videos look better with it.
        flip: also store a horizontally flipped copy (a flipped latent is not the latent of a flipped frame).
        min_frames: shorter videos are rejected, in frames.
        frame_order: order of a frame folder: `underscore` by the integer after the last underscore, `natural`
            by name with numbers compared as numbers.
        keep_corrupt: store the frames of videos for which the decoder reports errors, instead of rejecting
            them.
    """

    resize: Literal["shorter-side", "centre-square"] = "shorter-side"
    antialias: bool = False
    flip: bool = False
    min_frames: int = 16
    frame_order: Literal["natural", "underscore"] = "natural"
    keep_corrupt: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocess":
        """The preprocessing that a manifest or a plan states, in present or former names of settings."""
        return cls(**{FORMER_NAMES.get(name, name): value for name, value in values.items()})


class VideoError(Exception):
    """A video that cannot be used; the message is the reason, one line.

    Attributes:
        corrupt: parts of the file may be good, and `keep_corrupt` reads them.
        unread: the file could not be read; its content may be good.
    """

    def __init__(self, reason: str, cause: Exception | None = None, *, corrupt: bool = False) -> None:
        """`cause` is the error behind it, if there is one."""
        super().__init__(reason)
        self.corrupt = corrupt
        self.unread = isinstance(cause, OSError) and cause.errno in _LOST | _REFUSED


@dataclass(frozen=True)
class Info:
    """What is known of a video after reading it.

    Attributes:
        fps: frames per second; None if unknown.
        frames: number of frames.
        side: (width, height) of the first frame as a player shows it: upright, with square pixels.
        notes: what was done to the video beyond scaling and cropping, a sentence each.
    """

    fps: float | None
    frames: int
    side: tuple[int, int] = field(default=(0, 0), compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)


class Frame(NamedTuple):
    """A decoded frame, upright.

    Attributes:
        pixels: uint8 (h w 3).
        side: (width, height) that a player shows, which differs from the shape if pixels are not square.
    """

    pixels: np.ndarray
    side: tuple[int, int]


def frame_of(pixels: np.ndarray) -> Frame:
    """A frame of square pixels, uint8 (h w 3)."""
    return Frame(pixels, (pixels.shape[1], pixels.shape[0]))


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width); one number is a square."""
    return (size, size) if isinstance(size, int) else size


def one_spelling(shape: tuple[int, int]) -> int | tuple[int, int]:
    """The side of a square, or (height, width): sizes compare equal however they were written."""
    return shape[0] if shape[0] == shape[1] else shape


def to_square(frame: np.ndarray, size: int, preprocess: Preprocess, side: tuple[int, int] | None = None) -> np.ndarray:
    """A frame as a square of `size` pixels, uint8 (3 size size); see `to_size`."""
    return to_size(frame, sides(size), preprocess, side)


def to_size(
    frame: np.ndarray, size: tuple[int, int], preprocess: Preprocess, side: tuple[int, int] | None = None
) -> np.ndarray:
    """Scales and crops one frame, bilinear, so that it fills a rectangle.

    Args:
        frame: uint8 (h w 3).
        size: (height, width) of the result, in pixels.
        preprocess: order of scaling and cropping, and the filter; its "shorter side" is the one that fits exactly.
        side: (width, height) of the frame in square pixels, if its own pixels are not square.

    Returns:
        uint8 (3 *size).

    Raises:
        VideoError: if one side is more than 16 times as long as the other.
    """
    rows, columns = frame.shape[:2]
    width, height = side or (columns, rows)
    h, w = size
    if min(height, width, rows, columns) < 1 or max(height, width) > MAX_ASPECT * min(height, width):
        raise VideoError(f"a frame of {width}x{height}: sides must be within {MAX_ASPECT} to 1")
    wider = width * h >= height * w
    if preprocess.resize == "centre-square":
        region = (rows, columns * height * w / (width * h)) if wider else (rows * width * h / (height * w), columns)
        crop_rows, crop_columns = max(1, round(region[0])), max(1, round(region[1]))
        top, left = (rows - crop_rows) // 2, (columns - crop_columns) // 2
        frame = frame[top : top + crop_rows, left : left + crop_columns]
        target = (h, w)
    elif wider:
        target = (h, max(w, round(width * h / height)))
    else:
        target = (max(h, round(height * w / width)), w)
    pixels = torch.from_numpy(np.array(frame, order="C")).permute(2, 0, 1)[None]
    if target != pixels.shape[2:]:
        pixels = torch.nn.functional.interpolate(
            pixels, target, mode="bilinear", align_corners=False, antialias=preprocess.antialias
        )
    top, left = (target[0] - h) // 2, (target[1] - w) // 2
    return pixels[0, :, top : top + h, left : left + w].contiguous().numpy()
