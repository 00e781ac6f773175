"""What is compared where a model takes texts, or a causal VAE made the latents."""

import pytest
import torch

from data_prep import encode_latents
from fvdm.evaluation.comparison import Comparison
from fvdm.evaluation.config import FVDConfig
from fvdm.evaluation.protocols import Clip
from fvdm.evaluation.sources import Shards
from fvdm.media.vae import sample_latents
from tests.data_fixtures import real_frames, write_video
from tests.tiny_models import tiny_pipeline, tiny_wan_run

SIDE, FRAMES, TOKENS = 32, 13, 8
CAPTIONS = ("a talking man", "a red car drives", "two people walk")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Captioned `videos`, their `latents` of a causal VAE, and a `run` of a model that takes texts."""
    root = tmp_path_factory.mktemp("texts")
    for k, caption in enumerate(CAPTIONS):
        frames = real_frames()[FRAMES * k : FRAMES * (k + 1), ::4, ::4][:, :SIDE, :SIDE]
        write_video(root / "videos" / f"{k}.mp4", frames, fps=16)
        (root / "videos" / f"{k}.txt").write_text(f"{caption}\nanother caption\n")
    pipeline = tiny_pipeline(root / "pipeline")
    tiny_wan_run(root / "run", pipeline, (4, 4, SIDE // 8, SIDE // 8), TOKENS)
    encode(root, "latents", "--size", SIDE)
    return root


def encode(root, name, *shape):
    what = ["--videos", root / "videos", "--out", root / name, *shape, "--clip-frames", FRAMES]
    pipeline = root / "pipeline"
    models = ["--vae", pipeline / "vae", "--text-encoder", pipeline, "--max-tokens", TOKENS, "--mlflow", "none"]
    assert encode_latents.run([str(word) for word in [*what, *models]]) == 0


def comparison(folder, real="videos", **changes):
    settings = {"frames": 9, "clips": 3, "steps": 1, "size": SIDE, "repeats": 2} | changes
    return Comparison(FVDConfig(str(folder / real), str(folder / "run"), **settings))


@pytest.mark.parametrize("real", ["videos", "latents"])
def test_a_model_of_texts_is_sampled_with_the_captions_of_the_real_clips(folder, real):
    task = comparison(folder, real, protocol="latte", real_stride=1)
    for draw in range(2):
        clips, fake = task.clips(draw)
        sources = [f"{k}.mp4" for k in range(3)] if real == "videos" else task.real.shards.sources
        captions = [CAPTIONS[int(sources[clip.video][0])] for clip in clips]
        assert [task.fake.prompts[clip.video] for clip in fake] == captions
        assert sorted(captions) == sorted(CAPTIONS)
    last = fake[-1]
    (ours,) = task.fake.read([last])
    (alone,) = task.fake.trained.generate(seed=last.video + task.seed, steps=1, prompt=captions[-1])
    assert torch.equal(ours, alone[:9])
    assert task.fake.describe()["prompts"] == "the first caption of each real clip"


def test_prompts_may_come_from_a_file_and_must_come_from_somewhere(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\n\na cat\n")
    task = comparison(folder, prompts=str(tmp_path / "prompts.txt"), repeats=1)
    assert task.fake.prompts == ["a dog", "a cat", "a dog"]
    frames = [path.read_bytes() for path in sorted((folder / "videos").glob("*.mp4"))]
    for k, data in enumerate(frames):
        (tmp_path / f"{k}.mp4").write_bytes(data)
    with pytest.raises(ValueError, match=r"takes texts, and not every video of .* has a caption: .*--prompts"):
        Comparison(FVDConfig(str(tmp_path), str(folder / "run"), frames=9, clips=3, size=SIDE))


def test_the_base_and_the_text_encoder_reach_the_loader(folder):
    with pytest.raises(ValueError, match="is a complete model, so it needs no base"):
        comparison(folder, base="elsewhere")
    task = comparison(folder, text_encoder="elsewhere")
    with pytest.raises(ValueError, match="cannot load the text encoder 'elsewhere'"):
        task.fake.read([Clip(0, tuple(range(9)))])


def test_clips_of_a_causal_vae_are_counted_and_read_in_pixel_frames(folder):
    shards = Shards(str(folder / "latents"), "train")
    assert shards.lengths == [FRAMES] * 3
    latents = sample_latents(torch.from_numpy(shards.shards.read(1, range(4))), shards.shards.normalisation, None)
    complete = shards.vae.decode(latents[None])
    (frames,) = shards.read([Clip(1, (1, 4, 6))])
    assert torch.equal(frames, complete[0, [1, 4, 6]])


def test_clips_that_are_not_square_are_compared_in_their_shape(folder):
    tiny_wan_run(folder / "wide", folder / "pipeline", (4, 4, 4, 6), TOKENS)
    encode(folder, "wide_latents", "--size", "32x48")
    videos, latents = (
        Comparison(FVDConfig(str(folder / real), str(folder / "wide"), frames=9, clips=3, steps=1))
        for real in ("videos", "wide_latents")
    )
    for task in (videos, latents):
        (real, *_), (fake, *_) = task.clips(0)
        assert task.real.read([real]).shape == task.fake.read([fake]).shape == (1, 9, 3, 32, 48)
    assert "real 32 x 48 pixels, fake 32 x 48 pixels" in videos.card([], [], "").values()
    folders = FVDConfig(str(folder / "videos"), str(folder / "videos"), frames=9, size="24x40")
    assert Comparison(folders).fake.read([Clip(0, tuple(range(9)))]).shape == (1, 9, 3, 24, 40)
    with pytest.raises(ValueError, match="give --size 32x32, or encode at one size"):
        Comparison(FVDConfig(str(folder / "latents"), str(folder / "wide"), frames=9, clips=3))
    with pytest.raises(ValueError, match="'40x' is no shape"):
        Comparison(FVDConfig(str(folder / "videos"), str(folder / "videos"), frames=9, size="40x"))


def test_shards_of_several_shapes_are_refused(folder):
    wide = real_frames()[:FRAMES, ::4, ::4][:, :24, :40]
    write_video(folder / "shapes" / "videos" / "wide.mp4", wide, fps=16)
    write_video(folder / "shapes" / "videos" / "square.mp4", wide[:, :, :24], fps=16)
    (folder / "shapes" / "pipeline").symlink_to(folder / "pipeline")
    encode(folder / "shapes", "latents", "--buckets", "32x48,32x32", "--uncaptioned", "empty")
    with pytest.raises(ValueError, match="holds clips of 32 x 32, 32 x 48: FVD compares clips of one size"):
        Shards(str(folder / "shapes" / "latents"), "train")
