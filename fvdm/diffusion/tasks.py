"""The tasks: each is a function that returns a timestep schedule and the indices of the given frames.

A given frame has a column of zeros and is held; an edited frame begins where some of it is left; a sampled frame begins
at the first of the `levels`. Nothing that samples asks which task it is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from fvdm.choices import one_of
from fvdm.diffusion.timesteps import evenly_spaced, hold_clean, staggered, together


@dataclass(frozen=True)
class TaskSpec:
    """The settings of a task.

    Attributes:
        levels: falling timesteps of one frame, `(s + 1,)`, from noise to 0.
        window: frames that the model sees at once.
        length: frames of the video.
        given: how many given frames are at hand; some tasks do without.
        frames: indices of the frames that the task treats specially; negative ones count from the end.
        context: given frames, or frames that a window shares with the one before; 0 is the task's own number.
        delay: rows that a frame of a pyramid starts after the one before; 0 is the task's own number.
        strength: how much of an edited frame may change: 0 nothing, 1 everything.
        slope: how much nearer to pure noise each frame of `progressive` begins than the one before.
        schedule: int `(s + 1, length)`, for `custom` alone.
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
    schedule: Tensor | None = None

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
    def selected(self) -> tuple[int, ...]:
        """`frames`, sorted, each once, counted from the start."""
        return tuple(sorted({frame % self.length for frame in self.frames}))

    def first(self, context: int) -> range:
        """The given frames of a task that continues: the first `context`, or as many as there are.

        Raises:
            ValueError: if they leave no room in the window, or nothing to sample.
        """
        number = min(context, self.given)
        if number >= min(self.window, self.length):
            raise ValueError(f"a context of {number} frames: choose less than {min(self.window, self.length)}")
        return range(number)


class TaskPlan(NamedTuple):
    """A task applied to its settings.

    Attributes:
        schedule: int64 `(s + 1, length)`.
        given: frames whose content comes from outside: held where their column is 0, changed where it is not.
    """

    schedule: Tensor
    given: tuple[int, ...]

    @property
    def held(self) -> tuple[int, ...]:
        """The given frames that leave the sampler as they came, to the bit."""
        return tuple(k for k in self.given if self.schedule[0, k] == 0)


def noise_given(plan: TaskPlan, window: int, multiples: Sequence[float]) -> TaskPlan:
    """Given frames that are not held, but begin at and follow a multiple of the row's t (Pusa, 2025).

    The row's t is the highest in the window in which they are given. Such a frame starts with a little noise and is
    sampled with the others, so that what the VAE or the user got wrong can be corrected.

    Args:
        plan: its held frames are changed; frames that move stay as they are.
        window: frames that the model sees at once.
        multiples: of each given frame, 0 (held) to below 1; in the order of `plan.given`.

    Raises:
        ValueError: if there is not one multiple per given frame, or one is out of range.
    """
    if len(multiples) != len(plan.given):
        raise ValueError(
            f"{len(multiples)} values of noise for {len(plan.given)} given frames: give one, or one for each"
        )
    schedule = plan.schedule.clone()
    for frame, multiple in zip(plan.given, multiples, strict=True):
        if not 0.0 <= multiple < 1.0:
            raise ValueError(f"{multiple:g}t as noise of a given frame: choose 0 (held) to less than 1")
        if frame in plan.held:
            first = max(0, frame + 1 - window)
            highest = plan.schedule[:, first : first + window].max(1).values
            schedule[:, frame] = (multiple * highest.double()).round().long()
    return plan._replace(schedule=schedule)


def _holding(spec: TaskSpec, given: Sequence[int]) -> TaskPlan:
    """The frames `given` are held; the others go together."""
    return TaskPlan(hold_clean(together(spec.levels, spec.length), given), tuple(given))


def generate(spec: TaskSpec) -> TaskPlan:
    """All frames from noise, together."""
    return _holding(spec, ())


def image_to_video(spec: TaskSpec) -> TaskPlan:
    """The first frame is given (FVDM, section 2.4)."""
    return _holding(spec, (0,))


def interpolate(spec: TaskSpec) -> TaskPlan:
    """The first and the last frame are given."""
    if spec.length < 3:
        raise ValueError(f"there is nothing between the first and the last of {spec.length} frames")
    return _holding(spec, (0, spec.length - 1))


