"""Decides what an encoding run makes: lists the videos, fixes the settings, shares the videos out to shards."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_prep.decoding import estimate
from data_prep.options import EncodeConfig, Stopped, chunk, device, precision, workers
from data_prep.shards import Plan, assign, atomic, write_rejected
from fvdm.media.layouts import PAPER, Listing, Source, list_videos
from fvdm.media.preprocess import Preprocess

if TYPE_CHECKING:
    from fvdm.media.vae import VAE


def open_vae(config: EncodeConfig) -> "VAE":
    """The VAE of the settings, on its device and in its precision.

    Raises:
        ValueError: there is no such VAE, or this machine has no such device.
    """
    from fvdm.media.vae import load_vae

    check_device(config)
    return load_vae(config.vae, device=device(config), dtype=getattr(torch, precision(config)))


def check_device(config: EncodeConfig) -> None:
    """Refuses a device that this machine does not have.

    Raises:
        ValueError: with the reason.
    """
    where = device(config)
    try:
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {where}: this machine has no such device, or cannot use it ({reason}).") from None


def latent_shape(config: EncodeConfig, vae: "VAE") -> tuple[int, int, int]:
    """(c, h, w) of a frame's latent."""
    return vae.channels, config.size // vae.factor, config.size // vae.factor


def make_plan(config: EncodeConfig, vae: "VAE") -> "Plan":
    """Lists the videos and assigns them to shards; or reads the plan of an interrupted run and checks it.

    Raises:
        ValueError: no videos, or other videos or settings than the run that began in this folder.
        Stopped: something cannot be opened, and `config.strict`.
    """
    listing = list_videos(
        config.videos,
        config.layout,  # type: ignore[arg-type]
        split_files=config.split_files,
        class_file=config.class_file,
        exclude=config.out,
    )
    print(f"{config.videos}: {listing.sentence()}")
    settings = _settings(config, listing.layout, vae)
    if config.strict and listing.rejected:
        write_rejected(Path(config.out), [{"source": name, "reason": reason} for name, reason in listing.rejected])
        raise Stopped(*listing.rejected[0])
    path = Path(config.out) / "plan.json"
    before = read_plan(path) if path.exists() else None
    if before:
        _check_same(config, before, listing, settings)
        print(f"{config.out}: going on with the run that began there")
        plan = replace(before, rejected=listing.rejected)
    elif listing.sources:
        plan = _new_plan(config, listing, settings, vae)
    else:
        raise ValueError(f"{config.videos!r} holds no videos: {listing.sentence()}.")
    if plan != before:
        with atomic(path) as file:
            file.write(plan.to_json().encode())
    return plan


def read_plan(path: Path) -> "Plan":
    """The plan that a run has begun with.

    Raises:
        ValueError: the file is damaged, or of another version.
    """
    try:
        return Plan.from_json(path.read_text())
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{str(path)!r} is damaged, or of another version: encode to another --out.") from None


def _new_plan(config: EncodeConfig, listing: Listing, settings: dict[str, Any], vae: "VAE") -> "Plan":
    sources = sorted(listing.sources, key=lambda source: (source.split, os.fsencode(source.name)))
    paths = [str(Path(config.videos) / source.name) for source in sources]
    frames = estimate(paths, workers=workers(config))
    c, h, w = latent_shape(config, vae)
    frame_bytes = 4 * c * h * w * (2 if settings["preprocess"]["flip"] else 1)
    shards = assign(sources, frames, frame_bytes, int(config.shard_mb * 1e6))
    videos = os.path.abspath(config.videos)
    return Plan(videos, settings, listing.layout, listing.classes, sources, frames, listing.rejected, shards)


def _settings(config: EncodeConfig, layout: str, vae: "VAE") -> dict[str, Any]:
    """All that decides which bytes are written."""
    changes = {name: getattr(config, name) for name in ("resize", "antialias", "flip", "min_frames")}
    how = replace(PAPER[layout], **{name: value for name, value in changes.items() if value is not None})
    how = replace(how, keep_corrupt=config.keep_corrupt)
    if config.size % vae.factor:
        raise ValueError(
            f"--size {config.size} is no multiple of {vae.factor}, by which the VAE {config.vae!r} shrinks."
        )
    return {
        "vae_identity": vae.identity,
        "size": config.size,
        "preprocess": asdict(how),
        "dtype": config.dtype,
        "precision": precision(config),
        "chunk": chunk(config),
        "shard_mb": config.shard_mb,
    }


def _check_same(config: EncodeConfig, plan: "Plan", listing: Listing, settings: dict[str, Any]) -> None:
    """Refuses to go on with other settings, or with other videos, than those of the plan."""
    begun = plan.settings | {"preprocess": asdict(Preprocess.from_dict(plan.settings["preprocess"]))}
    other = [name for name in settings if settings[name] != begun.get(name)]
    if other:
        was = ", ".join(f"{name} {plan.settings.get(name)!r} (now {settings[name]!r})" for name in other)
        raise ValueError(f"{config.out!r} was begun with {was}: use the same settings, or another --out.")
    new = set(listing.sources) - set(plan.sources)
    gone = set(plan.sources) - set(listing.sources)
    if new or gone:
        example: Source = next(iter(new or gone))
        raise ValueError(
            f"The videos are not those that {config.out!r} was begun with ({len(new)} new, {len(gone)} gone, "
            f"for example {example.name!a}): put them back, or use another --out."
        )
