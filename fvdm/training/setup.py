"""What a training run starts from: the network that fits the settings and the data, and its first weights."""

from dataclasses import replace
from pathlib import Path

from fvdm import config as settings
from fvdm.checkpoints.find import newest
from fvdm.checkpoints.read import read_state
from fvdm.data.loader import batches
from fvdm.data.shards import LatentShards
from fvdm.models.backbone import Backbone
from fvdm.models.config import BackboneConfig
from fvdm.models.loading import load_weights, preset
from fvdm.tracking.server import check as check_tracking
from fvdm.training.config import TrainConfig
from fvdm.training.engine import accumulation
from fvdm.training.run import data_mismatch, refuse_corrupt
from fvdm.training.validation import held_out_shards


def model_config(config: TrainConfig, shards: LatentShards) -> BackboneConfig:
    """The network that fits the settings and the data.

    Raises:
        ValueError: if the run is conditional and the data has no labels, or the network cannot take its latents.
    """
    if config.conditional and not shards.classes:
        raise ValueError(f"conditional is set, but the shards in {config.data.path} have no class labels")
    network = preset(config.model).fit(
        shards.latent_shape,
        config.data.frames,
        len(shards.classes) if config.conditional else 0,
        config.diffusion.learned_variance,
    )
    return replace(network, attention=config.attention, activation_checkpointing=config.activation_checkpointing)


def initial_weights(init: str, model: Backbone, checksum: bool = True) -> None:
    """Start from other weights than random ones: most models get a timestep per frame after a scalar one.

    Args:
        init: see `TrainConfig`; of a run, its averaged weights.
        model: takes them.
        checksum: compare the SHA-256 of a run's weights; one process of a node is enough.

    Raises:
        ValueError: if there are none, they are of another network, or not finite.
    """
    weights = load_weights(init, checksum=checksum)
    theirs, own = ({(name, w.shape) for name, w in each.items()} for each in (weights, model.state_dict()))
    mismatched = sorted({name for name, _ in theirs ^ own})
    if mismatched:
        raise ValueError(
            f"the weights of --init {init} do not fit the model of this run: {len(mismatched)} differ, such as "
            f"{mismatched[0]}; choose the same size, latent channels, classes and learned variance"
        )
    model.load_state_dict(weights)


def check(config: TrainConfig, world_size: int) -> None:
    """Find, before a job waits in a queue, what would end it at its start.

    Raises:
        ValueError: if the data cannot be read, model, data, batch, ranks and the run so far do not fit each other, or
            all checkpoints of the run are corrupt.
    """
    check_tracking(config.tracking.uri)
    shards = LatentShards(config.data.path, config.data.split, config.data.cache, config.data.cache_gb)
    model_config(config, shards)
    if config.validation.every:
        held_out_shards(config.validation, config.data, shards)
    checkpoint = newest(config.checkpoints)
    lanes = config.data.lanes
    if checkpoint:
        state = read_state(checkpoint)
        data_mismatch(state, settings.flatten(config), shards)
        lanes = state.get("lanes", 0)
    else:
        refuse_corrupt(config)
    if config.init and not Path(config.init).exists():
        raise ValueError(f"init {config.init}: there is no such file or folder")
    accumulation(config.data.batch_size, config.engine.micro_batch, world_size)
    batches(shards, replace(config.data, lanes=lanes), world_size=world_size)  # reads nothing before the first batch
