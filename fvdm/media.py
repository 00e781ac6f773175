"""Videos as people look at them: mp4 and gif files, and one picture of many frames. The only place that writes them.

The same frames give the same bytes: ranks that share the work write the files that one alone would have written.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

EXACT = {"fflags": "bitexact"}  # no random numbers in a file's header


def write_mp4(video: Tensor, path: Path, fps: float = 8.0) -> None:
    """Write a clip as H.264, near lossless, playable in every browser.

    Args:
        video: uint8 `(f 3 h w)`; odd sides lose their last row or column.
        path: the file, written under a temporary name first.
        fps: frames per second.
    """
    # With mbtree, x264's AVX-512 code reads memory it has not written: the same frames gave several files.
    _write_video(video, path, fps, "mp4", "libx264", {"crf": "12", "mbtree": "0"})


def write_webm(video: Tensor, path: Path, fps: float = 8.0) -> None:
    """Write a clip as VP9, near lossless; see `write_mp4`."""
    _write_video(video, path, fps, "webm", "libvpx-vp9", {"crf": "15", "b": "0", "deadline": "good", "cpu-used": "4"})


def _write_video(video: Tensor, path: Path, fps: float, container: str, codec: str, options: dict[str, object]) -> None:
    import av

    temporary = path.with_name(f".tmp-{path.name}")
    height, width = (side // 2 * 2 for side in video.shape[2:])
    with av.open(str(temporary), "w", format=container, options=EXACT) as file:
        stream = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = options
        stream.thread_count = 1  # With more, the bytes of a file depend on how the threads were scheduled.
        for frame in rearrange(video, "f c h w -> f h w c").cpu().numpy():
            picture = av.VideoFrame.from_ndarray(frame[:height, :width].copy(), format="rgb24")
            file.mux(stream.encode(picture))
        file.mux(stream.encode())
    temporary.rename(path)


def write_frames(video: Tensor, path: Path, fps: float = 8.0) -> None:
    """Write a clip, uint8 `(f 3 h w)`, as a folder of numbered PNG files; these have no rate."""
    from PIL import Image

    path.mkdir(parents=True, exist_ok=True)
    for k, frame in enumerate(rearrange(video, "f c h w -> f h w c").cpu().numpy()):
        temporary = path / f".tmp-{k:05d}.png"
        Image.fromarray(frame).save(temporary, "PNG")
        temporary.rename(path / f"{k:05d}.png")


def write_gif(video: Tensor, path: Path, fps: float = 8.0) -> None:
    """Write a clip, uint8 `(f 3 h w)`, as an animated gif that repeats for ever."""
    from PIL import Image

    frames = [Image.fromarray(f) for f in rearrange(video, "f c h w -> f h w c").cpu().numpy()]
    temporary = path.with_name(f".tmp-{path.name}")
    frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    temporary.rename(path)


def write_strips(videos: Tensor, path: Path, columns: int = 8, rows: int = 1) -> None:
    """Write clips, uint8 `(b f 3 h w)`, as one PNG: each as `rows` times `columns` frames spread over its length."""
    from PIL import Image

    count = min(rows * columns, videos.shape[1])
    chosen = videos[:, torch.linspace(0, videos.shape[1] - 1, count).round().long()]
    columns = min(columns, count)
    missing = rows * columns - count
    chosen = torch.cat([chosen, chosen.new_zeros((len(chosen), missing, *chosen.shape[2:]))], dim=1)
    picture = rearrange(chosen, "b (r f) c h w -> (b r h) (f w) c", r=rows).cpu().numpy()
    temporary = path.with_name(f".tmp-{path.name}")
    Image.fromarray(picture).save(temporary, "PNG")
    temporary.rename(path)


def card(clips: int) -> tuple[int, int]:
    """Rows and columns of frames for each of some clips that together make a near-square picture, as MLflow's cards."""
    shapes = [(r, c) for r in range(1, 5) for c in range(1, 13) if 5 <= r * c <= 12]
    return min(shapes, key=lambda shape: abs(math.log(shape[1] / (clips * shape[0]))))


def tile(videos: Sequence[Tensor]) -> Tensor:
    """Clips of one size side by side in a near-square grid: `n x (f 3 h w) -> (f 3 H W)`; empty places are black."""
    stack = torch.stack(list(videos))
    columns = max(1, round(len(stack) ** 0.5))
    missing = -len(stack) % columns
    stack = torch.cat([stack, stack.new_zeros((missing, *stack.shape[1:]))])
    return rearrange(stack, "(r q) f c h w -> f c (r h) (q w)", q=columns)


WRITERS: dict[str, Callable[[Tensor, Path, float], None]] = {
    "mp4": write_mp4,
    "gif": write_gif,
    "webm": write_webm,
    "frames": write_frames,
}
"""Format -> `(video, path, fps)`; `frames` writes a folder, the others a file."""
