"""What is made of a checkpoint and a recipe, and what is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fvdm import config as settings
from fvdm.checkpoints.layout import SLICES, group_key
from fvdm.checkpoints.save import save
from fvdm.diffusion.tasks import TASKS, TaskPlan
from fvdm.diffusion.timesteps import full_sequence, hold_clean
from fvdm.distributed import Ranks
from fvdm.generation.config import GenerateCommand, generation_config, indices
from fvdm.generation.inputs import as_frames, choose, read_frames, read_source
from fvdm.generation.pipeline import load
from fvdm.generation.plan import make_plan
from fvdm.generation.videos import batches, prepare
from fvdm.media.vae import load_vae
from fvdm.models import build, preset
from fvdm.training.config import TrainConfig
from tests.data_fixtures import real_frames
from tests.latte import randomised

FRAMES, SIDE = 8, 32


def make_run(root, classes=()):
    """A run of an untrained tiny model on the built-in VAE's latents, saved by the real code."""
    vae = load_vae()
    network = replace(
        preset("T/2"), channels=vae.channels, size=SIDE // vae.factor, frames=FRAMES, num_classes=len(classes)
    )
    model = randomised(build(network))
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    config = settings.parse(TrainConfig, ["--name", "r", "--data.path", "p", "--data.stride", "2"])
    state = {
        "names": {name: list(p.shape) for name, p in model.named_parameters()},
        "settings": settings.plain(config),
        "network": settings.plain(network),
        "vae": "builtin",
        "classes": list(classes),
        "size": SIDE,
    }
    save(root / "checkpoints", 5, {group_key(name, 0): flat.clone() for name in SLICES}, [0], state, 0, 1, lambda: None)
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def trained(run):
    return load(run)


@pytest.fixture(scope="module")
def pictures(clip):
    return read_frames(clip, SIDE)


def made(trained, task="generate", **changes):
    return trained.generate(task, **{"num": 2, "steps": 3} | changes)


ABOUT = {"any-frame": "1,-2", "infill": "2:4", "edit": "0,4:6"}


@pytest.mark.parametrize("solver", ["ddim", "unipc"])
@pytest.mark.parametrize("task", [task for task in TASKS if task != "custom"])
def test_every_task_runs_from_the_same_checkpoint(trained, pictures, task, solver):
    settings = {"length": 20} if TASKS[task].length else {}
    given = None if task == "generate" else pictures
    videos = made(trained, task, given=given, frames=ABOUT.get(task, ""), solver=solver, **settings)
    length = 20 if TASKS[task].length else FRAMES
    assert videos.dtype == torch.uint8
    assert videos.shape == (2, length, 3, SIDE, SIDE)
    assert not torch.equal(videos[0], videos[1])
    if given is None:
        return
    config = generation_config(task, {"frames": ABOUT.get(task, ""), "solver": solver, **settings})
    held = list(make_plan(trained, config, [pictures]).held)
    vae = load_vae()
    # What is shown of a given frame is what the VAE makes of it: nothing in between has touched it.
    expected = vae.decode(vae.encode_mean(pictures[[2 * k for k in held]]))
    for video in videos:
        assert torch.equal(video[held], expected)


def test_a_sample_is_the_same_in_any_batch(trained):
    one, three = (made(trained, batch_size=k, seed=4, num=3) for k in (1, 3))
    assert (one.int() - three.int()).abs().max() <= 1
    shifted = made(trained, seed=5)
    assert (shifted[0].int() - one[1].int()).abs().max() <= 1


def test_generating_leaves_the_state_of_the_world_alone(trained, pictures):
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    given = pictures.clone()
    first = made(trained, "image-to-video", given=given, solver="ddpm")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert torch.equal(given, pictures)
    torch.randn(3)
    assert torch.equal(made(trained, "image-to-video", given=given, solver="ddpm"), first)


