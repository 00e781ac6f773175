"""LoRA: low-rank updates of a network's linear layers, while the network itself stays as it is (Hu et al. 2021).

A layer W gets two small weights, A `(rank, in)` and B `(out, rank)`, and computes `W x + alpha / rank B A x`. B begins
at zero, so training begins at the base model. The only place that imports peft, which holds the layers.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fvdm.models.backbone import Backbone
from fvdm.models.config import LoraConfig

ADAPTER = "default"  # peft's name of the only set of updates; it is part of the parameters' names


def add_lora(model: Backbone, config: LoraConfig, seed: int = 0) -> None:
    """Give layers their low-rank updates, which alone require a gradient from then on.

    Args:
        model: changed in place; the names of its own weights change, too.
        config: rank and layers.
        seed: of the first weights of A.

    Raises:
        ValueError: if peft is not installed, or a target is no linear layer.
    """
    layers = target_layers(model, config.targets)
    try:
        import peft
    except ImportError:
        raise ValueError("LoRA needs the package peft: pip install 'fvdm[lora]'") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(
            peft.LoraConfig(
                r=config.rank,
                lora_alpha=config.scale * config.rank,  # type: ignore[arg-type]
                target_modules=layers,
                lora_dropout=config.dropout,
            ),
            model,
            ADAPTER,
        )


def target_layers(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Full names of the linear layers that the targets name; without targets those of the blocks.

    Raises:
        ValueError: if a target names none; lists the ends of the names that there are.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not targets:
        return [name for name in linear if name.startswith("blocks.")]
    found: list[str] = []
    for target in targets:
        own = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not own:
            ends = dict.fromkeys(name.split(".", 2)[2] for name in linear if name.startswith("blocks."))
            raise ValueError(
                f"lora.targets: the model has no linear layer {target}; choose among those of the "
                f"blocks, {', '.join(ends)}, or give a full name"
            )
        found += [name for name in own if name not in found]
    return found


def load_lora(model: Backbone, weights: Mapping[str, Tensor]) -> None:
    """Set the updates' weights, by the names that `add_lora` gave them.

    Raises:
        ValueError: if there are others than the model has.
    """
    own = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    theirs = {name: tuple(weight.shape) for name, weight in weights.items()}
    if own != theirs:
        name = min(dict(own.items() ^ theirs.items()))
        raise ValueError(f"the LoRA is of another network than its base: {name} does not fit")
    model.load_state_dict(dict(weights), strict=False)


def merge_lora(model: Backbone) -> None:
    """Add the updates to the layers' own weights, in place: the plain network again, of the same output."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())


def to_diffusers(weights: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The updates under the names by which diffusers' pipelines load them; alpha / rank is multiplied into B.

    Every other tool then finds a LoRA whose alpha is its rank, which is what a file that names none means.
    """
    renamed = {}
    for name, weight in weights.items():
        scale = config.scale if f".lora_B.{ADAPTER}." in name else 1.0
        renamed[f"transformer.{name.replace(f'.{ADAPTER}.', '.')}"] = weight * scale
    return renamed


def from_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names that `add_lora` gives, of weights under those of `to_diffusers`."""
    return {
        name.removeprefix("transformer.").replace(".weight", f".{ADAPTER}.weight"): weight
        for name, weight in weights.items()
    }


def base_weights(model: Backbone) -> dict[str, Tensor]:
    """The network's own weights under its own names, without the updates."""
    updates = {name for name, p in model.named_parameters() if p.requires_grad}
    return {
        name.replace(".base_layer.", "."): weight for name, weight in model.state_dict().items() if name not in updates
    }
