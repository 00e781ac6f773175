"""What a checkpoint says of the data it was trained on, and how other data differ from it."""

import hashlib
from pathlib import Path
from typing import Any

from fvdm.data.shards import LatentShards
from fvdm.models.loading import config_from

TEXT_ENCODER = ("name", "identity", "width", "max_tokens")
# With the videos, these settings decide what a sample is.
SAMPLE_SETTINGS = ("seed", "data.batch_size", "data.frames", "data.stride", "data.flip", "data.shuffle_window")


def data_identity(shards: LatentShards) -> dict[str, Any]:
    """What a checkpoint says of the data it was trained on."""
    listed = "".join(shard.sha256 for shard in shards.shards)
    return {
        "vae_identity": shards.manifest.vae_identity,
        "latent_shape": list(shards.latent_shape),
        "shards": hashlib.sha256(listed.encode()).hexdigest(),
    }


def text_encoder(shards: LatentShards) -> dict[str, Any] | None:
    """What a checkpoint says of the text encoder of its data; None without texts."""
    text = shards.manifest.text
    return None if text is None else {name: getattr(text, name) for name in TEXT_ENCODER}


def data_mismatch(state: dict[str, Any], flat: dict[str, Any], shards: LatentShards) -> list[str]:
    """How the samples differ from those of the run so far, a few words each; empty where they are the same.

    Args:
        state: of a checkpoint; an early one holds less.
        flat: the settings of this start, by dotted name.
        shards: its data.

    Raises:
        ValueError: if the latents are of another VAE or size than those the model was trained on.
    """
    now = data_identity(shards)
    shape = state.get("latent_shape") or config_from(state["network"]).latent_shape
    shards.require(vae_identity=state.get("vae_identity"), latent_shape=tuple(shape))
    before, text = state.get("text"), text_encoder(shards)
    if before is not None and (text is None or text["identity"] != before["identity"]):
        found = f"those of {text['name']} ({text['identity']})" if text else "none"
        raise ValueError(
            f"the model was trained on texts of the encoder {before['name']} ({before['identity']}), and the shards in "
            f"{shards.location.path} have {found}: encode the captions again with that encoder"
        )
    mismatched = []
    for name in SAMPLE_SETTINGS:
        section, _, key = name.rpartition(".")
        earlier = (state["settings"][section] if section else state["settings"]).get(key, flat[name])
        if earlier != flat[name]:
            mismatched.append(f"{name} was {earlier} and is {flat[name]}")
    if state.get("shards", now["shards"]) != now["shards"]:
        mismatched.append(f"the videos in {Path(shards.location.path).name} are others")
    return mismatched
