"""The protocols under which Fréchet video distances are published, as data: which frames of which videos count.

Pure: from the lengths of the videos, `select_real` and `select_fake` say which clips are taken. A number is
comparable with a published one only if it comes of the same protocol; docs/fvd.md has the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from fvdm.choices import one_of

LENGTHS = (16, 128)  # frames of the clips behind published distances
RESOLUTION = 256  # pixels of the videos behind them


def pixels(size: int | tuple[int, int]) -> str:
    """How large a frame is, in words: such as `256 pixels` of a square, `480 x 832 pixels` of another shape."""
    return f"{size if isinstance(size, int) else ' x '.join(map(str, size))} pixels"


class Clip(NamedTuple):
    """One clip: the number of its video, and the numbers of its frames."""

    video: int
    frames: tuple[int, ...]


@dataclass(frozen=True)
class Protocol:
    """How a distance is measured.

    Attributes:
        name: what it is called here.
        source: who published by it.
        real: most real clips, one of each video; 0 takes all.
        fake: generated clips.
        stride: every n-th frame of the real videos; generated ones are taken at 1.
        strides: another stride for a data set by name.
        order: which videos come first: in sorted order, in a random order, or spread evenly over the sorted order.
        offset: where a real clip begins: anywhere, or at the first frame.
        resize: how images come to the detector's 224 pixels; see `fvdm.evaluation.fvd.features`.
        ddof: covariances are divided by n - ddof.
        seed: of order and offset, unless another is asked for.
        split: the split of the data set that counts as real.
        repeats: draws of the clips, whose mean is published.
        equal: take as many real clips as generated ones.
    """

    name: str
    source: str
    real: int = 2048
    fake: int = 2048
    stride: int = 1
    strides: Mapping[str, int] = field(default_factory=dict)
    order: Literal["sorted", "random", "even"] = "sorted"
    offset: Literal["random", "first"] = "random"
    resize: Literal["direct", "short-side"] = "short-side"
    ddof: int = 0
    seed: int = 0
    split: str = "train"
    repeats: int = 1
    equal: bool = False

    def stride_on(self, dataset: str) -> int:
        """The stride of real clips of a data set."""
        return self.strides.get(dataset, self.stride)


_ALL = (
    Protocol("styleganv", "StyleGAN-V, fvd2048_16f; the FVDM paper's tables"),
    Protocol("latte", "Latte and the FVDM code", stride=3, strides={"taichi": 6}, order="random"),
    Protocol("tats", "TATS", strides={"taichi": 4}, order="random", resize="direct", ddof=1),
    Protocol("videogpt", "VideoGPT", 256, 256, order="random", ddof=1, split="test", repeats=4),
    Protocol("cdfvd", "cd-fvd", real=0, order="random", resize="direct", seed=42),
    Protocol("even", "ours, for small sets", order="even", offset="first", resize="direct", equal=True),
)
PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in _ALL}


def protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        ValueError: if there is none; lists those there are.
    """
    return PROTOCOLS[one_of("protocol", name, PROTOCOLS)]


