"""Sampling: one loop over the rows of a timestep matrix, for a window of frames that slides along the video. Pure.

A row says where each frame's timestep is, the next one where it goes. A frame whose timestep stands still does not
move, to the bit; that is all it takes to hold a given frame, start one late, or finish one early. A video longer than
the model's window is a wide matrix: `windows` cuts it into blocks, and `stream` slides from one to the next.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fvdm.diffusion.guidance import Guidance, guided, noisy_given, null_condition
from fvdm.diffusion.process import Diffusion, Model
from fvdm.diffusion.solvers import HistoryEntry, Solver, Step, ddim
from fvdm.diffusion.timesteps import check_schedule

Block = tuple[int, Tensor]
"""A window's first frame, and the matrix `(s + 1, window)` that is walked there."""
Progress = Callable[[Sequence[int]], Iterator[int]]


@dataclass(frozen=True)
class SamplerConfig:
    """How a matrix is walked; the same for every task.

    Attributes:
        solver: takes the steps; DDIM with eta 0 unless another is given.
        guidance: what the estimate is pushed towards.
        given_noise: timestep that clean frames are shown to the network at; 0 is none.
        progress: wraps the sequence of steps, such as `tqdm`.
    """

    solver: Solver = field(default_factory=ddim)
    guidance: Guidance = field(default_factory=Guidance)
    given_noise: int = 0
    progress: Progress = iter


@dataclass(frozen=True)
class State:
    """A window of the video, as the loop left it.

    Attributes:
        x: the frames `(b f c h w)`.
        past: the rows before, newest first; as many as the solver reads.
        known: int64 `(b f)`: how many of them hold for the frame.
    """

    x: Tensor
    past: tuple[HistoryEntry, ...]
    known: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "State":
        """A window with no past."""
        return cls(x, (), torch.zeros(x.shape[:2], dtype=torch.long, device=x.device))

    def slide(self, fresh: Tensor) -> tuple[Tensor, "State"]:
        """Move on by the frames `fresh (b n c h w)`: the n frames that leave on the left, and the window after."""
        n = fresh.shape[1]
        none = torch.zeros(fresh.shape[:2], dtype=torch.long, device=fresh.device)

        def moved(kept: Tensor, new: Tensor) -> Tensor:
            return torch.cat([kept, new.to(kept.dtype)], dim=1)

        past = tuple(
            HistoryEntry(moved(p.t, none)[:, n:], moved(p.x_t, fresh)[:, n:], moved(p.x_0, fresh)[:, n:])
            for p in self.past
        )
        frames = moved(self.x, fresh)
        return frames[:, :n], State(frames[:, n:], past, moved(self.known, none)[:, n:])


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


def walk(
    state: State,
    schedule: Tensor,
    denoise: Callable[[Tensor, Tensor], Tensor],
    diffusion: Diffusion,
    solver: Solver,
    noise: Callable[[], Tensor],
    progress: Progress = iter,
) -> State:
    """Walk a window down the rows of its matrix. The only sampling loop there is.

    Args:
        state: the window, its frames at the timesteps of the first row.
        schedule: int `(s + 1, f)`; columns never rise.
        denoise: `(x_t, t) -> estimate`.
        diffusion: the noise process.
        solver: takes the steps.
        noise: draws standard normal `(b f c h w)`.
        progress: wraps the sequence of steps.
    """
    moving = (schedule[1:] < schedule[:-1]).any(1).tolist()
    rows = schedule.to(state.x.device)
    x, past, known = state.x, state.past, state.known
    for i in progress([k for k, moves in enumerate(moving) if moves]):
        t, t_next = (rows[k].expand(x.shape[:2]) for k in (i, i + 1))
        moves = t_next < t
        prediction = diffusion.predict(denoise(x, t), x, t)
        now = Step(diffusion, prediction, x.float(), t, t_next, noise, past, known)
        if solver.correct is not None:
            now = now._replace(x_t=solver.correct(now))
        x = torch.where(moves[..., None, None, None], solver.move(now).to(x.dtype), x)
        past = (HistoryEntry(t, now.x_t, prediction.x_0), *past)[: solver.memory]
        known = torch.where(moves, known + 1, 0)  # A frame that stands forgets: see fvdm.diffusion.solvers.
    return State(x, past, known)


