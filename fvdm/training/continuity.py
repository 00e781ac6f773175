"""What a run keeps from one start to the next: the latents that its model has learnt, and the order of its samples."""

import hashlib
from pathlib import Path
from typing import Any

from fvdm.data.shards import LatentShards
from fvdm.models.loading import config_from

# With the videos, these decide what a sample is.
ORDER = ("seed", "data.batch_size", "data.frames", "data.stride", "data.flip")


def identity(shards: LatentShards) -> dict[str, Any]:
    """What a checkpoint tells of the data it was trained on."""
    listed = "".join(shard.sha256 for shard in shards.shards)
    return {
        "vae_identity": shards.manifest.vae_identity,
        "latent_shape": list(shards.latent_shape),
        "shards": hashlib.sha256(listed.encode()).hexdigest(),
    }


def changes(state: dict[str, Any], flat: dict[str, Any], shards: LatentShards) -> list[str]:
    """What decides the samples and is no longer what it was; a run that goes on so is not the run it would have been.

    Args:
        state: of a checkpoint; an early one says less.
        flat: the settings of this start, by dotted name.
        shards: its data.

    Raises:
        ValueError: if the latents are of another VAE or size than the model has learnt.
    """
    network, now = state["network"], identity(shards)
    shape = state.get("latent_shape") or config_from(network).latent_shape
    shards.require(vae_identity=state.get("vae_identity"), latent_shape=tuple(shape))
    found = []
    for name in ORDER:
        section, _, key = name.rpartition(".")
        before = (state["settings"][section] if section else state["settings"])[key]
        if before != flat[name]:
            found.append(f"{name} was {before} and is {flat[name]}")
    if state.get("shards", now["shards"]) != now["shards"]:
        found.append(f"the videos in {Path(shards.location.path).name} are others")
    return found
