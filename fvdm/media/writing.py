"""Videos as people look at them: mp4 and gif files, and one image of many frames. The only place that writes them.

The same frames give the same bytes: ranks that share the work write the files that one alone would have written.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from itertools import count
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from fvdm.files import atomic_write

EXACT = {"fflags": "bitexact"}  # no random numbers in a file's header
GIF_RATE = 50  # frames per second; of faster ones, viewers make slow ones

Put = Callable[[Tensor], None]
"""Takes the next frame, uint8 `(3 h w)`."""


def _picture(frame: Tensor) -> np.ndarray:
    return np.ascontiguousarray(rearrange(frame, "c h w -> h w c").cpu().numpy())


def open_mp4(path: Path, fps: float = 8.0) -> AbstractContextManager[Put]:
    """Open an H.264 file, near lossless, playable in every browser; odd sides lose their last row or column."""
    # With mbtree, x264's AVX-512 code reads memory it has not written: the same frames gave several files.
    return _open_video(path, fps, "mp4", "libx264", {"crf": "12", "mbtree": "0"})


def open_webm(path: Path, fps: float = 8.0) -> AbstractContextManager[Put]:
    """Open a VP9 file, near lossless; see `open_mp4`."""
    return _open_video(path, fps, "webm", "libvpx-vp9", {"crf": "15", "b": "0", "deadline": "good", "cpu-used": "4"})


@contextmanager
def _open_video(path: Path, fps: float, container: str, codec: str, options: dict[str, object]) -> Iterator[Put]:
    import av

    with atomic_write(path) as temporary, av.open(str(temporary), "w", format=container, options=EXACT) as file:
        stream = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        assert isinstance(stream, av.VideoStream)
        stream.pix_fmt, stream.options = "yuv420p", options
        stream.thread_count = 1  # With more, the bytes of a file depend on how the threads were scheduled.

        def put(frame: Tensor) -> None:
            height, width = (side // 2 * 2 for side in frame.shape[1:])
            if not stream.codec_context.is_open:
                stream.width, stream.height = width, height
            picture = av.VideoFrame.from_ndarray(_picture(frame[:, :height, :width]), format="rgb24")
            file.mux(stream.encode(picture))

        yield put
        file.mux(stream.encode())


@contextmanager
def open_frames(path: Path, fps: float = 8.0) -> Iterator[Put]:
    """Open a folder of numbered PNG files, each written at once; they have no rate."""
    from PIL import Image

    path.mkdir(parents=True, exist_ok=True)
    numbers = count()

    def put(frame: Tensor) -> None:
        with atomic_write(path / f"{next(numbers):05d}.png") as temporary:
            Image.fromarray(_picture(frame)).save(temporary, "PNG")

    yield put


def gif_stride(fps: float) -> int:
    """Every how many frames a gif shows one: its unit is 1/100 s, and viewers do not show frames of a single unit."""
    return max(1, math.ceil(fps / GIF_RATE))


@contextmanager
def open_gif(path: Path, fps: float = 8.0) -> Iterator[Put]:
    """Open an animated gif that loops forever; above 50 frames per second it has every `gif_stride`-th frame."""
    from PIL import GifImagePlugin, Image

    every, numbers = gif_stride(fps), count()
    with atomic_write(path) as temporary, temporary.open("wb") as file:

        def put(frame: Tensor) -> None:
            number = next(numbers)
            if number % every:
                return
            # Rounded where a frame begins and ends, so that errors do not add up.
            begin, end = (round(100 * k / fps) for k in (number, number + every))
            image = Image.fromarray(_picture(frame)).convert("P", palette=Image.Palette.ADAPTIVE)
            if not number:
                file.writelines(GifImagePlugin.getheader(image, info={"loop": 0})[0])
            file.writelines(GifImagePlugin.getdata(image, duration=10 * (end - begin), include_color_table=True))

        yield put
        file.write(b";")


FORMATS: dict[str, Callable[[Path, float], AbstractContextManager[Put]]] = {
    "mp4": open_mp4,
    "gif": open_gif,
    "webm": open_webm,
    "frames": open_frames,
}
"""Format -> `(path, fps)`, a context that takes frames as they come; `frames` makes a folder, the others a file."""


def write(video: Iterable[Tensor], path: Path, fps: float = 8.0, form: str = "mp4") -> None:
    """Write a clip, uint8 `(f 3 h w)` or its frames one by one, in a format of `FORMATS`."""
    with FORMATS[form](path, fps) as put:
        for frame in video:
            put(frame)


def write_mp4(video: Iterable[Tensor], path: Path, fps: float = 8.0) -> None:
    """Write a clip, uint8 `(f 3 h w)`, as `open_mp4` does."""
    write(video, path, fps)


def write_gif(video: Iterable[Tensor], path: Path, fps: float = 8.0) -> None:
    """Write a clip, uint8 `(f 3 h w)`, as `open_gif` does."""
    write(video, path, fps, "gif")


def spread(length: int, number: int) -> list[int]:
    """Indices of up to `number` frames spread over a clip, with both ends."""
    return torch.linspace(0, length - 1, min(number, length)).round().long().tolist()


def write_strips(videos: Tensor, path: Path, columns: int = 8, rows: int = 1) -> None:
    """Write clips, uint8 `(b f 3 h w)`, as one PNG: each as `rows` times `columns` frames spread over its length."""
    from PIL import Image

    chosen = videos[:, spread(videos.shape[1], rows * columns)]
    columns = min(columns, chosen.shape[1])
    missing = rows * columns - chosen.shape[1]
    chosen = torch.cat([chosen, chosen.new_zeros((len(chosen), missing, *chosen.shape[2:]))], dim=1)
    picture = rearrange(chosen, "b (r f) c h w -> (b r h) (f w) c", r=rows).cpu().numpy()
    with atomic_write(path) as temporary:
        Image.fromarray(picture).save(temporary, "PNG")


def card(clips: int) -> tuple[int, int]:
    """Rows and columns of frames for each of some clips that together make a near-square image, as MLflow's cards."""
    shapes = [(r, c) for r in range(1, 5) for c in range(1, 13) if 5 <= r * c <= 12]
    return min(shapes, key=lambda shape: abs(math.log(shape[1] / (clips * shape[0]))))


def tile(videos: Sequence[Tensor]) -> Tensor:
    """Clips of one size side by side in a near-square grid: `n x (f 3 h w) -> (f 3 H W)`; empty places are black."""
    stack = torch.stack(list(videos))
    columns = max(1, round(len(stack) ** 0.5))
    missing = -len(stack) % columns
    stack = torch.cat([stack, stack.new_zeros((missing, *stack.shape[1:]))])
    return rearrange(stack, "(r q) f c h w -> f c (r h) (q w)", q=columns)
