"""Frame rates from time stamps, and the even grid that frames of an uneven video are put on. Pure arithmetic.

Containers round time stamps: WebM and Matroska to milliseconds, GIF to hundredths of a second. The rate is therefore
never read from single gaps: it is the rate whose multiples explain all stamps to within the rounding.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

MAX_STRETCH = 8  # an uneven video may become this many times longer on its even grid; beyond, pauses are shortened
MAX_PAUSE = 8  # grid steps that a shortened pause lasts
NONSENSE = 1000  # a video that would become this many times longer has corrupt time stamps

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """The frame rate of a video, and the even grid its frames are put on.

    Attributes:
        fps: frames per second; None if unknown.
        step: seconds between two ticks of the grid; None if the frames are even already and are all kept.
        stretch: how many times more ticks than frames there are before pauses are shortened.
        pauses: (time, seconds) of each pause that is shortened: when it ends, and what is taken from it.
    """

    fps: float | None
    step: float | None = None
    stretch: float = 1.0
    pauses: tuple[tuple[float, float], ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What is done to pauses, in a sentence."""
        if not self.pauses or self.step is None:
            return ()
        number, seconds = len(self.pauses), sum(cut for _, cut in self.pauses)
        pauses = "a pause is" if number == 1 else f"{number} pauses are"
        return (f"{pauses} shortened to {MAX_PAUSE} frames each: {seconds:.1f} s of standing still are left out",)


def measure(times: Sequence[float], unit: float, stated: Iterable[float] = ()) -> Timing:
    """The timing of a video.

    A frame may be early or late by half a step before the video counts as uneven: rounding and jitter change nothing, a
    dropped frame or a changed rate does.

    Args:
        times: of all frames in seconds, sorted.
        unit: seconds to which the time stamps are rounded.
        stated: frames per second that the file states, the most trusted first; used if they explain the stamps, or if
            there are none.
    """
    stated = [_exact(rate) for rate in stated if 0 < rate <= 1000]
    gaps = np.diff(np.asarray(times, dtype=np.float64))
    median = float(np.median(gaps)) if len(gaps) else 0.0
    if median <= 0:
        return Timing(stated[0] if stated else None)
    fps = _rate(gaps, median, unit, stated)
    step = 1 / fps
    if len(times) < 3 or np.abs(gaps - median).max() <= 0.5 * median:
        return Timing(round(fps, 6))
    stretch = (times[-1] - times[0]) / step / len(times)
    pauses: list[tuple[float, float]] = []
    if stretch > MAX_STRETCH:
        pauses = [
            (float(end), float(gap - MAX_PAUSE * step))
            for end, gap in zip(times[1:], gaps, strict=True)
            if gap > MAX_PAUSE * step
        ]
    return Timing(round(fps, 6), step, stretch, tuple(pauses))


def _rate(gaps: np.ndarray, median: float, unit: float, stated: list[float]) -> float:
    """Frames per second: a stated or common rate if it explains the gaps to within the rounding, else their mean."""
    step = float(gaps[(gaps > 0) & (gaps <= 1.5 * median)].mean())
    counts = np.rint(gaps / step)
    regular = (counts >= 1) & (counts <= 4)  # a pause says nothing of the rate
    step = float(gaps[regular].sum() / counts[regular].sum())
    constant = float(np.ptp(gaps[regular])) < 1e-9
    gaps, counts = np.where(regular, gaps, 0.0), np.where(regular, counts, 0.0)

    def explains(rate: float) -> bool:
        rounding = max(unit * 1.01, min(3.01 * unit, 0.002 / rate))  # fine stamps may be sums of rounded durations
        return unit < 0.5 / rate and _residual(rate, gaps, counts)[0] <= rounding + 1e-9

    if constant and unit < 0.005 * step:  # fine stamps are exact
        return 1 / step
    if stated and explains(stated[0]):
        return stated[0]
    if constant:
        return 1 / step
    ntsc = max(1, round(1.001 / step)) * 1000 / 1001
    likely = [rate for rate in (*stated[1:], float(round(1 / step)), ntsc) if rate > 0 and explains(rate)]
    return min(likely, key=lambda rate: _residual(rate, gaps, counts)[1], default=1 / step)


def _residual(rate: float, gaps: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Range and standard deviation, in seconds, of the stamps from the multiples of 1 / rate, pauses apart."""
    places = np.concatenate([[0.0], np.cumsum(gaps - counts / rate)])
    runs = np.split(places, np.flatnonzero(counts == 0) + 1)
    return max(float(np.ptp(run)) for run in runs), math.sqrt(sum(len(run) * float(np.var(run)) for run in runs))


def _exact(rate: float) -> float:
    """The rate that a file means if it states a rounded one, such as 29.97 for 30000 / 1001."""
    exact = round(rate * 1.001) * 1000 / 1001
    return exact if abs(rate - exact) < 1e-4 * rate and abs(rate - round(rate)) > 1e-9 else rate


@dataclass(frozen=True)
class Grid:
    """Puts the frames of a video on the even grid of its timing, or keeps them all where it has none.

    Attributes:
        timing: of the video.
        repeats: times, sorted, at which the file may say "the same frame again": where no frame comes, the one before
            it is repeated.
    """

    timing: Timing
    repeats: Sequence[float] = ()

    def even(self, frames: Iterable[tuple[float | None, T]]) -> Iterator[T]:
        """Yields the frames, `(time in seconds or None, frame)` in the order of time, as a player would show them."""
        return self._fill(frames) if self.timing.step is None else self._resample(frames, self.timing.step)

    def _fill(self, frames: Iterable[tuple[float | None, T]]) -> Iterator[T]:
        """All frames, and the repeats between them."""
        waiting = 0
        held: T | None = None
        for time, frame in frames:
            while time is not None and waiting < len(self.repeats) and self.repeats[waiting] <= time + 1e-9:
                if self.repeats[waiting] < time - 1e-9 and held is not None:
                    yield held
                waiting += 1
            held = frame
            yield frame
        for _ in self.repeats[waiting:]:
            if held is not None:
                yield held

    def _resample(self, frames: Iterable[tuple[float | None, T]], step: float) -> Iterator[T]:
        """At every tick the newest frame; a frame that is half a step late still counts for its tick."""
        ends = [end for end, _ in self.timing.pauses]
        cuts = np.concatenate([[0.0], np.cumsum([cut for _, cut in self.timing.pauses])])
        tick, start, last = 0, None, 0.0
        held: T | None = None
        for time, frame in self._with_last_repeat(frames):
            now = last + step if time is None else time - float(cuts[np.searchsorted(ends, time + 1e-9)])
            start = now if start is None else start
            while held is not None and start + tick * step < now - step / 2:
                yield held
                tick += 1
            held, last = frame, now
        if held is not None:
            yield held

    def _with_last_repeat(self, frames: Iterable[tuple[float | None, T]]) -> Iterator[tuple[float | None, T]]:
        held: tuple[float | None, T] | None = None
        for held in frames:
            yield held
        if self.repeats and held and held[0] is not None and held[0] < self.repeats[-1]:
            yield self.repeats[-1], held[1]
