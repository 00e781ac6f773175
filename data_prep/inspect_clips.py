"""What inspect_shards.py checks and shows of format 2: clips of any shape, their captions, and the order of a run."""

import base64
import hashlib
import html
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.samples import file_sha256
from fvdm.data.clips import index_shard, read_clip
from fvdm.data.format import ClipManifest, ClipShard

if TYPE_CHECKING:
    from fvdm.data.format import Clip
    from fvdm.data.shards import LatentShards
    from fvdm.media.vae import VAE

ROWS, COLUMNS, HEIGHT = 12, 8, 96  # of the contact sheet: clips, frames of each, and their height in pixels
STEPS = 24  # of the order that is shown
STYLE = """
body { font: 14px/1.4 sans-serif; margin: 24px; color: #222 }
figure { margin: 0 0 18px } img { display: block; max-width: 100%; border: 1px solid #ccc }
figcaption { margin-top: 4px } .what { color: #666; font-size: 12px } h2 { font-size: 16px; margin: 28px 0 8px }
"""


def verify_clips(folder: Path, manifest: ClipManifest) -> Iterator[str]:
    """Reads every byte of every shard; yields one line per problem."""
    from fvdm.data.shards import LatentShards

    files = [(index.name, index.sha256) for index in manifest.indices]
    files += [(manifest.text.empty_prompt, manifest.text.empty_prompt_sha256)] if manifest.text else []
    missing = [name for name, _ in files if not (folder / name).exists()]
    wrong = [name for name, digest in files if name not in missing and file_sha256(folder / name) != digest]
    yield from (f"{name} is missing" for name in missing)
    yield from (f"{name} is not the file that was written (sha256 differs)" for name in wrong)
    bad = [line for shard in manifest.shards for line in _verify_tar(folder, shard)]
    yield from bad
    if not (missing or wrong or bad):
        for split in dict.fromkeys(shard.split for shard in manifest.shards):
            yield from _verify_samples(folder, LatentShards(folder, split))


def _verify_tar(folder: Path, shard: ClipShard) -> Iterator[str]:
    if not (folder / shard.name).exists():
        yield f"{shard.name} is missing"
    elif file_sha256(folder / shard.name) != shard.sha256:
        yield f"{shard.name} is not the file that was written (sha256 differs)"


def _verify_samples(folder: Path, shards: "LatentShards") -> Iterator[str]:
    """Problems of the table of a split, and of the numbers of every sample."""
    keys = set()
    for number, shard in enumerate(shards.shards):
        first = int(shards.first[number])
        rows = list(index_shard(folder / shard.name))
        table = shards.samples.table.slice(first, shard.samples).to_pylist()
        if [{**row, "fps": None} for row in rows] != [{**row, "fps": None} for row in table]:
            yield f"{shard.name} and the table of samples disagree"
            continue
        for sample, clip in enumerate(_clips(folder, shard.name), first):
            key = shards.samples.value("key", sample)
            problem = "is there twice" if key in keys else _wrong(shards, sample, clip)
            keys.add(key)
            if problem:
                yield f"{shard.name}: {clip.source!a} ({key}) {problem}"


def _wrong(shards: "LatentShards", sample: int, clip: "Clip") -> str:
    frames = np.arange(clip.frames)
    arrays = [shards.read(sample, frames, flip=flip) for flip in ([False, True] if shards.manifest.flip else [False])]
    text = shards.manifest.text
    arrays += [shards.embedding(sample, k) for k in range(len(clip.tokens))] if text is not None else []
    if not all(np.isfinite(array).all() for array in arrays):
        return "has numbers that are not finite"
    digest = hashlib.sha256(b"".join(_bytes(array, shards.manifest.dtype) for array in arrays)).hexdigest()
    return "" if digest == clip.sha256 else "does not have its checksum"


def _bytes(array: np.ndarray, dtype: str) -> bytes:
    import torch

    return torch.from_numpy(array).to(getattr(torch, dtype)).view(torch.uint16).numpy().tobytes()


def _clips(folder: Path, shard: str) -> Iterator["Clip"]:
    """What the shard says of each of its samples, in order."""
    import tarfile

    with tarfile.open(folder / shard) as tar:
        for member in tar:
            if member.name.endswith(".json"):
                file = tar.extractfile(member)
                assert file is not None
                yield read_clip(file.read())


def describe(folder: Path, manifest: ClipManifest, batch_size: int) -> str:
    """Tables of the splits, the buckets and the captions, and the order of a run, as text."""
    from fvdm.data.shards import LatentShards

    lines = [
        f"{folder}: clips of the VAE {manifest.vae} ({manifest.vae_class}, {manifest.temporal_stride} pixel frames per "
        f"latent frame, {manifest.vae_identity}), {manifest.channels} channels as {manifest.dtype}"
        f"{', with flipped copies' if manifest.flip else ''}; layout {manifest.layout}; {manifest.rejected} videos "
        "rejected",
        f"{'split':<8}{'shards':>8}{'clips':>10}{'hours':>9}{'captions':>10}{'tokens':>9}{'MB':>10}",
    ]
    for split in dict.fromkeys(shard.split for shard in manifest.shards):
        shards = LatentShards(folder, split)
        table = shards.samples.table
        tokens = [n for of in table.column("tokens").to_pylist() for n in of]
        rates, lengths = table.column("fps").to_pylist(), table.column("length").to_pylist()
        hours = sum(length / fps for length, fps in zip(lengths, rates, strict=True) if fps == fps) / 3600
        mean = f"{sum(tokens) / len(tokens):.1f}" if tokens else "-"
        size = sum(shard.bytes for shard in shards.shards) / 1e6
        lines.append(
            f"{split:<8}{len(shards.shards):>8}{len(shards):>10}{hours:>9.2f}{len(tokens):>10}{mean:>9}{size:>10.1f}"
        )
    lines.append(f"{'bucket':<8}{'pixels':>12}{'latents':>14}   clips")
    for number, bucket in enumerate(manifest.buckets):
        counts = ", ".join(f"{count} {split}" for split, count in bucket.counts.items()) or "none"
        shape = f"{bucket.frames or 'any'} x {bucket.height} x {bucket.width}"
        lines.append(f"{number:<8}{bucket.size[0]:>6} x {bucket.size[1]:<4}{shape:>13}   {counts}")
    if manifest.text is not None:
        text = manifest.text
        lines.append(
            f"captions: text encoder {text.name} ({text.identity}), width {text.width}, at most {text.max_tokens} "
            f"tokens; {manifest.uncaptioned} clips without a caption take the empty prompt"
        )
    return "\n".join([*lines, _order(folder, manifest, batch_size)])