def select_real(
    rules: Protocol, lengths: Sequence[int], frames: int, stride: int = 0, clips: int = 0, seed: int | None = None
) -> list[Clip]:
    """The real clips: one of each video that is long enough, at most as many as the protocol takes.

    The offset of a video's clip is a function of (seed, video), so it stays when other videos are added behind.

    Args:
        rules: the protocol.
        lengths: frames of each video, in the order of their sorted names.
        frames: frames of a clip.
        stride: every n-th frame; 0 is the protocol's.
        clips: most clips; 0 is the protocol's.
        seed: of order and offset; the protocol's when not given.

    Raises:
        ValueError: if fewer than two videos are long enough.
    """
    stride, seed = stride or rules.stride, rules.seed if seed is None else seed
    span = (frames - 1) * stride + 1
    usable = np.array([video for video, length in enumerate(lengths) if length >= span], dtype=np.int64)
    _enough(len(usable), lengths, f"{span} frames ({frames} at stride {stride})")
    count = min(len(usable), clips or rules.real or len(usable))
    taken = {
        "sorted": lambda: usable[:count],
        "random": lambda: usable[np.argsort(_raw(seed, 0, len(usable)), kind="stable")][:count],
        "even": lambda: usable[np.arange(count) * len(usable) // count],
    }[rules.order]()
    return [Clip(v, _frames(_offset(rules, seed, v, lengths[v] - span), frames, stride)) for v in taken.tolist()]


def select_fake(rules: Protocol, lengths: Sequence[int], frames: int, clips: int = 0) -> list[Clip]:
    """The generated clips: the first frames of the first videos (for `even`: of videos spread over all of them).

    Raises:
        ValueError: if fewer than two videos are long enough.
    """
    usable = [video for video, length in enumerate(lengths) if length >= frames]
    _enough(len(usable), lengths, f"{frames} frames")
    count = min(len(usable), clips or rules.fake)
    if rules.order == "even":
        usable = [usable[k * len(usable) // count] for k in range(count)]
    return [Clip(video, _frames(0, frames, 1)) for video in usable[:count]]


def departures(
    rules: Protocol,
    *,
    clips: tuple[int, int],
    frames: int,
    size: int | tuple[int, int],
    stride: int,
    usual: int,
    videos: int,
    repeats: int,
    seed: int,
    split: str = "",
    decoded: bool = False,
) -> list[str]:
    """Where a measurement differs from its protocol, each in a few words; empty where it does not.

    Args:
        rules: the protocol.
        clips: real and generated clips that were taken.
        frames: frames of a clip.
        size: side of the videos, or (height, width), in pixels.
        stride: of the real clips.
        usual: the protocol's stride for these data.
        videos: real videos that are long enough.
        repeats: draws of the clips.
        seed: of order and offsets.
        split: of the real videos; empty where nothing tells.
        decoded: the real clips are what a VAE made of their latents.
    """
    found = [] if rules.equal else _counts(rules, clips, videos)
    if rules.equal and clips[0] != clips[1]:
        found.append(f"{clips[0]} real and {clips[1]} generated clips, not as many of both")
    found += [f"clips of {frames} frames, not of {' or '.join(map(str, LENGTHS))}"] if frames not in LENGTHS else []
    found += [f"videos of {pixels(size)}, not {RESOLUTION}"] if size != RESOLUTION else []
    found += [f"stride {stride}, not {usual}"] if stride != usual else []
    found += [f"{repeats} draw(s), not {rules.repeats}"] if repeats != rules.repeats else []
    found += [f"seed {seed}, not {rules.seed}"] if seed != rules.seed else []
    found += [f"the split {split}, not {rules.split}"] if split not in ("", rules.split) else []
    return found + (["real clips decoded from latents, not read from videos"] if decoded else [])


def _counts(rules: Protocol, clips: tuple[int, int], videos: int) -> list[str]:
    real, fake = clips
    found = [f"{fake} generated clips, not {rules.fake}"] if fake != rules.fake else []
    if real != min(rules.real or videos, videos):
        found.append(f"{real} real clips, not {rules.real or f'all {videos}'}")
    elif real < rules.real:
        found.append(f"{real} real clips, as many as there are videos, not {rules.real}")
    return found


def _enough(usable: int, lengths: Sequence[int], span: str) -> None:
    if usable < 2:
        raise ValueError(
            f"{usable} of {len(lengths)} videos have {span}, the longest has {max(lengths, default=0)}: a distance "
            "takes two or more; give more or longer videos, or lower --frames"
        )


def _frames(first: int, frames: int, stride: int) -> tuple[int, ...]:
    return tuple(range(first, first + frames * stride, stride))


def _offset(rules: Protocol, seed: int, video: int, largest: int) -> int:
    """Where a video's clip begins, 0 to `largest`."""
    return 0 if rules.offset == "first" else int(_raw(seed, 1 + video, 1)[0] % np.uint64(largest + 1))


def _raw(seed: int, stream: int, n: int) -> np.ndarray:
    """uint64 `(n)` of a counter-based generator's raw stream, which numpy keeps from version to version."""
    return np.random.Philox(np.random.SeedSequence([seed, stream])).random_raw(n)