def test_a_stream_has_no_end_and_begins_with_what_is_given(trained, pictures):
    frames = trained.stream(given=pictures, steps=8, num=2, context=2)
    first = torch.stack([next(frames) for _ in range(25)], dim=1)
    assert first.shape == (2, 25, 3, SIDE, SIDE)
    assert torch.equal(first[0, :2], first[1, :2])
    again = made(trained, "stream", given=pictures, steps=8, context=2, length=25)
    assert torch.equal(first, again)


def test_given_may_be_images_a_folder_or_a_video(clip, tmp_path):
    for k in (0, 14):
        Image.fromarray(real_frames()[k]).save(tmp_path / f"{k}.png")
    folder = read_source(str(tmp_path), SIDE)
    assert torch.equal(folder.frames, torch.cat([read_frames(str(tmp_path / f"{k}.png"), SIDE) for k in (0, 14)]))
    video = read_source(clip, SIDE)
    assert video.fps == pytest.approx(25, abs=5)
    assert "40 frames of 176 x 144" in str(video)
    assert f"shorter side to {SIDE}" in str(video)
    assert str(folder).startswith(f"{tmp_path}: 2 frames of 176 x 144; shorter side")


def test_which_given_frames_are_taken():
    def take(clips, given, length=8, stride=2):
        plan = TaskPlan(hold_clean(full_sequence(2, length), given), tuple(given))
        return choose([torch.arange(a, b)[:, None] for a, b in clips], plan, stride)[0].flatten().tolist()

    assert take([(0, 40)], (0, 7)) == [0, 14]
    assert take([(0, 2)], (0, 7)) == [0, 1]  # as many as are wanted
    assert take([(5, 6), (9, 10)], (0, 7)) == [5, 9]
    assert take([(0, 10), (20, 30)], (0, 1, 6, 7)) == [7, 9, 20, 22]  # the end of one, the beginning of the other
    assert take([(0, 1)], (0,)) == [0]
    with pytest.raises(ValueError, match="the given clip has 10 frames"):
        take([(0, 10)], (0, 7))
    with pytest.raises(ValueError, match="2 given frames; 3 came in 3 files"):
        take([(0, 1), (1, 2), (2, 3)], (0, 7))


@pytest.mark.parametrize(("task", "context"), [("long", 4), ("next-frame", 4), ("pyramid", 1), ("stream", 2)])
def test_exactly_as_many_frames_as_are_wanted_are_taken_in_their_order(trained, pictures, task, context):
    """Whatever the stride, which is 2 here, and whether the number is named or the task's own."""
    for named in ({}, {"context": context}):
        config = generation_config(task, {"steps": 8, "length": FRAMES} | named)
        exact, more = (make_plan(trained, config, [pictures[:n]]) for n in (context, 2 * context + 2))
        assert exact.held == more.held == tuple(range(context))
        assert torch.equal(choose([pictures[:context]], exact, 2)[0], pictures[:context])
        assert torch.equal(choose([pictures[: 2 * context + 2]], more, 2)[0], pictures[: 2 * context : 2])
    three = [pictures[k : k + 1] for k in (3, 8, 30)]
    config = generation_config(task, {"steps": 8, "length": FRAMES, "context": 3})
    assert make_plan(trained, config, three).held == (0, 1, 2)


def test_an_image_stands_for_a_still_clip(trained, pictures):
    for task in ("progressive", "edit"):
        videos = made(trained, task, given=pictures[0])
        assert torch.equal(videos, made(trained, task, given=pictures[:1].expand(FRAMES, -1, -1, -1)))
    assert made(trained, "long", given=pictures[0], length=12).shape[1] == 12


