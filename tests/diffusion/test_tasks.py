"""Every task: its matrix, and that the samplers do with it what it says."""

import gc
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fvdm.diffusion.config import DiffusionConfig
from fvdm.diffusion.guidance import Guidance
from fvdm.diffusion.process import Diffusion
from fvdm.diffusion.sampling import SamplerConfig, generators, windows
from fvdm.diffusion.solvers import SOLVERS, ddim
from fvdm.diffusion.tasks import (
    TASKS,
    TaskPlan,
    TaskSpec,
    find,
    given_frames,
    noise_given,
    on_window,
    rolling,
    rolling_blocks,
)
from fvdm.diffusion.timesteps import SPACINGS, check_schedule, evenly_spaced, full_sequence, hold_clean, spaced
from fvdm.diffusion.video import place, sample_video, stream_video
from tests.denoisers import DIFFUSION, clean, disturbed, oracle

NAMED = [task for task in TASKS if task != "custom"]  # tests of their own make schedules by hand
FRAMES = 8
PAPER = ("generate", "image-to-video", "interpolate", "long")
ABOUT = {"any-frame": (1, -2), "infill": (2, 3), "edit": (0, 4, 5)}


def task_spec(task, levels=None, given=99, **changes):
    levels = evenly_spaced(6) if levels is None else levels
    length = changes.pop("length", 20 if TASKS[task].length else FRAMES)
    return TaskSpec(levels, FRAMES, length, given, ABOUT.get(task, ()), **changes)


def plan(task, levels=None, **changes):
    return TASKS[task].plan(task_spec(task, levels, **changes))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(NAMED)), st.data())
def test_every_matrix_can_be_walked_and_ends_clean(task, data):
    spacing = data.draw(st.sampled_from(sorted(SPACINGS)))
    levels = spaced(spacing, data.draw(st.integers(1, 40)), DIFFUSION.noise_levels())
    window = data.draw(st.integers(3, 20))
    length = data.draw(st.integers(window, 60)) if TASKS[task].length else window
    selected = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=length - 1, unique=True))
    spec = TaskSpec(levels, window, length, data.draw(st.integers(0, 30)), tuple(selected), delay=0)
    made = TASKS[task].plan(spec)
    check_schedule(made.schedule)
    assert made.schedule.shape[1] == length
    assert (made.schedule[-1] == 0).all()
    assert set(made.held) == {k for k in range(length) if (made.schedule[:, k] == 0).all()}
    free = [k for k in range(length) if k not in made.given]
    assert (made.schedule[0, free] == levels[0]).all()
    # Cut into windows, every step of every frame is in exactly one block.
    steps = torch.zeros(length, dtype=torch.long)
    for first, block in windows(made.schedule, window):
        assert block.shape[1] == window
        steps[first : first + window] += (block[1:] < block[:-1]).sum(0)
    assert torch.equal(steps, (made.schedule[1:] < made.schedule[:-1]).sum(0))


def test_the_matrices_of_the_paper():
    levels = torch.tensor([9, 6, 3, 0])

    def rows(task, length=5, **changes):
        return TASKS[task].plan(TaskSpec(levels, 5, length, 99, **changes)).schedule.tolist()

    assert rows("generate") == [[9] * 5, [6] * 5, [3] * 5, [0] * 5]
    assert rows("image-to-video")[0] == [0, 9, 9, 9, 9]
    assert rows("interpolate")[1] == [0, 6, 6, 6, 0]
    assert rows("any-frame", frames=(1, -1))[0] == [9, 0, 9, 9, 0]
    assert rows("infill", frames=(2,))[0] == [0, 0, 9, 0, 0]
    assert rows("transition", context=2)[0] == [0, 0, 9, 0, 0]
    assert rows("edit", frames=(1, 2), strength=0.7) == [[0, 6, 6, 0, 0]] * 2 + [[0, 3, 3, 0, 0], [0] * 5]
    assert rows("progressive", slope=0.5)[:2] == [[0, 4, 9, 9, 9], [0, 3, 6, 6, 6]]
    assert rows("pyramid", delay=1, context=1)[:4] == [
        [0, 9, 9, 9, 9],
        [0, 6, 9, 9, 9],
        [0, 3, 6, 9, 9],
        [0, 0, 3, 6, 9],
    ]
    assert rows("next-frame", context=3)[2:5] == [[0, 0, 0, 3, 9], [0, 0, 0, 0, 9], [0, 0, 0, 0, 6]]
    assert rows("long", context=2, length=8)[3] == [0, 0, 0, 0, 0, 9, 9, 9]


