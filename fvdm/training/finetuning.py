"""Fine-tuning with LoRA: the base model, its frozen weights, and what a checkpoint says of both.

Frozen weights have no gradient, so they are neither in the optimizer nor in the flat vector nor in the checkpoints,
which name the base model and the hash of its weights instead.
"""

import logging
from typing import Any

import torch

from fvdm.config import plain
from fvdm.models.backbone import Backbone
from fvdm.models.config import BackboneConfig
from fvdm.models.loading import WAN, absolute_source, build, load_base
from fvdm.models.lora import add_lora, base_weights, target_layers
from fvdm.models.lora_files import Base, weights_hash
from fvdm.training.config import TrainConfig

logger = logging.getLogger(__name__)

RANDOM = "none"  # the setting `init` for new weights
FIXED = ("rank", "alpha", "targets")  # settings of a LoRA that its weights were trained with


def base_source(config: TrainConfig, network: BackboneConfig) -> str:
    """Where the base model of a LoRA is: the initial weights.

    Raises:
        ValueError: if the run begins with new weights.
    """
    source = config.init or (WAN + network.source if network.source else "")
    if source in ("", RANDOM):
        raise ValueError(
            "a LoRA needs a pretrained base model, and this run has none: set init to a model, or model to "
            "wan:PATH-OR-NAME; or leave lora.rank out to train the whole network"
        )
    return source


def lora_model(config: TrainConfig, network: BackboneConfig) -> Backbone:
    """The base model with the updates that are trained, in float32 on the CPU.

    Raises:
        ValueError: if the base model is missing, corrupt, or of another network.
    """
    source = base_source(config, network)
    try:
        model = load_base(network, source)
    except ValueError as error:
        raise ValueError(f"the base model {source} cannot be used: {error}") from None
    add_lora(model, config.lora, config.seed)
    return model


def base_of(config: TrainConfig, network: BackboneConfig, model: Backbone) -> Base:
    """What checkpoints say of the base model. It reads all weights: one process of a node is enough."""
    source = base_source(config, network)
    logger.info("hashing the weights of the base model %s", source)
    return Base(absolute_source(source), weights_hash(base_weights(model)))


def place(model: Backbone, device: torch.device, precision: str) -> Backbone:
    """Move a model to its device; frozen weights in the precision of training, so the device never holds them twice."""
    if precision == "bf16":
        for p in model.parameters():
            if not p.requires_grad:
                p.data = p.data.to(device, torch.bfloat16)
    return model.to(device)


def check_lora(config: TrainConfig, network: BackboneConfig) -> None:
    """Find, before a job waits in a queue, what would end a LoRA run at its start.

    Raises:
        ValueError: if it has no base model, or a target is no layer of it.
    """
    absolute_source(base_source(config, network))
    with torch.device("meta"):
        target_layers(build(network), config.lora.targets)


def check_resumed_lora(state: dict[str, Any], config: TrainConfig, base: Base | None = None) -> None:
    """Compare the fine-tuning of a run so far with that of this start.

    Args:
        state: of its checkpoint.
        config: the settings of this start.
        base: its base model, where that has been read.

    Raises:
        ValueError: if it trains other layers, or updates another base model.
    """
    before, now = state.get("lora", {}).get("rank", 0), config.lora.rank
    advice = "give the run another name, or its own settings"
    if bool(before) != bool(now):
        kinds = ("the whole network", "a LoRA")
        raise ValueError(f"{config.name} has trained {kinds[bool(before)]} so far, not {kinds[bool(now)]}; {advice}")
    if not now:
        return
    values = plain(config.lora)
    for name in FIXED:
        if state["lora"][name] != values[name]:
            raise ValueError(f"lora.{name} was {state['lora'][name]} and is {values[name]}; {advice}")
    if base and base.sha256 != state["base"]["sha256"]:
        raise ValueError(
            f"{config.name} has trained a LoRA of the base model {state['base']['source']} (SHA-256 "
            f"{state['base']['sha256'][:12]}), and {base.source} is another ({base.sha256[:12]}): give that of before "
            f"with init or model, or choose another name"
        )
