"""Format 2 by the command: clips of a causal VAE, buckets, images and captions, beside diffusers and transformers."""

import json
import shutil
import threading

import diffusers
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from data_prep.config import EncodeConfig, resolve
from data_prep.decoding import Restarted, decode
from data_prep.encode_latents import run
from data_prep.encoder import open_models
from data_prep.encoding import encode_shards
from data_prep.planning import make_plan
from data_prep.shards import Work
from fvdm.config import parse
from fvdm.data.config import DataConfig
from fvdm.data.loader import batches
from fvdm.data.shards import LatentShards, to_float32
from fvdm.media.clips import ClipSpec, read_clips
from fvdm.media.preprocess import Preprocess
from fvdm.media.text import load_text_encoder
from fvdm.media.vae import load_vae
from tests.data_fixtures import cut, make_vae, rejected, write_frames, write_video
from tests.data_prep.killing import kill_encodings
from tests.data_prep.test_encode_latents import contents
from tests.tiny_models import tiny_text_encoder, tiny_wan_vae

SIZES = ((48, 64), (64, 48))
CAPTIONS = {"0": "a talking man\nin front of a wall", "1": "a red car", "3": "a &amp; b", "still": "a beach"}
FORM = ["--clip-frames", "9", "--clip-every", "8", "--fps", "12.5", "--buckets", "48x64,64x48", "--images", "--flip"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_wan_vae(folder / "vae")
    tiny_text_encoder(folder / "text")
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two lying and two standing clips of 40 frames, one of them without a caption; an image; a corrupt file."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(4):
        frames = cut(number, 40)
        write_video(folder / f"{number}.mp4", frames.transpose(0, 2, 1, 3) if number % 2 else frames)
    Image.fromarray(cut(0)[0]).save(folder / "still.png")
    (folder / "4.mp4").write_bytes(b"corrupt")
    (folder / "4.txt").write_text("a dog")
    for name, text in CAPTIONS.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def words(videos, out, models, *more, form=FORM, text=True):
    given = ["--videos", str(videos), "--out", str(out), "--vae", str(models / "vae"), "--device", "cpu"]
    given += ["--mlflow", "none", "--workers", "2", "--shard-mb", "0.06", *form]
    given += ["--text-encoder", str(models / "text"), "--max-tokens", "8"] if text else []
    return [*given, *more]


def encode(videos, out, models, *more, **options):
    return run(words(videos, out, models, *more, **options))


@pytest.fixture(scope="module")
def encoded(videos, models, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded") / "out"
    assert encode(videos, out, models, "--uncaptioned", "empty") == 3
    return out


def pixels(videos, source, sample, shards):
    """The frames of a sample, read again: uint8 (f 3 h w)."""
    spec = ClipSpec(SIZES, Preprocess(antialias=True), 100, 9, 8, 12.5, images=True)
    first = shards.samples.number("first", sample)
    pieces = [item for item in read_clips(videos / source, spec) if hasattr(item, "first")]
    return torch.from_numpy(next(piece.frames for piece in pieces if piece.first == first and piece.last))


def test_what_is_made(encoded, capsys):
    shards = LatentShards(encoded)
    sources = [name for name in ("0.mp4", "1.mp4", "2.mp4", "3.mp4") for _ in range(2)] + ["still.png"]
    assert shards.sources == sources
    assert len(shards.shards) >= 2
    assert list(rejected(encoded)) == ["4.mp4"]
    lying, standing = (3, 4, 6, 8), (3, 4, 8, 6)
    assert [shards.shape(k) for k in range(9)] == [lying, lying, standing, standing] * 2 + [(1, 4, 6, 8)]
    made = shards.manifest
    assert [dict(bucket.counts) for bucket in made.buckets] == [{"train": 4}, {"train": 4}, {"train": 1}, {}]
    assert (made.uncaptioned, made.rejected, made.temporal_stride, made.vae_class) == (2, 1, 4, "AutoencoderKLWan")
    assert shards.samples.numbers("first", 0, 4).tolist() == [0, 8, 0, 8]
    assert set(shards.samples.table.column("fps").to_pylist()[:8]) == {12.5}


def test_clips_are_diffusers_own_encoding_and_prefixes_are_exact(videos, models, encoded):
    shards = LatentShards(encoded)
    model = diffusers.AutoencoderKLWan.from_pretrained(models / "vae").eval()
    vae = load_vae(str(models / "vae"))
    for sample, source in enumerate(shards.sources):
        frames = pixels(videos, source, sample, shards)
        for flip in (False, True):
            x = (frames.flip(-1) if flip else frames).float() / 127.5 - 1
            with torch.no_grad():
                theirs = model.encode(x.transpose(0, 1)[None]).latent_dist
            expected = torch.cat([theirs.mean, theirs.logvar], 1)[0].transpose(0, 1).numpy()
            found = shards.read(sample, np.arange(shards.frames[sample]), flip=flip)
            assert np.abs(found - expected).max() < 2e-3 * max(1, np.abs(expected).max())
        prefix = vae.encode(frames[:5] if len(frames) > 1 else frames).half().float().numpy()
        assert np.array_equal(shards.read(sample, np.arange(len(prefix))), prefix)


def test_a_stored_clip_decodes_to_its_frames(videos, models, encoded):
    """To the VAE's own error: decoding what is stored is decoding what was never stored, and has all frames."""
    shards, vae = LatentShards(encoded), load_vae(str(models / "vae"))
    for sample in (0, 8):
        frames = pixels(videos, shards.sources[sample], sample, shards)
        moments = torch.from_numpy(shards.read(sample, np.arange(shards.frames[sample])))
        mean = vae.normalisation.apply(moments.chunk(2, 1)[0])
        parts = list(vae.decode_stream(z[None] for z in mean))
        decoded = torch.cat([part[0] for part in parts])
        assert decoded.shape == frames.shape
        assert [part.shape[1] for part in parts] == [len(vae.frame_map.span(k)) for k in range(len(parts))]
        unstored = vae.decode(vae.encode_mean(frames))
        assert (decoded.int() - unstored.int()).abs().max() <= 2


def test_embeddings_are_the_encoders(models, encoded):
    shards = LatentShards(encoded)
    encoder = load_text_encoder(str(models / "text"), max_tokens=8)
    assert shards.manifest.text.identity == encoder.identity
    for sample, source in enumerate(shards.sources):
        texts = CAPTIONS.get(source.split(".")[0], "").split("\n")
        for caption, expected in enumerate(encoder.encode(texts)):
            assert np.array_equal(shards.embedding(sample, caption), expected.half().float().numpy())
    assert len(shards.samples.value("tokens", 0)) == 2
    assert shards.samples.value("tokens", 4) == []


def test_webdataset_reads_everything(encoded):
    """The five lines of docs/data.md."""
    urls = [str(path) for path in sorted(encoded.glob("train-*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    shards = LatentShards(encoded)
    assert [sample["__key__"] for sample in samples] == shards.keys
    for number, sample in enumerate(samples):
        found = to_float32(sample["moments.npy"].tobytes(), shards.manifest.dtype)
        assert np.array_equal(found, shards.read(number, np.arange(shards.frames[number])).ravel())
        captions, tokens = sample["json"]["captions"], sample["json"]["tokens"]
        assert captions == [text for text in CAPTIONS.get(sample["json"]["source"][:-4], "").split("\n") if text]
        parts = np.split(sample["embeddings.npy"], np.cumsum(tokens)[:-1]) if captions else []
        for caption, part in enumerate(parts):
            assert np.array_equal(part.astype(np.float32), shards.embedding(number, caption))


@pytest.mark.parametrize(
    "more", [("--workers", "1", "--encoders", "3"), pytest.param(("--jobs", "2"), marks=pytest.mark.slow)]
)
def test_bytes_do_not_depend_on_workers_or_jobs(videos, models, encoded, tmp_path, more):
    assert encode(videos, tmp_path / "out", models, "--uncaptioned", "empty", *more) == 3
    assert contents(tmp_path / "out") == contents(encoded)


def test_bytes_do_not_depend_on_decoders_that_begin_again(videos, models, encoded, tmp_path, monkeypatch):
    """Each decoder gives up in its second clip, and the video is read from its start; tests/media kills real ones."""

    def decode_again(tasks, **options):
        items = {}
        for number, item in decode(tasks, **options):
            items.setdefault(number, []).append(item)
        for number, found in items.items():
            yield from ((number, item) for item in found[: len(found) // 2])
            yield number, Restarted()
            yield from ((number, item) for item in found)

    monkeypatch.setattr("data_prep.encoding.decode", decode_again)
    assert encode(videos, tmp_path / "out", models, "--uncaptioned", "empty") == 3
    assert contents(tmp_path / "out") == contents(encoded)


def test_a_video_without_a_caption(videos, models, tmp_path, capsys):
    out = tmp_path / "out"
    assert encode(videos, out, models) == 2
    assert "1 of 6 videos have no caption, for example '2.mp4': give each a text file" in capsys.readouterr().err
    assert encode(videos, out, models, "--uncaptioned", "skip") == 3
    assert rejected(out)["2.mp4"] == "it has no caption (--uncaptioned skip)"
    assert "2.mp4" not in LatentShards(out).sources
    assert encode(videos, out, models, "--uncaptioned", "empty") == 2
    assert "1 new, 0 gone, for example '2.mp4'" in capsys.readouterr().err
    other = shutil.copytree(videos, tmp_path / "other")
    (other / "1.txt").write_text("a blue car")
    assert encode(other, out, models, "--uncaptioned", "skip") == 2
    assert "The captions are not those that" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_captions_from_one_file(videos, models, tmp_path, suffix):
    """Several captions of a video; without a text encoder they are stored as they are."""
    rows = [("0.mp4", "one, and more"), ("1.mp4", "zwei\nZeilen äöü"), ("./0.mp4", "another"), ("gone.mp4", "x")]
    path = tmp_path / f"captions.{suffix}"
    if suffix == "csv":
        quoted = [f'{name},"{text}"' for name, text in rows]
        path.write_text("\ufefffile,caption\n" + "\n".join(quoted) + "\n", encoding="utf-8")
    else:
        listed = [{"file": name, "caption": [text] if number else text} for number, (name, text) in enumerate(rows)]
        path.write_text("\n".join(json.dumps(row) for row in listed))
    more = ("--captions", str(path), "--uncaptioned", "skip")
    assert encode(videos, tmp_path / "out", models, *more, text=False) == 3
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    found = {sample["json"]["source"]: sample["json"] for sample in webdataset.WebDataset(urls).decode()}
    assert {name: row["captions"] for name, row in found.items()} == {
        "0.mp4": ["one, and more", "another"],
        "1.mp4": ["zwei\nZeilen äöü"],
    }
    assert LatentShards(tmp_path / "out").manifest.text is None


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ((), "encodes clips, each from its own first frame: give --clip-frames, such as --clip-frames 81"),
        (("--clip-frames", "10"), "it takes 1 frame and 4 more for each further latent, such as 9 or 13"),
        (("--clip-every", "3"), "--clip-every says where clips begin: give --clip-frames, too"),
        (("--clip-frames", "9", "--format", "1"), "--format 1 holds whole videos of square frames: leave out"),
        (("--clip-frames", "9", "--size", "30x40"), "--size 30x40 is no multiple of 8"),
        (("--clip-frames", "9", "--size", "30by40"), "'30by40' is no shape: write height x width"),
        (("--clip-frames", "9", "--buckets", "48"), "'48' is no shape: write height x width"),
        (("--clip-frames", "9", "--buckets", "8x8", "--size", "8"), "--size and --buckets both say"),
        (("--clip-frames", "9", "--fps", "0"), "fps is 0.0: it must be a number above 0"),
        (("--clip-frames", "9", "--captions", "x.txt"), "Cannot read the captions 'x.txt'"),
    ],
)
def test_misuse_is_a_sentence_and_2(videos, models, tmp_path, capsys, more, sentence):
    assert encode(videos, tmp_path / "out", models, *more, form=(), text=False) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_videos_too_short_for_a_clip_and_no_text_encoder_are_sentences(videos, models, tmp_path, capsys):
    assert encode(videos, tmp_path / "out", models, form=("--clip-frames", "41"), text=False) == 2
    assert rejected(tmp_path / "out")["0.mp4"] == "too short: 40 frames, 41 are needed"
    assert encode(videos, tmp_path / "o", models, "--text-encoder", "nowhere", text=False) == 2
    assert "cannot load the text encoder 'nowhere'" in capsys.readouterr().err


def test_whole_videos_of_an_image_vae_in_format_2(videos, tmp_path):
    """The same latents as in format 1, and one bucket for videos of any length."""
    make_vae(tmp_path / "vae")
    common = ("--size", "48", "--antialias", "--no-flip")
    for form in ("1", "2"):
        assert encode(videos, tmp_path / form, tmp_path, *common, "--format", form, form=(), text=False) == 3
    old, new = LatentShards(tmp_path / "1"), LatentShards(tmp_path / "2")
    assert (old.sources, old.frames.tolist()) == (new.sources, new.frames.tolist())
    assert [bucket.frames for bucket in new.manifest.buckets] == [0]
    for sample in range(len(old)):
        frames = np.arange(old.frames[sample])
        assert np.array_equal(old.read(sample, frames), new.read(sample, frames))


def test_resume_at_another_world_size_in_the_middle_of_an_epoch(encoded):
    """Buckets, images and captions: each step's samples, latents and conditions are those of the undisturbed run."""
    config = DataConfig(str(encoded), frames=3, batch_size=4, workers=0)

    def steps(world_size, start, count):
        ranks = [
            batches(LatentShards(encoded), config, rank=rank, world_size=world_size, seed=3, start=start)
            for rank in range(world_size)
        ]
        for _ in range(count):
            parts = [next(rank) for rank in ranks]
            found = {}
            for part in parts:
                rows = zip(part.positions, part.keys, part.x_0, part.y, strict=True)
                found |= {place: (key, x_0, y) for place, key, x_0, y in rows}
            yield parts[0].consumed, [found[place] for place in sorted(found)]

    undisturbed = list(steps(1, 0, 9))
    resumed = list(steps(2, 0, 4))
    resumed += list(steps(4, resumed[-1][0], 2))
    resumed += list(steps(1, resumed[-1][0], 3))
    shapes = set()
    for (consumed, step), (other, again) in zip(undisturbed, resumed, strict=True):
        assert consumed == other
        assert [key for key, *_ in step] == [key for key, *_ in again]
        for (_, x_0, y), (_, x_0_again, y_again) in zip(step, again, strict=True):
            assert torch.equal(x_0, x_0_again)
            assert torch.equal(y, y_again)
            shapes.add(tuple(x_0.shape))
    assert shapes == {(3, 4, 6, 8), (3, 4, 8, 6), (1, 4, 6, 8)}


def test_notes_of_videos_are_printed(models, tmp_path, capsys):
    """A pause that is shortened, and a frame rate that nobody knows."""
    times = [number / 25 for number in range(20)] + [60 + number / 25 for number in range(20)]
    write_video(tmp_path / "v" / "pause.mkv", cut(0, 40), times=times)
    write_frames(tmp_path / "v" / "frames", cut(0, 10), [f"{number}.png" for number in range(10)])
    form = ("--clip-frames", "9", "--size", "32", "--fps", "12")
    assert encode(tmp_path / "v", tmp_path / "out", models, form=form, text=False) == 0
    error = capsys.readouterr().err
    assert "note 'pause.mkv': a pause is shortened to 8 frames each" in error
    assert "note 'frames': its frame rate is unknown: its frames are taken as they are, not at 12 fps" in error


def test_text_embeddings_that_are_not_finite_reject_the_video(videos, models, tmp_path, monkeypatch):
    def encode_captions(encoder, captions):
        return [torch.full((2, 16), torch.inf if "car" in text else 1.0) for text in captions]

    monkeypatch.setattr("fvdm.media.text.TextEncoder.encode", encode_captions)
    assert encode(videos, tmp_path / "out", models, "--uncaptioned", "skip") == 3
    assert rejected(tmp_path / "out")["1.mp4"] == "the text embeddings are not finite in float16"
    assert "0.mp4" in LatentShards(tmp_path / "out").sources


@pytest.mark.slow
def test_killed_twenty_times(models, tmp_path):
    """Kill -9 of a bucketed, captioned encoding: the same bytes as undisturbed; none twice, none lost."""
    for number in range(40):
        frames = cut(number, 20)
        write_video(tmp_path / "v" / f"{number:02d}.mp4", frames.transpose(0, 2, 1, 3) if number % 3 else frames)
        (tmp_path / "v" / f"{number:02d}.txt").write_text(f"a talking man\na red car {number}")
    (tmp_path / "v" / "07.mp4").write_bytes(b"corrupt")
    assert encode(tmp_path / "v", tmp_path / "good", models) == 3
    given = words(tmp_path / "v", tmp_path / "out", models)
    kill_encodings(given, tmp_path / "out", tmp_path / "good", 20)
    assert encode(tmp_path / "v", tmp_path / "out", models) == 3
    assert contents(tmp_path / "out") == contents(tmp_path / "good")
    keys = LatentShards(tmp_path / "out").keys
    assert len(set(keys)) == len(keys) == 39


def test_frames_are_reported_while_the_first_clip_is_encoded(videos, models, tmp_path, monkeypatch):
    """The VAE continues with a clip only when its first frames were reported."""
    (tmp_path / "v").mkdir()
    shutil.copy(videos / "0.mp4", tmp_path / "v")
    form = ("--size", "48", "--clip-frames", "37")
    config = resolve(parse(EncodeConfig, words(tmp_path / "v", tmp_path / "out", models, form=form, text=False)))
    (tmp_path / "out").mkdir()
    opened = open_models(config)
    plan = make_plan(config, opened.vae)
    reported, encode_stream, seen = threading.Event(), opened.vae.encode_stream, []

    def stream(spans):
        for count, part in enumerate(encode_stream(spans)):
            assert not count or reported.wait(60)
            yield part

    def report(progress):
        seen.append((progress.frames, progress.videos))
        if progress.frames:
            reported.set()

    monkeypatch.setattr(opened.vae, "encode_stream", stream)
    encode_shards(config, Work(tmp_path / "out", plan), plan.shards, opened, report)
    assert (1, 0) in seen
    assert seen[-1] == (37, 1)
    assert plan.estimates == [37]
