"""Sampling: one loop over the rows of a timestep schedule, for a window of frames that slides along the video. Pure.

A row holds each frame's timestep, the next row the timestep it goes to. A frame whose timestep stays does not change,
to the bit; that is all it takes to hold a given frame, start one late, or finish one early. A video longer than the
model's window has a wide schedule: `windows` cuts it into blocks, and `stream` slides from one to the next.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fvdm.diffusion.guidance import Guidance, guided, noisy_given, null_condition
from fvdm.diffusion.process import Denoiser, Diffusion
from fvdm.diffusion.solvers import HistoryEntry, Solver, Step, ddim
from fvdm.diffusion.timesteps import check_schedule

Block = tuple[int, Tensor]
"""A window's first frame, and the schedule `(s + 1, window)` of its frames."""
Progress = Callable[[Sequence[int]], Iterator[int]]
OnStep = Callable[[Tensor], None]
"""Called with the window `(b f c h w)` after each step."""


@dataclass(frozen=True)
class SamplerConfig:
    """How a schedule is followed; the same for every task.

    Attributes:
        solver: takes the steps; DDIM with eta 0 unless another is given.
        guidance: what the estimate is pushed towards.
        given_noise: timestep that clean frames are shown to the network at, one for all or int `(frames)` for each
            frame of the video; 0 is none.
        progress: wraps the sequence of steps, such as `tqdm`.
        on_step: called with the window `(b f c h w)` after each step; an exception that it raises ends the sampling.
    """

    solver: Solver = field(default_factory=ddim)
    guidance: Guidance = field(default_factory=Guidance)
    given_noise: int | Tensor = 0
    progress: Progress = iter
    on_step: OnStep | None = None


@dataclass(frozen=True)
class State:
    """A window of the video, as the loop left it.

    Attributes:
        x: the frames `(b f c h w)`.
        history: the rows before, newest first; as many as the solver reads.
        valid_history: int64 `(b f)`: how many of them are valid for the frame.
    """

    x: Tensor
    history: tuple[HistoryEntry, ...]
    valid_history: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "State":
        """A window without history."""
        return cls(x, (), torch.zeros(x.shape[:2], dtype=torch.long, device=x.device))

    def slide(self, next_frames: Tensor) -> tuple[Tensor, "State"]:
        """Append `next_frames (b n c h w)`: the n frames that leave on the left, and the window after."""
        n = next_frames.shape[1]
        none = torch.zeros(next_frames.shape[:2], dtype=torch.long, device=next_frames.device)

        def shifted(old: Tensor, new: Tensor) -> Tensor:
            return torch.cat([old, new.to(old.dtype)], dim=1)

        history = tuple(
            HistoryEntry(
                shifted(p.t, none)[:, n:], shifted(p.x_t, next_frames)[:, n:], shifted(p.x_0, next_frames)[:, n:]
            )
            for p in self.history
        )
        frames = shifted(self.x, next_frames)
        return frames[:, :n], State(frames[:, n:], history, shifted(self.valid_history, none)[:, n:])


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One source of randomness per sample, on the CPU: a sample does not depend on its batch, nor on the device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(shape: Sequence[int], generator: Sequence[torch.Generator], device: torch.device | str) -> Tensor:
    """Standard normal `(b f c h w)`, row k drawn from the k-th generator.

    Raises:
        ValueError: if there is not one generator per sample.
    """
    if len(generator) != shape[0]:
        raise ValueError(f"{shape[0]} samples need {shape[0]} generators, one each; {len(generator)} came")
    return torch.stack([torch.randn(tuple(shape[1:]), generator=g) for g in generator]).to(device)


def start(x_0: Tensor, schedule: Tensor, diffusion: Diffusion, generator: Sequence[torch.Generator]) -> Tensor:
    """The clip that sampling starts from: each frame of `x_0 (b f c h w)` noised to the schedule's first row.

    Frames at `t = 0` come back as they are, frames at `t = T` are pure noise, whatever stood in `x_0`.
    """
    t = schedule[0].to(x_0.device).expand(x_0.shape[:2])
    noise = draw_noise(x_0.shape, generator, x_0.device).to(x_0.dtype)
    pure = (t == diffusion.num_timesteps)[..., None, None, None]
    clean = (t == 0)[..., None, None, None]
    return torch.where(clean, x_0, torch.where(pure, noise, diffusion.q_sample(x_0, t, noise)))


