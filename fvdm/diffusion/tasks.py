"""The tasks: each is a function that returns a timestep matrix, and says which frames are given. No more than that.

A frame that is given has a column of zeros and is held; one that is edited begins where some of it is left; one that is
drawn begins at the first of the `levels`. Nothing that samples asks which task it is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from fvdm.diffusion.timesteps import evenly_spaced, hold_clean, staggered, together


@dataclass(frozen=True)
class TaskSpec:
    """What a task may be told.

    Attributes:
        levels: falling timesteps of one frame, `(s + 1,)`, from noise to 0.
        window: frames that the model sees at once.
        length: frames of the video.
        given: how many given frames are at hand; some tasks do without.
        frames: indices that the task is about; negative ones count from the end.
        context: given frames, or frames that a window shares with the one before; 0 is the task's own number.
        delay: rows that a frame of a pyramid starts after the one before; 0 is the task's own number.
        strength: how much of an edited frame may change: 0 nothing, 1 everything.
        slope: how much nearer to pure noise each frame of `progressive` begins than the one before.
    """

    levels: Tensor
    window: int
    length: int
    given: int = 0
    frames: tuple[int, ...] = ()
    context: int = 0
    delay: int = 0
    strength: float = 0.6
    slope: float = 0.1

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if self.length < 1 or self.window < 1:
            raise ValueError(f"{self.length} frames in windows of {self.window}: a clip has at least one")
        for frame in self.frames:
            if not -self.length <= frame < self.length:
                raise ValueError(f"there is no frame {frame}: the video has frames 0 to {self.length - 1}")
        if self.context < 0 or self.delay < 0:
            raise ValueError(f"context {self.context} and delay {self.delay} must not be negative")
        if not 0.0 <= self.strength <= 1.0:
            raise ValueError(f"strength {self.strength}: choose 0 (nothing changes) to 1 (everything may)")
        if not self.slope > 0.0:
            raise ValueError(f"slope {self.slope}: choose more than 0 (the paper's is 0.1)")

    @property
    def about(self) -> tuple[int, ...]:
        """`frames`, sorted, each once, counted from the start."""
        return tuple(sorted({frame % self.length for frame in self.frames}))

    def first(self, context: int) -> range:
        """The given frames of a task that continues: the first `context`, as far as they came.

        Raises:
            ValueError: if they leave no room in the window, or nothing to draw.
        """
        number = min(context, self.given)
        if number >= min(self.window, self.length):
            raise ValueError(f"a context of {number} frames: choose less than {min(self.window, self.length)}")
        return range(number)


class Plan(NamedTuple):
    """A task, made out.

    Attributes:
        matrix: int64 `(s + 1, length)`.
        given: frames whose content comes from outside: held where their column is 0, changed where it is not.
    """

    schedule: Tensor
    given: tuple[int, ...]

    @property
    def held(self) -> tuple[int, ...]:
        """The given frames that leave the sampler as they came, to the bit."""
        return tuple(k for k in self.given if self.schedule[0, k] == 0)


def _holding(want: TaskSpec, given: Sequence[int]) -> Plan:
    """The frames `given` are held; the others walk together."""
    return Plan(hold_clean(together(want.levels, want.length), given), tuple(given))


def generate(want: TaskSpec) -> Plan:
    """All frames from noise, together."""
    return _holding(want, ())


def image_to_video(want: TaskSpec) -> Plan:
    """The first frame is given (FVDM, section 2.4)."""
    return _holding(want, (0,))


def interpolate(want: TaskSpec) -> Plan:
    """The first and the last frame are given."""
    if want.length < 3:
        raise ValueError(f"there is nothing between the first and the last of {want.length} frames")
    return _holding(want, (0, want.length - 1))


def any_frame(want: TaskSpec) -> Plan:
    """The frames that are named are given."""
    if not 0 < len(want.about) < want.length:
        raise ValueError(f"any-frame needs the given frames by index: 1 to {want.length - 1} of {want.length}")
    return _holding(want, want.about)


def infill(want: TaskSpec) -> Plan:
    """The frames that are named are missing; all others are given. By default the middle half of the window."""
    quarter = want.window // 4
    middle = (want.length - 2 * quarter) // 2
    missing = want.about or tuple(range(middle, middle + 2 * quarter))
    given = tuple(k for k in range(want.length) if k not in missing)
    if not missing or not given:
        raise ValueError(f"infill needs the missing frames by index: 1 to {want.length - 1} of {want.length}")
    return _holding(want, given)


def transition(want: TaskSpec) -> Plan:
    """Two clips are joined: the end of one and the beginning of the other are given, `context` frames of each."""
    size = want.context or max(1, want.length // 4)
    if 2 * size >= want.length:
        raise ValueError(f"{size} frames of each clip leave nothing to draw between them in {want.length} frames")
    return _holding(want, (*range(size), *range(want.length - size, want.length)))


def half(want: TaskSpec) -> int:
    """The context of `long` and `next-frame`: half the window, unless told otherwise."""
    return want.context or want.window // 2


def one(want: TaskSpec) -> int:
    """The context of `pyramid`: one frame, unless told otherwise."""
    return want.context or 1


def kept(want: TaskSpec) -> int:
    """The context of `rolling`, the clean frames it keeps in view: a quarter of the window, unless told otherwise."""
    return want.context or max(1, want.window // 4)


def long(want: TaskSpec) -> Plan:
    """A window slides over the video (FVDM, section 2.4): it holds its first `context` frames and draws the others.

    16 + 14 x 8 = 128 frames in the paper: the context is half the window.
    """
    context = half(want)
    if not 1 <= context < want.window:
        raise ValueError(f"a context of {context} frames: choose 1 to {want.window - 1}, the model's window less one")
    steps, new = len(want.levels) - 1, want.window - context
    begins = [0 if k < want.window else steps * (1 + (k - want.window) // new) for k in range(want.length)]
    held = want.first(context)
    return Plan(hold_clean(staggered(want.levels, begins), held), tuple(held))


def pyramid(want: TaskSpec) -> Plan:
    """Each frame starts `delay` rows after the one before (diffusion forcing): near frames clear up first."""
    steps = len(want.levels) - 1
    return _staggered(want, want.first(one(want)), want.delay or max(1, steps // want.window))


def next_frame(want: TaskSpec) -> Plan:
    """One new frame at a time: each starts when the one before has ended, and sees as many as the window holds."""
    return _staggered(want, want.first(half(want)), len(want.levels) - 1)


def rolling(want: TaskSpec) -> Plan:
    """A diagonal that rolls over the video: frames enter as noise on the right and leave clean on the left.

    The delay is the least with which its context stays in view.
    """
    return _staggered(want, want.first(kept(want)), want.delay or _rolling_delay(want))


def _rolling_delay(want: TaskSpec) -> int:
    if kept(want) >= want.window:
        raise ValueError(f"a context of {kept(want)} frames: choose less than {want.window}, the model's window")
    return -(-(len(want.levels) - 1) // (want.window - kept(want)))


def _staggered(want: TaskSpec, held: range, delay: int) -> Plan:
    begins = [delay * max(0, k - len(held)) for k in range(want.length)]
    return Plan(hold_clean(staggered(want.levels, begins), held), tuple(held))


def progressive(want: TaskSpec) -> Plan:
    """Frame i begins, and stays, at `min(slope i t, t)`: ever less of the given clip is kept (FVDM, section 2.4).

    The first frame is held; an image that is given stands for every frame.
    """
    share = (want.slope * torch.arange(want.length, dtype=torch.float64)).clamp(max=1)
    schedule = (together(want.levels, want.length) * share).round().long()
    return Plan(schedule, tuple(range(want.length)))


def edit(want: TaskSpec) -> Plan:
    """Frames are noised to `strength` T and drawn anew from there (SDEdit): those that are named, or all."""
    changed = want.about or tuple(range(want.length))
    schedule = torch.zeros(len(want.levels), want.length, dtype=torch.long)
    top = round(want.strength * int(want.levels[0]))
    schedule[:, list(changed)] = want.levels.clamp(max=top)[:, None]
    return Plan(schedule, tuple(range(want.length)))


def rolling_blocks(want: TaskSpec) -> Iterator[tuple[int, Tensor]]:
    """The blocks of `rolling` for a video without an end, whatever `want.length` says."""
    want = replace(want, length=want.window)
    held, delay = want.first(kept(want)), want.delay or _rolling_delay(want)
    steps, window = len(want.levels) - 1, want.window
    if steps > delay * window:
        raise ValueError(f"with a delay of {delay} rows, more than {window} frames are on their way at once")
    below = delay * (window - len(held))  # The row in which the first frame right of the window starts.
    for first in count():
        begins = torch.arange(first, first + window) - len(held)
        rows = torch.arange(max(0, below + delay * (first - 1)), below + delay * first + 1)
        if first == 0:
            rows = torch.arange(below + 1)
        schedule = want.levels[(rows[:, None] - delay * begins).clamp(0, steps)]
        inside = [k for k in held if first <= k < first + window]
        yield first, hold_clean(schedule, [k - first for k in inside])


class Task(NamedTuple):
    """An entry of the table of tasks.

    Attributes:
        plan: what it is.
        length: frames that it makes unless told otherwise; 0 is one window.
        needs_given: whether it is nothing without given frames.
        context: how many frames of a clip it goes on from, if that many came; 0 if it does not go on from one.
        endless: the same for a video without an end, as blocks for `fvdm.diffusion.sampling.stream`.
    """

    plan: Callable[[TaskSpec], Plan]
    length: int = 0
    needs_given: bool = False
    context: Callable[[TaskSpec], int] = lambda want: 0
    endless: Callable[[TaskSpec], Iterator[tuple[int, Tensor]]] | None = None


TASKS: dict[str, Task] = {
    "generate": Task(generate),
    "image-to-video": Task(image_to_video, needs_given=True),
    "interpolate": Task(interpolate, needs_given=True),
    "any-frame": Task(any_frame, needs_given=True),
    "infill": Task(infill, needs_given=True),
    "transition": Task(transition, needs_given=True),
    "long": Task(long, length=128, context=half),
    "next-frame": Task(next_frame, context=half),
    "progressive": Task(progressive, needs_given=True),
    "edit": Task(edit, needs_given=True),
    "pyramid": Task(pyramid, context=one),
    "stream": Task(rolling, length=128, context=kept, endless=rolling_blocks),
}


def find(task: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: if there is none; lists those there are.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; choose one of {', '.join(TASKS)}")
    return TASKS[task]


def on_window(task: str, levels: Tensor, window: int, length: int = 0) -> Plan:
    """A task on a clip of one window, all of whose frames are at hand.

    Args:
        task: by name.
        levels: falling timesteps of one frame, `(s + 1,)`.
        window: frames of the clip.
        length: frames of the video, for a task that slides over one.

    Raises:
        ValueError: if there is no such task (lists those there are), or it must be told more.
    """
    found = find(task)
    return found.plan(TaskSpec(levels, window, max(length, window) if found.length else window, given=window))


def given_frames(task: str, frames: int) -> tuple[int, ...]:
    """The indices of the frames that a task wants given, in a clip of one window of `frames`.

    Raises:
        ValueError: if there is no such task; lists those there are.
    """
    return on_window(task, evenly_spaced(1), frames).given


def text(schedule: Tensor, rows: int = 60) -> str:
    """A matrix as lines of text: every row where it has up to `rows`, else as many spread over its length."""
    count = len(schedule)
    chosen = range(count) if count <= rows else torch.linspace(0, count - 1, rows).round().long().tolist()
    width = len(str(int(schedule.max())))
    label = len(str(count - 1))
    return "\n".join(
        f"row {k:>{label}}  " + " ".join(f"{value:>{width}}" for value in schedule[k].tolist()) for k in chosen
    )
