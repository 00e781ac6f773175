"""What a training run starts from: the network that fits the settings and the data, and its first weights."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from fvdm import config as settings
from fvdm.checkpoints.find import newest
from fvdm.checkpoints.read import read_state
from fvdm.data.format import filled_buckets
from fvdm.data.loader import batches
from fvdm.data.shards import LatentShards
from fvdm.models.backbone import Backbone
from fvdm.models.config import BackboneConfig
from fvdm.models.loading import WAN, build, check_source, load_pretrained, load_weights, preset
from fvdm.tracking.server import check as check_tracking
from fvdm.training.config import TrainConfig
from fvdm.training.data_identity import data_mismatch
from fvdm.training.engine import accumulation
from fvdm.training.finetuning import RANDOM, check_lora, check_resumed_lora, lora_model
from fvdm.training.run import refuse_corrupt
from fvdm.training.validation import held_out_shards


def model_config(config: TrainConfig, shards: LatentShards) -> BackboneConfig:
    """The network that fits the settings and the data.

    Raises:
        ValueError: if the run is conditional and the data has no labels, or the network cannot take its latents, its
            texts or the objective.
    """
    manifest = shards.manifest
    if config.conditional and (not shards.classes or manifest.text is not None):
        found = "texts in place of" if shards.classes else "no"
        raise ValueError(f"conditional is set, but the shards in {config.data.path} have {found} class labels")
    shapes = [(shards.latent_shape[0], bucket.height, bucket.width) for bucket in filled_buckets(manifest.buckets)]
    classes = len(shards.classes) if config.conditional else 0
    fitted = [
        preset(config.model).fit(shape, config.data.frames, classes, config.diffusion.learned_variance)
        for shape in shapes
    ]
    network = fitted[0]
    if network.objective and config.diffusion.objective != network.objective:
        raise ValueError(
            f"{config.model} is trained with the objective {network.objective}, not {config.diffusion.objective}: set "
            f"diffusion.objective to {network.objective}"
        )
    if network.text_width:
        if manifest.text is None:
            raise ValueError(
                f"{config.model} takes texts, and the shards in {config.data.path} have none: encode the videos again, "
                f"with captions and a text encoder"
            )
        network = network.fit_text(manifest.text.width, manifest.text.max_tokens)
    return replace(network, attention=config.attention, activation_checkpointing=config.activation_checkpointing)


def initial_model(
    config: TrainConfig, network: BackboneConfig, shards: LatentShards, resumed: bool, checksum: bool = True
) -> Backbone:
    """The network that training begins with, in float32 on the CPU.

    Args:
        config: `init`, `model` and `seed`, from which new weights are drawn by the default generator.
        network: from `model_config`.
        shards: the empty prompt's embedding is theirs.
        resumed: leave the weights to the checkpoint.
        checksum: see `initial_weights`.

    Raises:
        ValueError: if initial weights are missing, corrupt, or of another network.
    """
    pretrained = bool(network.source) and not config.init and not resumed
    if config.lora.rank:  # its checkpoints leave the base model out
        model = lora_model(config, network)
    else:
        model = load_pretrained(network) if pretrained else build(network)
        if config.init not in ("", RANDOM) and not resumed:
            initial_weights(config.init, model, checksum)
    text = shards.manifest.text
    if network.text_width and text is not None:
        empty = torch.from_numpy(shards.empty_prompt)
        model.empty_prompt = F.pad(empty, (0, 0, 0, text.max_tokens - len(empty)))  # as the loader pads captions
    return model


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
    network = model_config(config, shards)
    if config.validation.every:
        held_out_shards(config.validation, config.data, shards)
    checkpoint = newest(config.checkpoints)
    lanes = config.data.lanes
    if checkpoint:
        state = read_state(checkpoint)
        data_mismatch(state, settings.flatten(config), shards)
        check_resumed_lora(state, config)
        lanes = state.get("lanes", 0)
    else:
        refuse_corrupt(config)
    if config.init.startswith(WAN):
        check_source(config.init)
    elif config.init not in ("", RANDOM) and not Path(config.init).exists():
        raise ValueError(f"init {config.init}: there is no such file or folder")
    elif not config.init and (config.lora.rank or not checkpoint):
        check_source(config.model)
    if config.lora.rank:
        check_lora(config, network)
    accumulation(config.data.batch_size, config.engine.micro_batch, world_size)
    batches(shards, replace(config.data, lanes=lanes), world_size=world_size)  # reads nothing before the first batch