@pytest.mark.parametrize(
    ("task", "settings", "sentence"),
    [
        ("image-to-video", {}, "name them with --given"),
        ("dance", {}, "image-to-video"),
        ("generate", {"given": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, "takes no given frames"),
        ("image-to-video", {"given": torch.zeros(3, 8, 8)}, "frames are uint8"),
        ("generate", {"solver": "euler"}, "ddim, ddpm, dpm"),
        ("generate", {"spacing": "cosine"}, "even, trailing"),
        ("generate", {"solver": "ddpm", "eta": 0.5}, "eta belongs to ddim"),
        ("generate", {"class_": "cat"}, "no classes"),
        ("generate", {"guidance": 7.0}, "no classes"),
        ("generate", {"num": 0}, "num is 0"),
        ("generate", {"stepz": 3}, "no setting stepz"),
        ("generate", {"length": 20}, "frames 0 to 19 move together"),
        ("edit", {"frames": "one", "given": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, "write indices"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(trained, task, settings, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        made(trained, task, **settings)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    for name in ("a.png", "none.mp4", "none.png"):
        with pytest.raises(ValueError, match="cannot read frames from") as caught:
            read_frames(str(tmp_path / name), SIDE)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="sides must be within"):
        as_frames(torch.zeros(3, 4, 400, dtype=torch.uint8), SIDE)


def test_formats_are_named_with_commas():
    assert GenerateCommand("run", formats="mp4, frames").forms == ["mp4", "frames"]
    for formats in ("avi", "mp4,avi", ""):
        with pytest.raises(ValueError, match="mp4, gif, webm, frames"):
            GenerateCommand("run", formats=formats)
    with pytest.raises(ValueError, match="fps"):
        GenerateCommand("run", fps=-1)


def test_a_gif_that_leaves_frames_out_says_so(trained):
    assert prepare(trained, GenerateCommand("run", fps=60)).messages == (
        "gif: at a stride of 2 frames, as a gif shows at most 50 a second",
    )
    assert not prepare(trained, GenerateCommand("run", fps=50)).messages
    assert not prepare(trained, GenerateCommand("run", fps=60, formats="mp4")).messages


def test_indices_by_hand():
    assert indices("0, 5,-1") == (0, 5, -1)
    assert indices("4:8,9") == (4, 5, 6, 7, 9)
    assert indices("0:8:3") == (0, 3, 6)
    assert indices("") == ()
    for words in ("a", "1:2:0", "1;2"):
        with pytest.raises(ValueError, match="write indices"):
            indices(words)


def test_classes_are_chosen_by_name_or_number(tmp_path):
    trained = load(make_run(tmp_path, ("cat", "dog")))
    by_name, by_number = made(trained, class_="dog", guidance=3.0), made(trained, class_="1", guidance=3.0)
    assert torch.equal(by_name, by_number)
    assert not torch.equal(by_name, made(trained, class_="cat", guidance=3.0))
    with pytest.raises(ValueError, match="cat, dog"):
        made(trained, class_="bird")
    # Without one every sample draws its own.
    several, alone = made(trained, num=8, steps=1), made(trained, num=1, steps=1, seed=3)
    assert (several[3].int() - alone[0].int()).abs().max() <= 1


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 7))
def test_ranks_draw_every_sample_once(num, batch_size, world):
    config = GenerateCommand("run", num=num, batch_size=batch_size, seed=5)
    drawn = [seed for rank in range(world) for part in batches(config, Ranks(rank, rank, world)) for seed in part]
    assert sorted(drawn) == list(range(5, 5 + num))
    assert all(batches(config, Ranks(rank, rank, world)) for rank in range(min(world, -(-num // -(-num // world)))))


def test_a_converted_folder_loads_like_a_run(tmp_path):
    vae = load_vae()
    network = replace(preset("T/2"), channels=vae.channels, size=SIDE // vae.factor, frames=FRAMES)
    randomised(build(network)).save_pretrained(tmp_path)
    trained = load(tmp_path, vae="builtin")
    assert trained.size == SIDE
    assert made(trained).shape == (2, FRAMES, 3, SIDE, SIDE)
    (tmp_path / "use.json").write_text("{}")
    with pytest.raises(ValueError, match=r"use\.json cannot be read"):
        load(tmp_path, vae="builtin")


def test_a_model_and_a_vae_that_do_not_fit_are_refused(tmp_path):
    build(replace(preset("T/2"), channels=3, size=8, frames=FRAMES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="3 latent channels, its VAE"):
        load(tmp_path, vae="builtin")
