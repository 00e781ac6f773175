"""Decides what an encoding run makes: lists the videos, fixes the settings, shares the videos out to shards."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.captions import Captions, find_captions
from data_prep.config import EncodeConfig, StrictError
from data_prep.spec import EncodeSpec, make_spec
from fvdm.files import write_text
from fvdm.media.layouts import Listing, Source, list_videos

if TYPE_CHECKING:
    from fvdm.media.text import TextEncoder
    from fvdm.media.vae import VAE

WORK = ".work"  # folder of the parts of shards, in the folder of the shards


@dataclass(frozen=True)
class ShardPlan:
    """One shard to make: its file name, its split, and its videos as a range of the plan's sources."""

    name: str
    split: str
    first: int
    end: int


@dataclass(frozen=True)
class EncodePlan:
    """What a run makes, decided before it begins and kept in `plan.json`.

    Attributes:
        videos: the folder of the videos, absolute; the names of the sources are relative to it.
        settings: all settings that change the bytes, see `spec`; a run with others is refused.
        layout: the recognised layout.
        classes: class names by label.
        sources: the videos, the splits one after the other.
        estimates: estimated number of frames of each.
        rejected: `(name, reason)` of what could not be opened when the plan was made.
        shards: the shards.
        captions: those of each video, in the order of the sources; empty where captions are not stored.
    """

    videos: str
    settings: dict[str, Any]
    layout: str
    classes: list[str]
    sources: list[Source]
    estimates: list[int]
    rejected: list[tuple[str, str]]
    shards: list[ShardPlan]
    captions: list[tuple[str, ...]] = field(default_factory=list)

    @cached_property
    def spec(self) -> EncodeSpec:
        """What decides the bytes."""
        return EncodeSpec.from_dict(self.settings)

    def to_json(self) -> str:
        """JSON text, the same for the same plan."""
        values = asdict(self)
        if not self.captions:
            del values["captions"]
        return json.dumps(values, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "EncodePlan":
        """The plan that `to_json` wrote."""
        data = json.loads(text)
        data["sources"] = [Source(**source) for source in data["sources"]]
        data["rejected"] = [(name, reason) for name, reason in data["rejected"]]
        data["shards"] = [ShardPlan(**shard) for shard in data["shards"]]
        data["captions"] = [tuple(texts) for texts in data.get("captions", [])]
        return cls(**data)


def assign(sources: list[Source], sizes: list[int], shard_bytes: int) -> list[ShardPlan]:
    """Shares the videos out to shards of at most `shard_bytes`, in order; a longer video has a shard of its
    own.

    Args:
        sources: the videos, the splits one after the other.
        sizes: stored bytes of each.
        shard_bytes: bound, in bytes; it holds as far as the estimates do.
    """
    shards: list[ShardPlan] = []
    numbers: dict[str, int] = {}
    first, filled = 0, 0
    for index, (source, size) in enumerate(zip(sources, sizes, strict=True)):
        if index > first and (filled + size > shard_bytes or source.split != sources[first].split):
            shards.append(_shard_plan(sources[first].split, numbers, first, index))
            first, filled = index, 0
        filled += size
    if sources:
        shards.append(_shard_plan(sources[first].split, numbers, first, len(sources)))
    return shards


def _shard_plan(split: str, numbers: dict[str, int], first: int, end: int) -> ShardPlan:
    number = numbers[split] = numbers.get(split, -1) + 1
    return ShardPlan(f"{split}-{number:06d}.tar", split, first, end)


def make_plan(
    config: EncodeConfig, vae: "VAE", text: "TextEncoder | None" = None, *, replace_idle: bool = True
) -> EncodePlan:
    """Lists the videos and assigns them to shards; or reads the plan of an interrupted run and checks it.

    Args:
        config: the settings, resolved.
        vae: the encoder.
        text: the text encoder, if there is one.
        replace_idle: a plan of which nothing was encoded may be replaced, with other settings or videos.

    Raises:
        ValueError: no videos, or other videos or settings than the run that began in this folder.
        StrictError: something cannot be opened, and `config.strict`.
    """
    out = Path(config.out)
    listing = list_videos(
        config.videos,
        config.layout,
        split_files=config.split_files,
        class_file=config.class_file,
        exclude=config.out,
        images=config.images,
    )
    spec = make_spec(config, listing.layout, vae, text)
    settings = spec.to_dict()
    captions = find_captions(config, listing)
    print(f"{config.videos}: {listing.sentence()}")
    if config.strict and listing.rejected:
        write_rejected(out, [{"source": name, "reason": reason} for name, reason in listing.rejected])
        raise StrictError(*listing.rejected[0])
    before = read_plan(out / "plan.json") if (out / "plan.json").exists() else None
    mismatch = _mismatch(config, before, listing, settings, captions) if before else ""
    if mismatch and not (replace_idle and _is_idle(out)):
        raise ValueError(mismatch)
    if before and not mismatch:
        print(f"{config.out}: going on with the run that began there")
        plan = replace(before, rejected=listing.rejected)
    elif listing.sources:
        if mismatch:
            print(f"{config.out}: nothing was encoded there yet; it is planned again")
            shutil.rmtree(out / WORK, ignore_errors=True)
        plan = _new_plan(config, listing, spec, settings, captions, vae)
    else:
        if listing.rejected:
            write_rejected(out, [{"source": name, "reason": reason} for name, reason in listing.rejected])
        raise ValueError(f"{config.videos!r} holds no videos: {listing.sentence()}.")
    if plan != before:
        write_text(out / "plan.json", plan.to_json())
    return plan


def _is_idle(out: Path) -> bool:
    """Nothing was encoded in this folder: there is no shard and no part of one."""
    return not any(out.glob("*.index.json")) and not any((out / WORK).glob("*/*.tar"))


def read_plan(path: Path) -> EncodePlan:
    """The plan that a run has begun with.

    Raises:
        ValueError: the file is corrupt, or of another version.
    """
    try:
        plan = EncodePlan.from_json(path.read_text())
        _ = plan.spec
        return plan
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{str(path)!r} is corrupt, or of another version: encode to another --out.") from None


def write_rejected(out: Path, rows: list[dict[str, str]]) -> None:
    """Writes `rejected.jsonl`, a line for each video that cannot be used."""
    write_text(out / "rejected.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _new_plan(
    config: EncodeConfig,
    listing: Listing,
    spec: EncodeSpec,
    settings: dict[str, Any],
    captions: Captions,
    vae: "VAE",
) -> EncodePlan:
    from data_prep.decoding import estimate

    sources = sorted(listing.sources, key=lambda source: (source.split, os.fsencode(source.name)))
    paths = [str(Path(config.videos) / source.name) for source in sources]
    frames = estimate(paths, spec.read, workers=config.workers)
    texts = [captions[source.name] for source in sources] if spec.captioned else []
    sizes = _stored_bytes(spec, frames, vae)
    if spec.text_identity:
        sizes = [size + 2 * 4096 * sum(len(text) // 3 for text in of) for size, of in zip(sizes, texts, strict=True)]
    return EncodePlan(
        videos=os.path.abspath(config.videos),
        settings=settings,
        layout=listing.layout,
        classes=listing.classes,
        sources=sources,
        estimates=frames,
        rejected=listing.rejected,
        shards=assign(sources, sizes, int(spec.shard_mb * 1e6)),
        captions=texts,
    )


def _stored_bytes(spec: EncodeSpec, frames: list[int], vae: "VAE") -> list[int]:
    """About how many bytes are stored of each video, given the pixel frames that are encoded."""
    pixels = max(h * w for h, w in spec.read.sizes)
    latent = 4 * vae.channels * pixels // vae.factor**2 * (2 if spec.flip else 1)
    if not spec.read.frames:
        return [count * latent + 8192 for count in frames]  # headers, checksums, padding
    each = vae.frame_map.latent_frames(spec.read.frames) * latent + 8192
    return [-(-count // spec.read.frames) * each for count in frames]


def _mismatch(config: EncodeConfig, plan: EncodePlan, listing: Listing, now: dict[str, Any], captions: Captions) -> str:
    """Why a run cannot continue with these settings or videos, as a sentence; empty where it can."""
    begun = plan.spec.to_dict()
    other = [name for name in now if now[name] != begun.get(name)]
    if other:
        was = ", ".join(f"{name} {begun.get(name)!r} (now {now[name]!r})" for name in other)
        return f"{config.out!r} was begun with {was}: use the same settings, or another --out."
    new = set(listing.sources) - set(plan.sources)
    gone = set(plan.sources) - set(listing.sources)
    if new or gone:
        example: Source = next(iter(new or gone))
        return (
            f"The videos are not those that {config.out!r} was begun with ({len(new)} new, {len(gone)} gone, "
            f"for example {example.name!a}): put them back, or use another --out."
        )
    pairs = zip(plan.sources, plan.captions, strict=True) if plan.captions else ()
    changed = [source.name for source, texts in pairs if captions[source.name] != texts]
    if changed:
        return (
            f"The captions are not those that {config.out!r} was begun with ({len(changed)} changed, for example of "
            f"{changed[0]!a}): put them back, or use another --out."
        )
    return ""
