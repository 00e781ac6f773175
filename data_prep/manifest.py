"""Ends an encoding: the manifest, and of format 2 the tables of samples and the empty prompt's embedding."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.config import EncodeConfig
from data_prep.planning import WORK, EncodePlan
from data_prep.samples import file_sha256, video_key
from data_prep.spec import EncodeSpec
from fvdm.data import former
from fvdm.data.format import (
    CLIP_FORMAT,
    EMPTY_PROMPT,
    Bucket,
    ClipManifest,
    ClipShard,
    IndexInfo,
    TextEncoderInfo,
    index_file,
)
from fvdm.data.index import write_index
from fvdm.files import atomic_write, write_text

if TYPE_CHECKING:
    from fvdm.media.frames import FrameMap
    from fvdm.media.vae import VAE


def make_buckets(spec: EncodeSpec, frame_map: "FrameMap", factor: int) -> list[Bucket]:
    """The shapes that samples can have: of clips, then of images where these are another shape."""
    frames = frame_map.latent_frames(spec.read.frames)
    kinds = [frames, 1] if _images_apart(spec) else [frames]
    return [Bucket(kind, h // factor, w // factor, (h, w)) for kind in kinds for h, w in spec.read.sizes]


def bucket_of(spec: EncodeSpec, size: int, still: bool) -> int:
    """Index of a sample's bucket among `make_buckets`; `size` is that of its shape among the sizes."""
    return size + len(spec.read.sizes) if still and _images_apart(spec) else size


def _images_apart(spec: EncodeSpec) -> bool:
    return spec.read.images and spec.read.frames != 1


def finish(
    config: EncodeConfig, out: Path, plan: EncodePlan, vae: "VAE", rejected: int
) -> former.Manifest | ClipManifest:
    """Ends an encoding: writes the manifest of the plan's format, and of format 2 the tables of samples before it.

    Args:
        config: the settings, for the names of the models.
        out: the folder of shards, all of which are complete.
        plan: what was made.
        vae: what encoded it.
        rejected: number of videos that could not be used.
    """
    manifest: former.Manifest | ClipManifest
    if plan.spec.format == 1:
        height, width = plan.spec.read.sizes[0]
        manifest = former_manifest(
            out,
            plan,
            vae=config.vae,
            vae_identity=vae.identity,
            normalisation=vae.normalisation.to_dict(),
            latent_shape=(vae.channels, height // vae.factor, width // vae.factor),
            size=height,
            dtype=plan.spec.dtype,
            flip=plan.spec.flip,
            preprocess=plan.settings["preprocess"],
            rejected=rejected,
        )
    else:
        manifest = _clip_manifest(config, out, plan, vae, rejected)
    write_manifest(out, manifest)
    return manifest


def write_manifest(out: Path, manifest: former.Manifest | ClipManifest) -> None:
    """Writes the manifest, when every shard is complete, and removes what is left of the work."""
    write_text(out / "manifest.json", manifest.to_json())
    shutil.rmtree(out / WORK, ignore_errors=True)
    for leftover in out.glob(".tmp-*"):  # of processes that were killed
        leftover.unlink(missing_ok=True)


def former_manifest(out: Path, plan: EncodePlan, **metadata: Any) -> former.Manifest:
    """The manifest of format 1; `metadata` are its fields that the plan does not know."""
    shards = [
        former.ShardInfo(
            name,
            split,
            len(index["samples"]),
            sum(row["frames"] for row in index["samples"]),
            (out / name).stat().st_size,
            index["sha256"],
            hashlib.sha256(data).hexdigest(),
        )
        for name, split, index, data in _indices(out, plan)
    ]
    values = {"format": former.FORMAT, "layout": plan.layout, "classes": tuple(plan.classes), "shards": tuple(shards)}
    return former.Manifest(**values | metadata)


def _indices(out: Path, plan: EncodePlan) -> Iterator[tuple[str, str, dict[str, Any], bytes]]:
    """Name, split, index and the index's bytes of each shard that holds samples."""
    for shard in plan.shards:
        data = (out / former.index_name(shard.name)).read_bytes()
        index = json.loads(data)
        if index["samples"]:
            yield shard.name, shard.split, index, data


def _clip_manifest(config: EncodeConfig, out: Path, plan: EncodePlan, vae: "VAE", rejected: int) -> ClipManifest:
    spec = plan.spec
    shards, uncaptioned = [], 0
    counts: Counter[tuple[int, str]] = Counter()
    for name, split, index, _ in _indices(out, plan):
        rows = index["samples"]
        shards.append(ClipShard(name, split, len(rows), (out / name).stat().st_size, index["sha256"]))
        counts.update((row["bucket"], split) for row in rows)
        if spec.captioned:
            uncaptioned += sum(not plan.captions[int(video_key(row["key"]))] for row in rows)
    buckets = make_buckets(spec, vae.frame_map, vae.factor)
    for number, bucket in enumerate(buckets):
        bucket.counts.update({split: n for (of, split), n in sorted(counts.items()) if of == number})
    return ClipManifest(
        format=CLIP_FORMAT,
        vae=config.vae,
        vae_class=type(vae.model).__name__,
        vae_identity=vae.identity,
        temporal_stride=vae.frame_map.stride,
        channels=vae.channels,
        normalisation=vae.normalisation.to_dict(),
        dtype=spec.dtype,
        flip=spec.flip,
        layout=plan.layout,
        preprocess=plan.settings["preprocess"],
        classes=tuple(plan.classes),
        text=_text_encoder(config, out, spec),
        buckets=tuple(buckets),
        indices=tuple(_write_table(out, plan, split) for split in dict.fromkeys(shard.split for shard in shards)),
        shards=tuple(shards),
        rejected=rejected,
        uncaptioned=uncaptioned,
    )


def _text_encoder(config: EncodeConfig, out: Path, spec: EncodeSpec) -> TextEncoderInfo | None:
    if not spec.text_identity:
        return None
    path = out / EMPTY_PROMPT
    import numpy as np

    width = np.load(path, allow_pickle=False).shape[1]
    names = (EMPTY_PROMPT, file_sha256(path))
    return TextEncoderInfo(config.text_encoder, spec.text_identity, width, spec.max_tokens, *names)


def _write_table(out: Path, plan: EncodePlan, split: str) -> IndexInfo:
    """Writes the table of a split's samples from the indices of its shards."""
    path = out / index_file(split)
    of_split = (index["samples"] for _, found, index, _ in _indices(out, plan) if found == split)
    shards = ([row | {"source": os.fsencode(row["source"])} for row in rows] for rows in of_split)
    with atomic_write(path) as temporary:
        rows = write_index(temporary, shards)
    return IndexInfo(path.name, split, rows, path.stat().st_size, file_sha256(path))