def _order(folder: Path, manifest: ClipManifest, batch_size: int) -> str:
    """How a run would go through the first split."""
    from fvdm.data.config import DataConfig
    from fvdm.data.sequence import SampleSequence
    from fvdm.data.shards import LatentShards

    frames = max(bucket.frames for bucket in manifest.buckets) or 1
    shards = LatentShards(folder, manifest.shards[0].split)
    sequence = SampleSequence(shards, DataConfig(str(folder), frames=frames, batch_size=batch_size), 0, batch_size)
    steps = " ".join(str(sequence.at(step * batch_size).bucket) for step in range(STEPS))
    sources = ", ".join(ascii(shards.sources[sequence.at(place).row]) for place in range(min(4, batch_size)))
    return (
        f"order (seed 0, batch size {batch_size}, {sequence.lanes} lanes): an epoch is {sequence.schedule.period} "
        f"steps; buckets of the first {STEPS}: {steps}; the first samples are of {sources}"
    )


def write_page(folder: Path, made: ClipManifest, to: Path, vae: "VAE") -> Path:
    """Writes contact_sheet.html: frames decoded from clips of every bucket, with their captions; returns its path."""
    from data_prep.shards import atomic
    from fvdm.data.shards import LatentShards

    shards = LatentShards(folder, made.shards[0].split)
    parts = [f"<h1>{html.escape(folder.resolve().name)}</h1><p>{len(shards)} clips, VAE {html.escape(made.vae)}</p>"]
    every = shards.samples.numbers("bucket", 0, len(shards))
    used = [number for number in range(len(made.buckets)) if (every == number).any()]
    for number in used:
        bucket = made.buckets[number]
        of_bucket = np.flatnonzero(every == number)
        latents = f"{bucket.frames or 'any'} x {bucket.height} x {bucket.width}"
        parts.append(
            f"<h2>bucket {number}: {bucket.size[0]} x {bucket.size[1]} pixels, {latents} latents, {len(of_bucket)} "
            "clips</h2>"
        )
        spread = np.linspace(0, len(of_bucket) - 1, max(2, ROWS // len(used))).round().astype(int)
        parts += [_figure(folder, shards, vae, int(of_bucket[k])) for k in np.unique(spread)]
    page = f'<!doctype html><meta charset="utf-8"><title>clips</title><style>{STYLE}</style>' + "\n".join(parts)
    with atomic(to / "contact_sheet.html") as file:
        file.write(page.encode(errors="backslashreplace"))
    return to / "contact_sheet.html"


def _figure(folder: Path, shards: "LatentShards", vae: "VAE", sample: int) -> str:
    from PIL import Image

    frames = decode_clip(shards, vae, sample, COLUMNS)
    strip = Image.fromarray(np.concatenate(list(frames), axis=2).transpose(1, 2, 0))
    strip = strip.resize((max(1, round(strip.width * HEIGHT / strip.height)), HEIGHT), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    strip.save(buffer, format="png")
    shard = shards.shards[int(np.searchsorted(shards.first, sample, side="right")) - 1]
    clip = list(_clips(folder, shard.name))[sample - int(shards.first[shards.shards.index(shard)])]
    captions = "<br>".join(html.escape(text) for text in clip.captions) or "<i>no caption</i>"
    rate = f" at {clip.fps:g} fps" if clip.fps else ""
    last = clip.window.first + clip.window.frames - 1
    tokens = f", tokens {', '.join(map(str, clip.tokens))}" if clip.tokens else ""
    what = f"{clip.source}, frames {clip.window.first} to {last}{rate}, {clip.frames} latent frames{tokens}"
    source = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{source}" alt=""><figcaption>{captions}'
        f'<div class="what">{html.escape(what)}</div></figcaption></figure>'
    )


def decode_clip(shards: "LatentShards", vae: "VAE", sample: int, count: int) -> np.ndarray:
    """Frames of a clip, spread evenly, decoded from the mean of its latents: uint8 (count or fewer, 3, h, w).

    The clip is decoded from its first frame on, in memory that does not grow with it where the VAE has a cache.
    """
    import torch

    from fvdm.media.vae import sample_latents

    total = int(shards.frames[sample])
    pixels = vae.frame_map.pixel_frames(total)
    chosen = set(np.linspace(0, pixels - 1, count).round().astype(int).tolist())
    # Of an image VAE only the frames that are shown are read.
    read = range(total) if vae.is_video else sorted(chosen)

    def latents() -> Iterator["torch.Tensor"]:
        for frame in read:
            moments = torch.from_numpy(shards.read(sample, np.array([frame])))
            yield sample_latents(moments, shards.normalisation, None)

    found, number = [], 0
    for part in vae.decode_stream(latents()):
        for frame in part[0]:
            if not vae.is_video or number in chosen:
                found.append(frame.cpu().numpy())
            number += 1
    return np.stack(found)