def denoise(
    state: State,
    schedule: Tensor,
    estimate: Callable[[Tensor, Tensor, Tensor], Tensor],
    diffusion: Diffusion,
    solver: Solver,
    noise: Callable[[], Tensor],
    progress: Progress = iter,
    on_step: OnStep | None = None,
) -> State:
    """Denoise a window along the rows of its schedule. The only sampling loop there is.

    Args:
        state: the window, its frames at the timesteps of the first row.
        schedule: int `(s + 1, f)` on the CPU; columns never rise.
        estimate: `(x_t, t (b f), row (f) on the CPU) -> estimate`.
        diffusion: the noise process.
        solver: takes the steps.
        noise: draws standard normal `(b f c h w)`.
        progress: wraps the sequence of steps.
        on_step: see `SamplerConfig`.
    """
    moving = (schedule[1:] < schedule[:-1]).any(1).tolist()
    rows = schedule.to(state.x.device)
    x, history, valid_history = state.x, state.history, state.valid_history
    for i in progress([k for k, moves in enumerate(moving) if moves]):
        t, t_next = (rows[k].expand(x.shape[:2]) for k in (i, i + 1))
        moves = t_next < t
        prediction = diffusion.predict(estimate(x, t, schedule[i]), x, t)
        now = Step(diffusion, prediction, x.float(), t, t_next, noise, history, valid_history)
        if solver.correct is not None:
            now = now._replace(x_t=solver.correct(now))
        x = torch.where(moves[..., None, None, None], solver.move(now).to(x.dtype), x)
        history = (HistoryEntry(t, now.x_t, prediction.x_0), *history)[: solver.memory]
        # The history of a frame that waited is not valid: see fvdm.diffusion.solvers.
        valid_history = torch.where(moves, valid_history + 1, 0)
        if on_step is not None:
            on_step(x)
    return State(x, history, valid_history)


@torch.no_grad()
def stream(
    model: Denoiser,
    next_frames: Callable[[int], Tensor],
    blocks: Iterable[Block],
    diffusion: Diffusion,
    sampler: SamplerConfig | None = None,
    *,
    y: Tensor | None = None,
    negative: Tensor | None = None,
    generator: Sequence[torch.Generator] = (),
) -> Iterator[Tensor]:
    """Denoise the blocks of a video one after another, and yield the frames as they leave the window.

    The memory is that of one window, however long the video.

    Args:
        model: the denoiser, called as `model(x_t, t, y)`.
        next_frames: `n -> (b n c h w)`: the next n frames of the video, noised to the timesteps they begin at.
        blocks: first frames, never falling, and schedules of one width; a frame that two blocks share begins in the
            second where it ended in the first.
        diffusion: the noise process the model was trained with.
        sampler: solver, guidance and so on.
        y: condition `(b ...)` of the samples.
        negative: condition `(b ...)` that guidance pushes away from; None is the one that says nothing, `model.null`.
        generator: one per sample, for what draws noise on the way.

    Yields:
        `(b n c h w)`, n >= 1, every frame once, in order.

    Raises:
        ValueError: if the blocks do not fit each other, or guidance is asked for without a condition.
    """
    sampler = sampler or SamplerConfig()
    if sampler.guidance.scale != 1.0:
        if y is None:
            raise ValueError(f"guidance {sampler.guidance.scale} needs a condition y; use guidance 1 without one")
        negative = null_condition(model, y) if negative is None else negative
    state, first_before = None, 0
    reached: Tensor | None = None  # Timesteps of the window's frames.
    for first, schedule in blocks:
        check_schedule(schedule, diffusion.num_timesteps)
        width = schedule.shape[1]
        state = state or State.of(next_frames(width))
        if first < first_before or width != state.x.shape[1]:
            raise ValueError(
                f"a window of {width} frames at {first} cannot follow one of {state.x.shape[1]} at {first_before}"
            )
        if first > first_before:
            left, state = state.slide(next_frames(first - first_before))
            yield left
        shared = max(0, width - (first - first_before))
        if reached is not None and not torch.equal(reached[width - shared :], schedule[0, :shared]):
            raise ValueError(f"the window at frame {first} begins at other timesteps than the one before ended at")
        own = replace(sampler, given_noise=_in_window(sampler.given_noise, first, width))
        state = _denoise_block(model, state, schedule, diffusion, own, y, negative, generator)
        first_before, reached = first, schedule[-1]
    if state is not None:
        yield state.x


def _in_window(given_noise: int | Tensor, first: int, width: int) -> int | Tensor:
    """The part of `SamplerConfig.given_noise` that belongs to a window; 0 right of its end."""
    if isinstance(given_noise, int):
        return given_noise
    part = given_noise[first : first + width]
    return torch.nn.functional.pad(part, (0, width - len(part)))


