"""The VAEs of diffusers whose frame map and normalisation are known: one table, one line each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fvdm.media.frames import FrameMap
from fvdm.media.normalisation import Normalisation


@dataclass(frozen=True)
class VAEKind:
    """A class of VAEs.

    Attributes:
        name: the class in diffusers.
        models: the published models that use it.
        stride: pixel frames per latent frame, from the configuration; None for an image VAE.
        factor: how many times smaller a latent is in height and width, from the configuration.
        channels: the configuration's name of the number of latent channels.
        cached: encoding and decoding go chunk by chunk with a cache of features, exactly: memory does not grow with
            the clip, and a shorter clip's latents are a prefix of a longer one's.
        needs_odd: diffusers follows the frame map for odd numbers of latent frames, and gives more for even ones.
    """

    name: str
    models: str
    stride: Callable[[Any], int] | None
    factor: Callable[[Any], int]
    channels: str
    cached: bool = False
    needs_odd: bool = False

    def frame_map(self, config: Any) -> FrameMap:
        """The map from pixel frames to latent frames."""
        return FrameMap(self.stride(config) if self.stride else 1)


def _blocks(config: Any) -> int:
    return 2 ** (len(config.block_out_channels) - 1)


def _ltx_factor(config: Any) -> int:
    return int(config.spatial_compression_ratio or config.patch_size * 2 ** sum(config.spatio_temporal_scaling))


def _ltx_stride(config: Any) -> int:
    return int(config.temporal_compression_ratio or config.patch_size_t * 2 ** sum(config.spatio_temporal_scaling))


def _wan_stride(config: Any) -> int:
    return 2 ** sum(config.temperal_downsample)


def _wan_factor(config: Any) -> int:
    return 2 ** len(config.temperal_downsample) * (config.patch_size or 1)


def _time_ratio(config: Any) -> int:
    return int(config.temporal_compression_ratio)


def _space_ratio(config: Any) -> int:
    return int(config.spatial_compression_ratio)


KINDS = (
    VAEKind("AutoencoderKL", "Stable Diffusion, FLUX.1 and other image models", None, _blocks, "latent_channels"),
    VAEKind("AutoencoderKLWan", "Wan 2.1, Wan 2.2", _wan_stride, _wan_factor, "z_dim", cached=True),
    VAEKind("AutoencoderKLHunyuanVideo", "HunyuanVideo", _time_ratio, _space_ratio, "latent_channels"),
    VAEKind("AutoencoderKLLTXVideo", "LTX-Video", _ltx_stride, _ltx_factor, "latent_channels"),
    VAEKind("AutoencoderKLCogVideoX", "CogVideoX", _time_ratio, _blocks, "latent_channels", needs_odd=True),
)


def find_kind(name: str) -> VAEKind:
    """The kind of a class of diffusers.

    Raises:
        ValueError: lists the table, if the class is not in it.
    """
    kinds = {kind.name: kind for kind in KINDS}
    if name not in kinds:
        table = "; ".join(f"{kind.name} ({kind.models})" for kind in KINDS)
        raise ValueError(f"the frame map and normalisation of a {name} are not known; those known are {table}")
    return kinds[name]


def normalisation_of(model: Any) -> Normalisation:
    """Per channel if the VAE states means and deviations, else the one shift and factor of its configuration.

    LTX-Video has both: its weights hold the means and deviations, its configuration a factor.

    Raises:
        ValueError: if there are more or fewer means or deviations than channels.
    """
    config = model.config
    if "latents_mean" in dict(model.named_buffers()):
        mean, std = model.latents_mean.double().tolist(), model.latents_std.double().tolist()
        return Normalisation(tuple(mean), tuple(config["scaling_factor"] / s for s in std))
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean and std:
        channels = config[find_kind(type(model).__name__).channels]
        if not len(mean) == len(std) == channels:
            raise ValueError(
                f"config.json has {len(mean)} latents_mean and {len(std)} latents_std for {channels} latent channels: "
                "give one each a channel"
            )
        return Normalisation(tuple(mean), tuple(1 / s for s in std))
    return Normalisation((config.get("shift_factor") or 0.0,), (config["scaling_factor"],))