def test_long_video_has_the_papers_window_arithmetic():
    made = TASKS["long"].plan(TaskSpec(evenly_spaced(2), 16, TASKS["long"].length))
    blocks = windows(made.schedule, 16)
    assert [first for first, _ in blocks] == list(range(0, 113, 8))
    assert len(blocks) == 15
    assert all((block[0] == 0).tolist() == [True] * 8 + [False] * 8 for _, block in blocks[1:])


@pytest.mark.parametrize("context", [0, 1, 3])
def test_the_next_frame_sees_all_before_it_that_the_window_holds(context):
    made = plan("next-frame", given=99, length=20, context=context)
    assert made.held == tuple(range(context or FRAMES // 2))
    drawn = len(made.held)
    for first, block in windows(made.schedule, FRAMES):
        for row in range(len(block) - 1):
            (moving,) = (block[row] > block[row + 1]).nonzero().flatten().tolist() or [None]
            if moving is None:
                continue
            assert first + moving in (drawn, drawn + 1)
            drawn = first + moving
            clean_ones = (block[row] == 0).nonzero().flatten().tolist()
            assert clean_ones == list(range(moving)), "nothing that is finished waits behind it"
            assert len(clean_ones) == min(drawn, FRAMES - 1), "all of them, or as many as fit"
    assert drawn == 19


@pytest.mark.parametrize("objective", ["eps", "v", "flow"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_an_oracle_recovers_x_0_in_every_task(solver, spacing, objective):
    diffusion = Diffusion(DiffusionConfig(objective=objective))
    levels = spaced(spacing, 9, diffusion.noise_levels())
    for task in NAMED:
        length = FRAMES  # The oracle knows one window.
        made = plan(task, levels, length=length)
        x_0 = clean((2, length, 4, 4, 4))
        out = sample_video(
            oracle(x_0, diffusion), diffusion, x_0, made.schedule, [0, 1], SamplerConfig(SOLVERS[solver]())
        )
        bound = 1e-5 if task in PAPER else 1e-4
        assert (out - x_0).abs().max() < bound, task
        assert torch.equal(out[:, list(made.held)], x_0[:, list(made.held)])


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_an_oracle_recovers_x_0_with_noisy_ddim(eta):
    for objective in ("eps", "flow"):
        diffusion = Diffusion(DiffusionConfig(objective=objective))
        x_0 = clean()
        out = sample_video(
            oracle(x_0, diffusion), diffusion, x_0, plan("generate").schedule, [0, 1, 2], SamplerConfig(ddim(eta))
        )
        assert (out - x_0).abs().max() < 1e-4


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("guidance", "noise"),
    [
        (Guidance(), 0),
        (Guidance(4.0), 0),
        (Guidance(4.0, history=2.0, interval=(100, 900), rescale=0.7), 20),
    ],
)
def test_held_frames_leave_bit_identical_in_every_task(solver, guidance, noise):
    net, y = disturbed(num_classes=3), torch.tensor([0, 2])
    for task in NAMED:
        made = plan(task, evenly_spaced(3))
        clip = clean((2, made.schedule.shape[1], 4, 4, 4))
        sampler = SamplerConfig(SOLVERS[solver](), guidance, noise)
        out = sample_video(net, DIFFUSION, clip, made.schedule, [0, 1], sampler, y, FRAMES)
        assert out.isfinite().all(), task
        moved = (out != clip).flatten(2).any(2)
        assert not moved[:, list(made.held)].any(), task
        assert moved[:, [k for k in range(out.shape[1]) if k not in made.held]].all(), task


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_does_not_depend_on_its_batch(solver):
    net = disturbed()
    sampler = SamplerConfig(SOLVERS[solver](), Guidance(history=1.5, rescale=0.5), given_noise=10)
    for task in ("image-to-video", "long", "pyramid"):
        made = plan(task, evenly_spaced(4))
        clip = clean((1, made.schedule.shape[1], 4, 4, 4))

        def make(seeds, made=made, clip=clip):
            batch = clip.expand(len(seeds), *clip.shape[1:])
            return sample_video(net, DIFFUSION, batch, made.schedule, seeds, sampler, window=FRAMES)

        complete = make(range(8))
        for size in (1, 3):
            parts = [make(range(k, min(k + size, 8))) for k in range(0, 8, size)]
            assert (torch.cat(parts) - complete).abs().max() < 1e-5
        assert not torch.equal(complete[0], complete[1])


def frame_by_frame(x, t, y=None):
    """The exact denoiser of unit Gaussian data looks at each frame alone: DDIM hands its noise through unchanged."""
    _, sigma = DIFFUSION.levels(t)
    return torch.cat([sigma.float() * x, torch.full_like(x, -1.0)], dim=2)


def tensors():
    """All that this process holds."""
    gc.collect()
    return [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]


def test_a_stream_of_2000_frames_repeats_none_and_drops_none():
    spec = TaskSpec(evenly_spaced(12), FRAMES, 1, context=2)
    seeds = [3, 9]
    frames = stream_video(frame_by_frame, DIFFUSION, torch.zeros(2, 0, 1, 2, 2), rolling_blocks(spec), seeds)
    noise = generators(seeds)
    sizes, scale = {}, None
    others = tensors()  # of earlier tests, held so that none of them goes meanwhile
    known = {id(tensor) for tensor in others}
    for k in range(2000):
        got = next(frames)
        drawn = torch.stack([torch.randn((1, 1, 2, 2), generator=g) for g in noise])
        scale = (got / drawn).mean() if scale is None else scale
        assert torch.allclose(got, scale * drawn, atol=1e-4), k
        if k in (400, 1900):
            sizes[k] = sum(tensor.numel() for tensor in tensors() if id(tensor) not in known)
    assert sizes[400] == sizes[1900] > 0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(2, 9), st.integers(0, 4), st.integers(0, 9))
def test_an_endless_stream_walks_the_rolling_matrix(steps, window, context, has_given):
    assume(context < window)
    length = 4 * window
    spec = TaskSpec(evenly_spaced(steps), window, length, has_given, context=context)
    schedule = rolling(spec).schedule
    for first, block in rolling_blocks(spec):
        if first + window > length:
            break
        expected = schedule[:, first : first + window]
        moving = [row.tolist() for row in block]
        assert all(any(row == other for other in expected.tolist()) for row in moving)
        assert block[-1, 0] == 0, "the frame that leaves is finished"


def test_a_stream_begins_with_the_given_frames():
    spec = TaskSpec(evenly_spaced(12), FRAMES, 1, given=99, context=2)
    given = clean((1, 2, 4, 4, 4))
    frames = stream_video(disturbed(), DIFFUSION, given, rolling_blocks(spec), [0], SamplerConfig(SOLVERS["unipc"]()))
    made = torch.cat([next(frames) for _ in range(12)], dim=1)
    assert torch.equal(made[:, :2], given)
    assert made.isfinite().all()
    assert made[:, 2:].std() == pytest.approx(1.0, abs=0.4)


def test_an_edit_of_strength_0_changes_nothing_and_of_1_everything():
    clip = clean((2, FRAMES, 4, 4, 4))
    for strength, changes in ((0.0, False), (1.0, True)):
        made = TASKS["edit"].plan(TaskSpec(evenly_spaced(4), FRAMES, FRAMES, 99, strength=strength))
        assert torch.equal(sample_video(disturbed(), DIFFUSION, clip, made.schedule, [0, 1]), clip) != changes


def test_frames_at_the_end_that_are_drawn_need_not_be_there():
    clip = clean((2, FRAMES, 4, 4, 4))
    made = TASKS["long"].plan(TaskSpec(evenly_spaced(4), FRAMES, 20, given=99))
    complete = torch.cat([clip, torch.zeros(2, 12, 4, 4, 4)], dim=1)
    expected = sample_video(disturbed(), DIFFUSION, complete, made.schedule, [0, 1], window=FRAMES)
    assert torch.equal(sample_video(disturbed(), DIFFUSION, clip, made.schedule, [0, 1]), expected)
    assert torch.equal(on_window("long", evenly_spaced(4), FRAMES, 20).schedule, made.schedule)


@pytest.mark.parametrize(
    ("task", "changes", "sentence"),
    [
        ("any-frame", {}, "given frames by index"),
        ("any-frame", {"frames": (9,)}, "no frame 9"),
        ("infill", {"frames": tuple(range(8))}, "missing frames by index"),
        ("transition", {"context": 4}, "nothing to sample"),
        ("long", {"context": 8}, "choose 1 to 7"),
        ("next-frame", {"context": 8}, "less than 8"),
        ("stream", {"context": 8}, "less than 8"),
        ("edit", {"strength": 1.5}, "strength"),
        ("progressive", {"slope": 0.0}, "slope"),
        ("pyramid", {"delay": -1}, "negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_sentence(task, changes, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        TASKS[task].plan(TaskSpec(evenly_spaced(4), FRAMES, FRAMES, 99, **changes))
    assert "\n" not in str(caught.value)


def test_unknown_tasks_and_settings_are_refused():
    with pytest.raises(ValueError, match="image-to-video"):
        find("img2vid")
    with pytest.raises(ValueError, match="2 given frames are needed, 3 came"):
        place(clean((1, 3, 4, 4, 4)), (0, 7), 8)
    with pytest.raises(ValueError, match="context"):
        TASKS["long"].plan(TaskSpec(evenly_spaced(1), FRAMES, FRAMES, context=8))
    assert given_frames("interpolate", 8) == (0, 7)
    assert isinstance(plan("edit"), TaskPlan)


def test_custom_takes_a_schedule_and_wants_its_given_frames_named():
    schedule = hold_clean(full_sequence(4, FRAMES), [0])
    spec = TaskSpec(evenly_spaced(4), FRAMES, FRAMES, frames=(0,), schedule=schedule)
    plan = find("custom").plan(spec)
    assert torch.equal(plan.schedule, schedule)
    assert plan.given == plan.held == (0,)
    with pytest.raises(ValueError, match="frame 0 of the schedule starts below pure noise"):
        find("custom").plan(replace(spec, frames=()))
    with pytest.raises(ValueError, match="custom needs a schedule"):
        find("custom").plan(replace(spec, schedule=None))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(NAMED)), st.floats(0, 0.99), st.integers(1, 30))
def test_noise_on_given_frames_is_a_multiple_of_the_highest_t_of_their_row(task, multiple, steps):
    before = plan(task, evenly_spaced(steps))
    after = noise_given(before, FRAMES, [multiple] * len(before.given))
    check_schedule(after.schedule)
    assert (after.schedule[-1] == 0).all()
    free = [k for k in range(before.schedule.shape[1]) if k not in before.held]
    assert torch.equal(after.schedule[:, free], before.schedule[:, free])
    for frame in before.held:
        highest = before.schedule[:, max(0, frame + 1 - FRAMES) :][:, :FRAMES].max(1).values
        assert (after.schedule[:, frame] - multiple * highest).abs().max() <= 0.5
    if multiple == 0:
        assert torch.equal(after.schedule, before.schedule)


def test_a_given_frame_with_noise_follows_the_others_and_comes_out_of_the_network():
    x_0 = clean((1, FRAMES, 4, 4, 4))
    before = plan("interpolate", evenly_spaced(9))
    after = noise_given(before, FRAMES, [0.0, 0.4])
    assert after.held == (0,)
    assert after.schedule[0, -1] == 400
    out = sample_video(oracle(x_0), DIFFUSION, x_0, after.schedule, [0])
    assert (out - x_0).abs().max() < 1e-4
    assert torch.equal(out[:, 0], x_0[:, 0])
    for wrong, sentence in (([0.2], "1 values of noise for 2 given"), ([0.2, 1.0], "choose 0")):
        with pytest.raises(ValueError, match=sentence):
            noise_given(before, FRAMES, wrong)