def _denoise_block(
    model: Denoiser,
    state: State,
    schedule: Tensor,
    diffusion: Diffusion,
    sampler: SamplerConfig,
    y: Tensor | None,
    negative: Tensor | None,
    generator: Sequence[torch.Generator],
) -> State:
    noise = functools.partial(draw_noise, state.x.shape, generator, state.x.device)
    noised = noisy_given(model, diffusion, sampler.given_noise, noise)
    evaluate = guided(noised, sampler.guidance, diffusion, noise, negative)

    def estimate(x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        return evaluate(x, t, y, row)

    return denoise(state, schedule, estimate, diffusion, sampler.solver, noise, sampler.progress, sampler.on_step)


def sample(
    model: Denoiser,
    x: Tensor,
    schedule: Tensor,
    diffusion: Diffusion,
    *,
    y: Tensor | None = None,
    negative: Tensor | None = None,
    guidance: float = 1.0,
    solver: Solver | None = None,
    generator: Sequence[torch.Generator] | torch.Generator = (),
    progress: Progress = iter,
) -> Tensor:
    """Denoise a clip of one window along the rows of a timestep schedule.

    Args:
        model: the denoiser, called as `model(x_t, t, y)`.
        x: `(b f c h w)`, noised to the schedule's first row (see `start`); given frames hold their clean latents.
        schedule: int `(s + 1, f)` on the CPU; columns never rise.
        diffusion: the noise process the model was trained with.
        y: condition `(b ...)`, such as class labels; None for an unconditional model.
        negative: condition that guidance pushes away from; None is the one that says nothing, `model.null`.
        guidance: classifier-free guidance scale; 1 is none. Without effect on an unconditional backbone.
        solver: one of `fvdm.diffusion.solvers`; DDIM with eta 0 when not given.
        generator: for solvers that add noise; one per sample, or one for all.
        progress: wraps the sequence of steps, such as `tqdm`.

    Returns:
        `(b f c h w)`. A frame whose column stands still is bit-identical to that of `x`.

    Raises:
        ValueError: if the schedule does not fit the clip, or guidance is asked for without a condition.
    """
    check_schedule(schedule, diffusion.num_timesteps)
    if schedule.shape[1] != x.shape[1]:
        raise ValueError(f"the schedule is for {schedule.shape[1]} frames, the clip has {x.shape[1]}")
    if isinstance(generator, torch.Generator):
        generator = [generator] * len(x)
    if y is None and hasattr(model, "null") and model.null(1) is None:
        guidance = 1.0  # With and without its condition, an unconditional model says the same.
    sampler = SamplerConfig(solver or ddim(), Guidance(guidance), progress=progress)
    blocks = [(0, schedule)]
    return next(stream(model, lambda n: x, blocks, diffusion, sampler, y=y, negative=negative, generator=generator))


def windows(schedule: Tensor, window: int) -> list[Block]:
    """Cut the schedule of a long video into blocks that a model of `window` frames can denoise.

    In each row the window is where it holds all frames that move and sees the least noise: finished and given frames
    rather than frames that wait. It never goes back.

    Args:
        schedule: int `(s + 1, frames)`.
        window: frames that the model takes.

    Returns:
        first frames and schedules, for `stream`.

    Raises:
        ValueError: if frames move in one row that no window holds together.
    """
    count = schedule.shape[1]
    if count <= window:
        return [(0, schedule)]
    moves = schedule[1:] < schedule[:-1]
    noise = schedule[:-1].double().unfold(1, window, 1).sum(2)  # (s, places)
    blocks: list[tuple[int, int]] = []  # (place, its first row)
    place = 0
    for row in moves.any(1).nonzero().flatten().tolist():
        where = moves[row].nonzero().flatten()
        low, high = int(where[0]), int(where[-1])
        lowest, highest = max(place, high + 1 - window), min(low, count - window)
        if lowest > highest:
            raise ValueError(
                f"frames {low} to {high} move together, and the model sees {window} at once: use fewer frames, or a "
                "task that slides over the video, such as long, next-frame or stream"
            )
        centre = (low + high + 1 - window) / 2
        place = min(range(lowest, highest + 1), key=lambda k: (noise[row, k].item(), abs(k - centre)))
        if not blocks or blocks[-1][0] != place:
            blocks.append((place, row))
    ends = [row for _, row in blocks[1:]] + [len(moves)]
    return [(k, schedule[a : b + 1, k : k + window]) for (k, a), b in zip(blocks, ends, strict=True)]