def any_frame(spec: TaskSpec) -> TaskPlan:
    """The selected frames are given."""
    if not 0 < len(spec.selected) < spec.length:
        raise ValueError(f"any-frame needs the given frames by index: 1 to {spec.length - 1} of {spec.length}")
    return _holding(spec, spec.selected)


def infill(spec: TaskSpec) -> TaskPlan:
    """The selected frames are missing; all others are given. By default the middle half of the window."""
    quarter = spec.window // 4
    middle = (spec.length - 2 * quarter) // 2
    missing = spec.selected or tuple(range(middle, middle + 2 * quarter))
    given = tuple(k for k in range(spec.length) if k not in missing)
    if not missing or not given:
        raise ValueError(f"infill needs the missing frames by index: 1 to {spec.length - 1} of {spec.length}")
    return _holding(spec, given)


def transition(spec: TaskSpec) -> TaskPlan:
    """Two clips are joined: the end of one and the beginning of the other are given, `context` frames of each."""
    size = spec.context or max(1, spec.length // 4)
    if 2 * size >= spec.length:
        raise ValueError(f"{size} frames of each clip leave nothing to sample between them in {spec.length} frames")
    return _holding(spec, (*range(size), *range(spec.length - size, spec.length)))


def half_window_context(spec: TaskSpec) -> int:
    """The context of `long` and `next-frame`: half the window by default."""
    return spec.context or spec.window // 2


def one_frame_context(spec: TaskSpec) -> int:
    """The context of `pyramid`: one frame by default."""
    return spec.context or 1


def rolling_context(spec: TaskSpec) -> int:
    """The context of `rolling`, the clean frames that stay in view: a quarter of the window by default."""
    return spec.context or max(1, spec.window // 4)


def long(spec: TaskSpec) -> TaskPlan:
    """A window slides over the video (FVDM, section 2.4): it holds its first `context` frames and samples the others.

    16 + 14 x 8 = 128 frames in the paper: the context is half the window.
    """
    context = half_window_context(spec)
    if not 1 <= context < spec.window:
        raise ValueError(f"a context of {context} frames: choose 1 to {spec.window - 1}, the model's window less one")
    steps, new = len(spec.levels) - 1, spec.window - context
    start_rows = [0 if k < spec.window else steps * (1 + (k - spec.window) // new) for k in range(spec.length)]
    held = spec.first(context)
    return TaskPlan(hold_clean(staggered(spec.levels, start_rows), held), tuple(held))


def pyramid(spec: TaskSpec) -> TaskPlan:
    """Each frame starts `delay` rows after the one before (diffusion forcing): near frames clear up first."""
    steps = len(spec.levels) - 1
    return _staggered(spec, spec.first(one_frame_context(spec)), spec.delay or max(1, steps // spec.window))


def next_frame(spec: TaskSpec) -> TaskPlan:
    """One new frame at a time: each starts when the one before has ended, and sees as many as the window holds."""
    return _staggered(spec, spec.first(half_window_context(spec)), len(spec.levels) - 1)


def rolling(spec: TaskSpec) -> TaskPlan:
    """A diagonal that rolls over the video: frames enter as noise on the right and leave clean on the left.

    The delay is the least with which its context stays in view.
    """
    return _staggered(spec, spec.first(rolling_context(spec)), spec.delay or _rolling_delay(spec))


def _rolling_delay(spec: TaskSpec) -> int:
    if rolling_context(spec) >= spec.window:
        raise ValueError(
            f"a context of {rolling_context(spec)} frames: choose less than {spec.window}, the model's window"
        )
    return -(-(len(spec.levels) - 1) // (spec.window - rolling_context(spec)))


def _staggered(spec: TaskSpec, held: range, delay: int) -> TaskPlan:
    start_rows = [delay * max(0, k - len(held)) for k in range(spec.length)]
    return TaskPlan(hold_clean(staggered(spec.levels, start_rows), held), tuple(held))


def progressive(spec: TaskSpec) -> TaskPlan:
    """Frame i begins, and stays, at `min(slope i t, t)`: ever less of the given clip is kept (FVDM, section 2.4).

    The first frame is held; an image that is given stands for every frame.
    """
    share = (spec.slope * torch.arange(spec.length, dtype=torch.float64)).clamp(max=1)
    schedule = (together(spec.levels, spec.length) * share).round().long()
    return TaskPlan(schedule, tuple(range(spec.length)))


def edit(spec: TaskSpec) -> TaskPlan:
    """Frames are noised to `strength` T and sampled again from there (SDEdit): the selected ones, or all."""
    changed = spec.selected or tuple(range(spec.length))
    schedule = torch.zeros(len(spec.levels), spec.length, dtype=torch.long)
    top = round(spec.strength * int(spec.levels[0]))
    schedule[:, list(changed)] = spec.levels.clamp(max=top)[:, None]
    return TaskPlan(schedule, tuple(range(spec.length)))


def custom(spec: TaskSpec) -> TaskPlan:
    """The schedule is the user's own; the frames that are selected are given."""
    if spec.schedule is None:
        raise ValueError("custom needs a schedule: --schedule FILE, a line per row with the timesteps of its frames")
    unknown = [k for k in range(spec.length) if spec.schedule[0, k] < spec.levels[0] and k not in spec.selected]
    if unknown:
        raise ValueError(f"frame {unknown[0]} of the schedule starts below pure noise: name it in --frames and give it")
    return TaskPlan(spec.schedule, spec.selected)


def rolling_blocks(spec: TaskSpec) -> Iterator[tuple[int, Tensor]]:
    """The blocks of `rolling` for a video without an end, whatever `spec.length` is."""
    spec = replace(spec, length=spec.window)
    held, delay = spec.first(rolling_context(spec)), spec.delay or _rolling_delay(spec)
    steps, window = len(spec.levels) - 1, spec.window
    if steps > delay * window:
        raise ValueError(f"with a delay of {delay} rows, more than {window} frames are being denoised at once")
    below = delay * (window - len(held))  # The row in which the first frame right of the window starts.
    for first in count():
        start_rows = torch.arange(first, first + window) - len(held)
        rows = torch.arange(max(0, below + delay * (first - 1)), below + delay * first + 1)
        if first == 0:
            rows = torch.arange(below + 1)
        schedule = spec.levels[(rows[:, None] - delay * start_rows).clamp(0, steps)]
        inside = [k for k in held if first <= k < first + window]
        yield first, hold_clean(schedule, [k - first for k in inside])


class Task(NamedTuple):
    """An entry of the table of tasks.

    Attributes:
        plan: its schedule and given frames.
        length: frames that it makes by default; 0 is one window.
        needs_given: whether it requires given frames.
        context: how many frames of a given clip it continues, if there are that many; 0 if it continues none.
        endless: the same for a video without an end, as blocks for `fvdm.diffusion.sampling.stream`.
    """

    plan: Callable[[TaskSpec], TaskPlan]
    length: int = 0
    needs_given: bool = False
    context: Callable[[TaskSpec], int] = lambda spec: 0
    endless: Callable[[TaskSpec], Iterator[tuple[int, Tensor]]] | None = None


TASKS: dict[str, Task] = {
    "generate": Task(generate),
    "image-to-video": Task(image_to_video, needs_given=True),
    "interpolate": Task(interpolate, needs_given=True),
    "any-frame": Task(any_frame, needs_given=True),
    "infill": Task(infill, needs_given=True),
    "transition": Task(transition, needs_given=True),
    "long": Task(long, length=128, context=half_window_context),
    "next-frame": Task(next_frame, context=half_window_context),
    "progressive": Task(progressive, needs_given=True),
    "edit": Task(edit, needs_given=True),
    "pyramid": Task(pyramid, context=one_frame_context),
    "custom": Task(custom),
    "stream": Task(rolling, length=128, context=rolling_context, endless=rolling_blocks),
}


def find(task: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: if there is none; lists those there are.
    """
    return TASKS[one_of("task", task, TASKS)]


def on_window(task: str, levels: Tensor, window: int, length: int = 0) -> TaskPlan:
    """A task on a clip of one window, all of whose frames are at hand.

    Args:
        task: by name.
        levels: falling timesteps of one frame, `(s + 1,)`.
        window: frames of the clip.
        length: frames of the video, for a task that slides over one.

    Raises:
        ValueError: if there is no such task (lists those there are), or it needs more settings.
    """
    found = find(task)
    return found.plan(TaskSpec(levels, window, max(length, window) if found.length else window, given=window))


def given_frames(task: str, frames: int) -> tuple[int, ...]:
    """The indices of the frames that are given in a task, in a clip of one window of `frames`.

    Raises:
        ValueError: if there is no such task; lists those there are.
    """
    return on_window(task, evenly_spaced(1), frames).given
