"""Videos of a tiny Wan with a causal VAE and a text encoder: prompts, and every task on latent frames."""

import copy
from dataclasses import replace

import pytest
import torch

from fvdm.checkpoints import find
from fvdm.diffusion.tasks import TASKS, TaskPlan
from fvdm.diffusion.timesteps import full_sequence, hold_clean
from fvdm.generation.config import GenerateCommand, generation_config, given_noise
from fvdm.generation.frames import make_frames, split
from fvdm.generation.grid import choose_frames, encode_frames, latent_indices, latent_length, runs
from fvdm.generation.inputs import as_frames
from fvdm.generation.pipeline import load
from fvdm.generation.plan import encode_given, make_plan, with_noise
from fvdm.generation.videos import prepare
from fvdm.media.frames import FrameMap
from fvdm.media.text import load_text_encoder
from fvdm.models.export import export_model
from fvdm.serving.registry import predict
from tests.data_fixtures import real_frames
from tests.tiny_models import tiny_pipeline, tiny_text_encoder, tiny_wan_run

WINDOW, SIDE, TOKENS = 4, 32, 8  # latent frames, pixels, tokens of a text
FRAMES = 13  # of the video
MAP = FrameMap(4)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def run(pipeline, tmp_path_factory):
    return tiny_wan_run(tmp_path_factory.mktemp("run"), pipeline, (WINDOW, 4, SIDE // 8, SIDE // 8), TOKENS)


@pytest.fixture(scope="module")
def trained(run):
    return load(run)


@pytest.fixture(scope="module")
def video():
    """Real frames, uint8 (40 3 32 32)."""
    return as_frames(torch.from_numpy(real_frames()[:40].copy()).permute(0, 3, 1, 2), SIDE)


def made(trained, task="generate", **changes):
    return trained.generate(task, **{"num": 2, "steps": 3, "prompt": "a dog"} | changes)


ABOUT = {"any-frame": "6,-1", "infill": "5:9", "edit": "5:9"}


@pytest.mark.parametrize("task", [task for task in TASKS if task != "custom"])
def test_every_task_runs_on_latent_frames_and_holds_what_is_given(trained, video, task, monkeypatch):
    length = 21 if TASKS[task].length else FRAMES
    given = None if task == "generate" else video
    changes = {"frames": ABOUT.get(task, ""), "length": length, "steps": 3, "prompt": "a dog", "overlap": "keep"}
    config = generation_config(task, changes)
    clips = [] if given is None else [video]
    plan = make_plan(trained, config, clips)
    clip = encode_given(trained, config, plan, clips)
    sampled = []
    decode = trained.vae.decode_stream

    def watched(latents):
        return decode(sampled.append(z) or z for z in latents)

    monkeypatch.setattr(trained.vae, "decode_stream", watched)
    frames = list(zip(range(length), make_frames(trained, config, plan, clip, [0, 1]), strict=False))
    assert len(frames) == length
    assert frames[0][1].shape == (2, 3, SIDE, SIDE)
    latents = torch.stack(sampled, dim=1)
    held = list(plan.held)
    assert latents.shape[1] >= latent_length(MAP, length)
    assert torch.equal(latents[:, held], clip[:, held].expand(2, -1, -1, -1, -1))
    free = [k for k in range(WINDOW) if k not in held]
    assert not torch.equal(latents[0, free], latents[1, free])
    assert given is None or clip[:, held].abs().sum() > 0


def test_the_beginning_of_a_clip_is_encoded_as_in_training(trained, video):
    plan = TaskPlan(hold_clean(full_sequence(2, WINDOW), [0, 1, 2]), (0, 1, 2))
    frames, lines = choose_frames([video], plan, 1, MAP)
    assert torch.equal(frames, video[:9])
    assert lines[-1] == "on the latent grid: frames 0 to 8 of the video as latent frames 0 to 2"
    assert torch.equal(encode_frames(trained.vae, frames, plan.given), trained.vae.encode_mean(video[:FRAMES])[:3])


@pytest.mark.parametrize("encoding", ["clip", "single"])
def test_a_last_image_stands_for_its_group_or_is_encoded_alone(trained, video, encoding):
    plan = TaskPlan(hold_clean(full_sequence(2, WINDOW), [0, 3]), (0, 3))
    first, last = video[:1], video[30:31]
    frames, lines = choose_frames([first, last], plan, 1, MAP, encoding)
    latents = encode_frames(trained.vae, frames, plan.given, encoding)
    assert torch.equal(latents[0], trained.vae.encode_mean(first)[0])
    still = trained.vae.encode_mean(last.expand(5, -1, -1, -1))[1]
    assert torch.equal(latents[1], still if encoding == "clip" else trained.vae.encode_mean(last)[0])
    expected = "each of 2 given frames stands for all frames of its latent frame"
    assert lines[0] == (expected if encoding == "clip" else "2 given frames, in order")
    of_video = choose_frames([video], plan, 1, MAP, encoding)[0]
    assert torch.equal(of_video, video[[0, 9, 10, 11, 12] if encoding == "clip" else [0, 12]])


def test_two_clips_give_the_end_of_one_and_the_beginning_of_the_other(video):
    plan = TaskPlan(hold_clean(full_sequence(2, 6), [0, 1, 4, 5]), (0, 1, 4, 5))
    before, after = video[:10], video[20:]
    assert torch.equal(choose_frames([before, after], plan, 1, MAP)[0], torch.cat([before[5:], after[:8]]))
    assert torch.equal(choose_frames([before, after], plan, 1, MAP, "single")[0], torch.cat([before[5:], after[:5]]))


def test_the_grid_by_hand():
    assert [latent_length(MAP, n) for n in (0, 1, 2, 5, 6, 81)] == [0, 1, 2, 2, 3, 21]
    assert latent_indices(MAP, (0, 1, 4, 5, -1), 13) == (0, 1, 2, 3)
    assert latent_indices(FrameMap(1), (3, -1), 8) == (3, -1)
    with pytest.raises(ValueError, match="no frame 13: the video has frames 0 to 12"):
        latent_indices(MAP, (13,), 13)
    words = list(map(str, runs(MAP, (0, 2, 3), "clip")))
    assert words[1] == "frames 5 to 12 of the video as latent frames 2 to 3, encoded after a copy of frame 5"
    assert list(map(str, runs(MAP, (3,), "single"))) == ["frame 12 of the video as latent frame 3"]


def test_what_was_done_with_given_frames_is_said(trained, run, tmp_path, video):
    from PIL import Image

    Image.fromarray(video[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    config = GenerateCommand(str(run), task="interpolate", given=[str(tmp_path / "a.png")] * 2, prompt="a dog")
    assert prepare(trained, config).messages[-1] == (
        "given: each of 2 given frames stands for all frames of its latent frame; on the latent grid: frame 0 of the "
        "video as latent frame 0; frames 9 to 12 of the video as latent frame 3, encoded after a copy of frame 9"
    )


def test_a_window_of_long_begins_as_a_clip_of_its_own(trained, video, monkeypatch):
    """The overlap is the end of the window before, encoded again, and leaves the network as it came."""
    config = generation_config("long", {"length": 21, "context": 5, "steps": 3, "prompt": "a dog"})
    plan = make_plan(trained, config, [video])
    assert [(piece.first, piece.end, piece.shared) for piece in split(plan.schedule, WINDOW)] == [(0, 4, 0), (2, 6, 2)]
    decoded = []
    decode = trained.vae.decode_stream

    def watched(latents):
        decoded.append(list(latents))
        return decode(decoded[-1])

    monkeypatch.setattr(trained.vae, "decode_stream", watched)
    clip = encode_given(trained, config, plan, [video])
    frames = torch.stack(list(make_frames(trained, config, plan, clip, [3])), dim=1)
    assert frames.shape[1] == 21
    first, second = (torch.stack(z, dim=1) for z in decoded)
    assert torch.equal(first[:, :2], clip[:, :2])
    assert torch.equal(second[:, :2], trained.vae.encode_mean(frames[:, 8:13]))
    assert torch.equal(frames[:, :13], trained.vae.decode(first))
    assert torch.equal(frames[:, 13:], trained.vae.decode(second)[:, 5:])
    kept = made(trained, "long", given=video, length=21, context=5, overlap="keep", num=1, seed=3)
    assert torch.equal(kept[0, :13], frames[0, :13])
    assert not torch.equal(kept[0, 13:], frames[0, 13:])


@pytest.mark.parametrize("task", ["pyramid", "stream", "next-frame", "interpolate"])
def test_nothing_is_cut_where_a_frame_in_view_is_still_noisy(trained, task):
    config = generation_config(task, {"length": 33 if task in ("stream", "next-frame") else FRAMES, "steps": 8})
    plan = make_plan(trained, config, [], complete=True) if task != "interpolate" else None
    if plan is None:
        plan = TaskPlan(hold_clean(full_sequence(3, WINDOW), [0, 3]), (0, 3))
    pieces = split(plan.schedule, WINDOW)
    assert len(pieces) == (6 if task == "next-frame" else 1)
    assert pieces[-1].end == plan.schedule.shape[1]


def test_noise_on_given_frames(trained, video):
    assert given_noise("") == given_noise("0") == []
    assert [(one.level, one.multiple) for one in given_noise("50, 0.2,0.3t")] == [(50, 0), (200, 0), (0, 0.3)]
    for words in ("-1", "1001", "1.5", "1t", "0.2s", "a"):
        with pytest.raises(ValueError, match="write timesteps up to 1000"):
            given_noise(words)
    pair = [video[:1], video[9:10]]
    config = generation_config("interpolate", {"given_noise": "0.1,0.2t", "steps": 4})
    plan = make_plan(trained, config, pair)
    noisy, shown = with_noise(trained, config, plan)
    assert shown.tolist() == [100, 0, 0, 0]
    assert torch.equal(noisy.schedule[:, 3], (0.2 * plan.schedule[:, 1].double()).round().long())
    assert noisy.held == (0,)
    plain = made(trained, "interpolate", given=pair)
    assert not torch.equal(made(trained, "interpolate", given=pair, given_noise="0,0.2t"), plain)
    assert torch.equal(made(trained, "interpolate", given=pair, given_noise="0,0"), plain)
    assert torch.equal(made(trained, "interpolate", given=pair, given_noise=50)[:, 0], plain[:, 0])
    with pytest.raises(ValueError, match="3 values of noise for 2 given frames"):
        made(trained, "interpolate", given=pair, given_noise="1,2,3")
    with pytest.raises(ValueError, match="as one timestep or share of T"):
        made(trained, "stream", given=video, given_noise="0.2t")
    long = {"given": video, "length": 21, "context": 5}
    assert not torch.equal(made(trained, "long", **long, given_noise="0.2t"), made(trained, "long", **long))


def test_steps_lie_where_wan_has_them(trained):
    config = generation_config("generate", {"steps": 4})
    assert make_plan(trained, config, []).schedule[:, 0].tolist() == [1000, 900, 750, 500, 0]
    assert make_plan(trained, replace(config, shift=5.0), []).schedule[1, 0] == 938
    assert make_plan(trained, replace(config, spacing="trailing"), []).schedule[1, 0] == 750


def test_prompts_and_negative_prompts_reach_the_network(trained, pipeline):
    texts = load_text_encoder(str(pipeline), max_tokens=TOKENS)
    padded = trained.text.encode(["a dog", ""])
    expected = texts.encode(["a dog", ""])
    assert padded.shape == (2, TOKENS, 16)
    for found, embedding in zip(padded, expected, strict=True):
        assert torch.equal(found[: len(embedding)], embedding)
        assert not found[len(embedding) :].any()
    plain = made(trained)
    assert not torch.equal(plain, made(trained, prompt="a red car"))
    assert not torch.equal(plain, made(trained, prompt=""))
    pushed = made(trained, guidance=3.0)
    assert not torch.equal(pushed, made(trained, guidance=3.0, negative_prompt="a red car"))
    assert torch.equal(made(trained, guidance=3.0, negative_prompt="a dog"), plain)


def test_a_prompt_that_is_too_long_is_cut_and_said(trained, caplog):
    long = "a red car drives along the street, seen from above, in the snow"
    found = trained.text.encode([long])
    assert "is cut after 8 tokens" in caplog.text
    assert found.shape == (1, TOKENS, 16)
    caplog.clear()
    trained.text.encode([long, "a dog"])
    assert not caplog.text


def test_several_prompts_from_a_file(trained, run, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a dog\n\n a red car \n")
    config = GenerateCommand(str(run), prompts=str(path), num=2, steps=3)
    prepared = prepare(trained, config)
    assert prepared.prompts == ("a dog", "a dog", "a red car", "a red car")
    frames = make_frames(trained, config, prepared.plan, prepared.clip, range(4), prompts=prepared.prompts)
    videos = torch.stack(list(frames), dim=1)
    for prompt, seeds in (("a dog", [0, 1]), ("a red car", [2, 3])):
        alone = made(trained, prompt=prompt, seed=seeds[0])
        assert (videos[seeds].int() - alone.int()).abs().max() <= 1
    for content, sentence in (("\n", "holds no prompt"), (None, "cannot read the prompts")):
        path.unlink(missing_ok=True)
        if content:
            path.write_text(content)
        with pytest.raises(ValueError, match=sentence):
            prepare(trained, config)


def test_wrong_texts_are_refused_in_one_sentence(trained, run, tmp_path):
    def refused(sentence, call):
        with pytest.raises(ValueError, match=sentence) as caught:
            call()
        assert "\n" not in str(caught.value)

    from transformers import UMT5Config, UMT5EncoderModel

    folder = tiny_text_encoder(tmp_path / "wide")
    config = UMT5Config.from_pretrained(folder)
    config.d_model = 24
    UMT5EncoderModel(config).save_pretrained(folder)
    refused("gives 24 numbers a token, the model takes 16", lambda: made(load(run, text_encoder=str(folder))))
    refused("cannot load the text encoder", lambda: made(load(run, text_encoder=str(tmp_path / "none"))))
    refused("negative prompt acts through guidance", lambda: made(trained, negative_prompt="a dog"))
    refused("no classes", lambda: made(trained, class_="dog"))
    refused("give one prompt, or a file", lambda: GenerateCommand("r", prompt="a", prompts="b"))
    refused("trained without texts", lambda: load("example", text_encoder="t5"))
    refused("trained without texts", lambda: made(load("example"), prompt="a dog"))


def test_an_exported_model_makes_the_same_videos(trained, run, tmp_path):
    export_model(find.resolve(run), tmp_path / "model")
    again = load(tmp_path / "model")
    assert torch.equal(made(again, shift=5.0), made(trained, shift=5.0))
    rows = [{"task": "generate", "prompt": "a dog", "steps": 3, "seed": 1}]
    assert torch.equal(torch.from_numpy(predict(again, rows))[0], made(trained)[1])


def test_frames_need_not_be_square(trained, pipeline, video):
    """A task's given frames are scaled to fill them; what is held comes back as the VAE decodes it."""
    assert load(f"wan:{pipeline}").frame_size == (480, 832)
    model = copy.copy(trained.model)
    model.config = replace(model.config, size=(SIDE // 8, SIDE // 8 + 2))
    wide = replace(trained, model=model)
    clip = made(wide, "image-to-video", given=video[:1], num=1)
    assert clip.shape == (1, FRAMES, 3, SIDE, SIDE + 16)
    given = as_frames(video[:1], (SIDE, SIDE + 16))
    first = wide.vae.decode(wide.vae.encode_mean(given)[None])[0, 0]
    assert (clip[0, 0].int() - first.int()).abs().max() <= 1
