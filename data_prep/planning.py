"""Decides what an encoding run makes: lists the videos, fixes the settings, shares the videos out to shards."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.config import EncodeConfig, StrictError, processes
from fvdm.files import write_text
from fvdm.media.layouts import PAPER, Listing, Source, list_videos
from fvdm.media.preprocess import Preprocess

if TYPE_CHECKING:
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
        settings: all settings that change the bytes; a run with others is refused.
        layout: the recognised layout.
        classes: class names by label.
        sources: the videos, the splits one after the other.
        estimates: estimated number of frames of each.
        rejected: `(name, reason)` of what could not be opened when the plan was made.
        shards: the shards.
    """

    videos: str
    settings: dict[str, Any]
    layout: str
    classes: list[str]
    sources: list[Source]
    estimates: list[int]
    rejected: list[tuple[str, str]]
    shards: list[ShardPlan]

    def to_json(self) -> str:
        """JSON text, the same for the same plan."""
        return json.dumps(asdict(self), sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "EncodePlan":
        """The plan that `to_json` wrote."""
        data = json.loads(text)
        data["sources"] = [Source(**source) for source in data["sources"]]
        data["rejected"] = [(name, reason) for name, reason in data["rejected"]]
        data["shards"] = [ShardPlan(**shard) for shard in data["shards"]]
        return cls(**data)


def assign(sources: list[Source], estimates: list[int], frame_bytes: int, shard_bytes: int) -> list[ShardPlan]:
    """Shares the videos out to shards of at most `shard_bytes`, in order; a longer video has a shard of its
    own.

    Args:
        sources: the videos, the splits one after the other.
        estimates: frames of each.
        frame_bytes: stored bytes per frame.
        shard_bytes: bound, in bytes; it holds as far as the estimates do.
    """
    shards: list[ShardPlan] = []
    numbers: dict[str, int] = {}
    first, filled = 0, 0
    for index, (source, frames) in enumerate(zip(sources, estimates, strict=True)):
        size = frames * frame_bytes + 8192  # headers, checksums, padding
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


def make_plan(config: EncodeConfig, vae: "VAE", *, replace_idle: bool = True) -> EncodePlan:
    """Lists the videos and assigns them to shards; or reads the plan of an interrupted run and checks it.

    Args:
        config: the settings, resolved.
        vae: the encoder.
        replace_idle: a plan of which nothing was encoded may be made anew, with other settings or videos.

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
    )
    print(f"{config.videos}: {listing.sentence()}")
    settings = _settings(config, listing.layout, vae)
    if config.strict and listing.rejected:
        write_rejected(out, [{"source": name, "reason": reason} for name, reason in listing.rejected])
        raise StrictError(*listing.rejected[0])
    before = read_plan(out / "plan.json") if (out / "plan.json").exists() else None
    mismatch = _mismatch(config, before, listing, settings) if before else ""
    if mismatch and not (replace_idle and _is_idle(out)):
        raise ValueError(mismatch)
    if before and not mismatch:
        print(f"{config.out}: going on with the run that began there")
        plan = replace(before, rejected=listing.rejected)
    elif listing.sources:
        if mismatch:
            print(f"{config.out}: nothing was encoded there yet; it is planned anew")
            shutil.rmtree(out / WORK, ignore_errors=True)
        plan = _new_plan(config, listing, settings, vae)
    else:
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
        return EncodePlan.from_json(path.read_text())
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{str(path)!r} is corrupt, or of another version: encode to another --out.") from None


def write_rejected(out: Path, rows: list[dict[str, str]]) -> None:
    """Writes `rejected.jsonl`, a line for each video that cannot be used."""
    write_text(out / "rejected.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def latent_shape(config: EncodeConfig, vae: "VAE") -> tuple[int, int, int]:
    """(c, h, w) of a frame's latent."""
    assert config.size is not None
    return vae.channels, config.size // vae.factor, config.size // vae.factor


def _new_plan(config: EncodeConfig, listing: Listing, settings: dict[str, Any], vae: "VAE") -> EncodePlan:
    from data_prep.decoding import estimate

    sources = sorted(listing.sources, key=lambda source: (source.split, os.fsencode(source.name)))
    paths = [str(Path(config.videos) / source.name) for source in sources]
    frames = estimate(paths, workers=processes(config)[0])
    c, h, w = latent_shape(config, vae)
    frame_bytes = 4 * c * h * w * (2 if settings["preprocess"]["flip"] else 1)
    shards = assign(sources, frames, frame_bytes, int(config.shard_mb * 1e6))
    videos = os.path.abspath(config.videos)
    return EncodePlan(videos, settings, listing.layout, listing.classes, sources, frames, listing.rejected, shards)


def _settings(config: EncodeConfig, layout: str, vae: "VAE") -> dict[str, Any]:
    """All that decides which bytes are written."""
    assert config.size is not None
    given = {name: getattr(config, name) for name in ("resize", "antialias", "flip", "min_frames")}
    preprocess = replace(PAPER[layout], **{name: value for name, value in given.items() if value is not None})
    preprocess = replace(preprocess, keep_corrupt=config.keep_corrupt)
    if config.size % vae.factor:
        raise ValueError(
            f"--size {config.size} is no multiple of {vae.factor}, by which the VAE {config.vae!r} shrinks."
        )
    return {
        "vae_identity": vae.identity,
        "size": config.size,
        "preprocess": asdict(preprocess),
        "dtype": config.dtype,
        "precision": config.precision,
        "chunk": config.chunk,
        "shard_mb": config.shard_mb,
    }


def _mismatch(config: EncodeConfig, plan: EncodePlan, listing: Listing, settings: dict[str, Any]) -> str:
    """Why a run cannot go on with these settings or videos, as a sentence; empty where it can."""
    begun = plan.settings | {"preprocess": asdict(Preprocess.from_dict(plan.settings["preprocess"]))}
    other = [name for name in settings if settings[name] != begun.get(name)]
    if other:
        was = ", ".join(f"{name} {plan.settings.get(name)!r} (now {settings[name]!r})" for name in other)
        return f"{config.out!r} was begun with {was}: use the same settings, or another --out."
    new = set(listing.sources) - set(plan.sources)
    gone = set(plan.sources) - set(listing.sources)
    if new or gone:
        example: Source = next(iter(new or gone))
        return (
            f"The videos are not those that {config.out!r} was begun with ({len(new)} new, {len(gone)} gone, "
            f"for example {example.name!a}): put them back, or use another --out."
        )
    return ""
