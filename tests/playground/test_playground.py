"""The playground: the clip of its command line, cancelling, limits, and a server that hands out no other file."""

import shlex
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from fvdm import config as settings
from fvdm import load
from fvdm.diffusion.timesteps import full_sequence, hold_clean
from fvdm.generation.config import GenerateCommand, GenerationConfig, read_schedule
from fvdm.generation.inputs import read_frames
from fvdm.playground import session
from fvdm.playground.config import PlayConfig

pytestmark = pytest.mark.slow
pytest.importorskip("gradio", reason="the extra `play` is not installed")


@pytest.fixture(scope="module")
def model():
    return load("example")


@pytest.fixture(scope="module")
def rabbit(tmp_path_factory):
    path = tmp_path_factory.mktemp("given") / "rabbit.png"
    Image.open(Path(__file__).parents[2] / "docs" / "examples" / "rabbit-1.png").save(path)
    return path


def request_for(model, rabbit, **changes):
    config = GenerationConfig(**{"task": "image-to-video", "steps": 3, "seed": 5} | changes)
    return session.request_of(model, config, [str(rabbit)])


def last(model, request):
    return list(session.run(model, request, threading.Event()))[-1]


def test_each_given_image_is_shown_at_the_frame_that_takes_it(model, rabbit):
    other = rabbit.parent / "other.png"
    Image.new("RGB", (64, 64), (255, 0, 0)).save(other)
    config = GenerationConfig(task="any-frame", steps=3, frames="3,-1")
    shown = session.given_images(model, session.request_of(model, config, [str(rabbit), str(other)]))
    assert list(shown) == [3, 15]
    assert torch.equal(shown[3], read_frames(str(rabbit), model.size)[0])
    assert torch.equal(shown[15], read_frames(str(other), model.size)[0])
    assert session.given_images(model, session.request_of(model, config, [])) == {}


def test_the_clip_is_that_of_the_command_line_it_shows(model, rabbit, monkeypatch):
    monkeypatch.chdir(rabbit.parent)
    request = request_for(model, rabbit)
    words = shlex.split(session.command_line("example", request))
    assert words[:2] == ["fvdm", "generate"]
    config = settings.parse(GenerateCommand, words[2:])
    assert (config.task, config.num, config.paths) == ("image-to-video", 1, [rabbit.name])
    given = read_frames(rabbit.name, model.size)
    expected = model.generate(config.task, given=given, steps=config.steps, seed=config.seed)[0]
    shown = last(model, request)
    assert shown.done
    assert torch.equal(shown.frames, expected)


def test_a_schedule_drawn_by_hand_is_read_back_and_sampled(model, rabbit, tmp_path):
    schedule = hold_clean(full_sequence(3, 16), [0])
    session.write_schedule(schedule, tmp_path / "schedule.csv")
    assert torch.equal(read_schedule(str(tmp_path / "schedule.csv")), schedule)
    hand = request_for(model, rabbit, task="custom", schedule=str(tmp_path / "schedule.csv"), frames="0")
    assert session.plan_of(model, hand)[1] == (0,)
    assert torch.equal(last(model, hand).frames, last(model, request_for(model, rabbit)).frames)


def test_what_is_missing_is_a_sentence_and_the_schedule_shows_all_the_same(model, rabbit):
    config = GenerationConfig(task="interpolate", steps=3)
    empty = session.request_of(model, config, [])
    assert session.plan_of(model, empty)[1] == (0, 15)
    assert session.missing_given(model, empty) == (
        "interpolate takes given frames: drop images or a video on the field at the top"
    )
    assert session.missing_given(model, request_for(model, rabbit)) == ""
    assert request_for(model, rabbit, task="generate").clips == (), "a task that takes no given frames leaves them out"


def test_cancelling_ends_the_sampling(model, rabbit):
    cancel = threading.Event()
    snapshots = session.run(model, request_for(model, rabbit, steps=50), cancel)
    assert next(snapshots).step >= 1
    cancel.set()
    with pytest.raises(session.CancelledError):
        list(snapshots)
    assert not [thread for thread in threading.enumerate() if thread.name == "sampling"]


def test_an_abandoned_request_ends_its_thread(model, rabbit):
    snapshots = session.run(model, request_for(model, rabbit, steps=50), threading.Event())
    next(snapshots)
    snapshots.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "sampling"]


@pytest.fixture(scope="module")
def server(model):
    from fvdm.playground.app import serve

    page = serve(model, PlayConfig(port=0), block=False)
    yield page.local_url
    page.close()


def test_the_page_is_served_on_this_machine_alone_and_hands_out_no_other_file(server):
    import httpx

    assert server.startswith("http://127.0.0.1:")
    assert "FVDM playground" in httpx.get(server).text
    for path in ("/etc/passwd", str(Path(__file__).resolve()), "../../etc/passwd"):
        answer = httpx.get(f"{server}gradio_api/file={path}")
        assert answer.status_code in (403, 404), path
        assert "root:" not in answer.text


def test_limits_are_sentences(model):
    from fvdm.playground.app import Page

    page = Page(model, PlayConfig(max_steps=10, max_frames=32))
    shared = (None, 3, 0, "ddim", "", "", 1, "", "")
    with pytest.raises(ValueError, match="steps is 11: choose 1 to 10"):
        page.request((None, 11, *shared[2:]), ("generate", 0, "", 0.6, []))
    with pytest.raises(ValueError, match="a video of 33 frames: choose at most 32"):
        page.request(shared, ("long", 33, "", 0.6, []))
    with pytest.raises(ValueError, match="empty cell"):
        page.request(shared, ("custom", 0, "", 0.6, [[0, False, None, 3, 100]]))
    with pytest.raises(ValueError, match="draw at most 32"):
        page.request(shared, ("custom", 0, "", 0.6, [[k, False, 0, 3, 100] for k in range(33)]))


def test_the_prompts_of_the_page_are_in_the_command(model):
    from fvdm.playground.app import Page

    shared = (None, 3, 0, "ddim", "", "", 5, "a dog's day", "snow")
    request = Page(model, PlayConfig()).request(shared, ("generate", 0, "", 0.6, []))
    words = shlex.split(session.command_line("runs/wan", request))
    config = settings.parse(GenerateCommand, words[2:])
    assert (config.prompt, config.negative_prompt, config.guidance) == ("a dog's day", "snow", 5)