@torch.no_grad()
def stream(
    model: Model,
    fresh: Callable[[int], Tensor],
    blocks: Iterable[Block],
    diffusion: Diffusion,
    how: SamplerConfig | None = None,
    *,
    y: Tensor | None = None,
    negative: Tensor | None = None,
    generator: Sequence[torch.Generator] = (),
) -> Iterator[Tensor]:
    """Walk the blocks of a video one after another, and let the frames go as they leave the window.

    The memory is that of one window, however long the video.

    Args:
        model: the denoiser, called as `model(x_t, t, y)`.
        fresh: `n -> (b n c h w)`: the next n frames of the video, noised to the timesteps they begin at.
        blocks: first frames, never falling, and matrices of one width; a frame that two blocks share begins in the
            second where it ended in the first.
        diffusion: the noise process the model was trained with.
        how: solver, guidance and so on.
        y: condition `(b ...)` of the samples.
        negative: condition `(b ...)` that guidance pushes away from; None is the one that says nothing, `model.null`.
        generator: one per sample, for what draws noise on the way.

    Yields:
        `(b n c h w)`, n >= 1, every frame once, in order.

    Raises:
        ValueError: if the blocks do not fit each other, or guidance is asked for without a condition.
    """
    how = how or SamplerConfig()
    if how.guidance.scale != 1.0:
        if y is None:
            raise ValueError(f"guidance {how.guidance.scale} needs a condition y; use guidance 1 without one")
        negative = null_condition(model, y) if negative is None else negative
    state, begin = None, 0
    reached: Tensor | None = None  # Timesteps of the window's frames.
    for first, schedule in blocks:
        check_schedule(schedule, diffusion.num_timesteps)
        width = schedule.shape[1]
        state = state or State.of(fresh(width))
        if first < begin or width != state.x.shape[1]:
            raise ValueError(
                f"a window of {width} frames at {first} cannot follow one of {state.x.shape[1]} at {begin}"
            )
        if first > begin:
            left, state = state.slide(fresh(first - begin))
            yield left
        shared = max(0, width - (first - begin))
        if reached is not None and not torch.equal(reached[width - shared :], schedule[0, :shared]):
            raise ValueError(f"the window at frame {first} begins at other timesteps than the one before ended at")
        state = _walk_block(model, state, schedule, diffusion, how, y, negative, generator)
        begin, reached = first, schedule[-1]
    if state is not None:
        yield state.x


def _walk_block(
    model: Model,
    state: State,
    schedule: Tensor,
    diffusion: Diffusion,
    how: SamplerConfig,
    y: Tensor | None,
    negative: Tensor | None,
    generator: Sequence[torch.Generator],
) -> State:
    noise = functools.partial(draw_noise, state.x.shape, generator, state.x.device)
    steady = noisy_given(model, diffusion, how.given_noise, noise)
    asked = guided(steady, how.guidance, diffusion, noise, negative)
    return walk(state, schedule, lambda x, t: asked(x, t, y), diffusion, how.solver, noise, how.progress)


def sample(
    model: Model,
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
    """Walk a clip of one window down the rows of a timestep matrix.

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
    how = SamplerConfig(solver or ddim(), Guidance(guidance), progress=progress)
    blocks = [(0, schedule)]
    return next(stream(model, lambda n: x, blocks, diffusion, how, y=y, negative=negative, generator=generator))


def windows(schedule: Tensor, window: int) -> list[Block]:
    """Cut the matrix of a long video into blocks that a model of `window` frames can walk.

    In each row the window is where it holds all frames that move and sees the least noise: finished and given frames
    rather than frames that wait. It never goes back.

    Args:
        matrix: int `(s + 1, frames)`.
        window: frames that the model takes.

    Returns:
        first frames and matrices, for `stream`.

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
