"""Schedules drawn by hand: they are ordinary schedules, and refuse numbers that make none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fvdm.diffusion.timesteps import check_schedule, full_sequence
from fvdm.playground.schedules import FrameTimes, frame_times, from_frame_times, image

T = 1000


@st.composite
def drawn(draw):
    steps = draw(st.integers(1, 60))
    frames = []
    for _ in range(draw(st.integers(1, 12))):
        start = draw(st.integers(0, steps - 1))
        given = draw(st.booleans())
        noise = draw(st.integers(10, 100) | st.just(0)) if given else 100  # less is less than a timestep a row
        frames.append(FrameTimes(start, draw(st.integers(start + 1, steps)), noise, given))
    return steps, frames


@given(drawn())
def test_every_drawing_is_a_schedule_a_sampler_can_use(drawing):
    steps, frames = drawing
    schedule = from_frame_times(frames, steps, T)
    check_schedule(schedule, T)
    assert schedule.shape == (steps + 1, len(frames))
    for column, frame in zip(schedule.T, frames, strict=True):
        assert column[0] == round(frame.noise / 100 * T)
        assert (column[: frame.start + 1] == column[0]).all(), "it waits until its start"
        assert (column[frame.stop :] == 0).all(), "it is clean from its stop on"


@given(drawn())
def test_a_drawing_can_be_read_back(drawing):
    steps, frames = drawing
    schedule = from_frame_times(frames, steps, T)
    given = [k for k, frame in enumerate(frames) if frame.given]
    again = from_frame_times(frame_times(schedule, given, T), steps, T)
    assert torch.equal(again, schedule)


@pytest.mark.parametrize(
    ("frame", "sentence"),
    [
        (FrameTimes(5, 5, 100, False), "frame 1: start 5 and stop 5"),
        (FrameTimes(0, 11, 100, False), "frame 1: start 0 and stop 11"),
        (FrameTimes(0, 10, 130, True), "frame 1: noise 130%"),
        (FrameTimes(0, 10, 50, False), "frame 1 starts from 50% noise, so it must be given"),
    ],
)
def test_numbers_out_of_range_are_named(frame, sentence):
    with pytest.raises(ValueError, match=sentence):
        from_frame_times([FrameTimes(0, 10, 100, False), frame], 10, T)


def test_the_image_shows_noise_above_and_given_frames_in_blue():
    schedule = full_sequence(10, 4)
    schedule[:, 0] = 0
    canvas = image(schedule, [0], T, height=100, width=80)
    assert canvas.shape == (100, 80, 3)
    assert tuple(canvas[50, 10]) == (54, 118, 214), "held: blue all the way"
    assert canvas[2, 30].min() > 240, "noise is white"
    assert canvas[97, 30].max() < 10, "clean is black"


def test_images_stand_below_their_frames_where_there_is_room():
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 9, 9)
    canvas = image(full_sequence(10, 4), [2], T, {2: red}, height=100, width=80)
    assert canvas.shape == (100 + 18, 80, 3)
    assert (canvas[102:, 42:58] == (255, 0, 0)).all()
    assert (canvas[102:, :40] == 255).all()
    assert image(full_sequence(10, 40), [2], T, {2: red}, height=100, width=80).shape[0] == 100
