"""The frozen image VAE: pictures to latents and back, and the one place that knows how latents are scaled."""

import functools
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvdm.media.frames import FrameMap

BUILTIN = Path(__file__).parents[1] / "weights" / "builtin_vae"
CHUNK = 16  # frames that are decoded at once; bounds the memory


@dataclass(frozen=True)
class Normalisation:
    """Makes latents of unit variance: `scaled = (z - shift) * scale`.

    Attributes:
        shift: per channel, or one for all.
        scale: per channel, or one for all.
    """

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def apply(self, z: Tensor) -> Tensor:
        """Scale latents `(... c h w)`."""
        return (z - self._like(self.shift, z)) * self._like(self.scale, z)

    def invert(self, scaled: Tensor) -> Tensor:
        """The latents that `apply` made into these, `(... c h w)`."""
        return scaled / self._like(self.scale, scaled) + self._like(self.shift, scaled)

    @staticmethod
    def _like(values: tuple[float, ...], z: Tensor) -> Tensor:
        return torch.tensor(values, dtype=z.dtype, device=z.device)[:, None, None]

    def to_dict(self) -> dict[str, list[float]]:
        """For JSON."""
        return {"shift": list(self.shift), "scale": list(self.scale)}

    @classmethod
    def from_dict(cls, values: dict[str, list[float]]) -> "Normalisation":
        """What `to_dict` returned."""
        return cls(tuple(values["shift"]), tuple(values["scale"]))


def sample_latents(moments: Tensor, normalisation: Normalisation, noise: Tensor | None) -> Tensor:
    """Scaled latents from the VAE's posterior.

    Args:
        moments: mean and log-variance `(... 2c h w)`, as `VAE.encode` returns them.
        normalisation: of the VAE.
        noise: standard normal `(... c h w)`; None takes the mean.

    Returns:
        `(... c h w)`.
    """
    mean, log_variance = moments.chunk(2, dim=-3)
    z = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
    return normalisation.apply(z)


class VAE:
    """A frozen AutoencoderKL. Pictures are uint8, latents float32; any leading axes are kept.

    Attributes:
        name: what it was loaded by.
        identity: hash of its weights and configuration; shards and checkpoints remember it.
        channels: channels of a latent.
        factor: how many times smaller a latent is than its picture.
        frame_map: from pixel frames to latent frames; one to one, as this encodes images.
        normalisation: of its latents.
    """

    def __init__(self, name: str, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        config = model.config
        self.name = name
        self.identity = _identity(model)
        self.channels = int(config.latent_channels)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.frame_map = FrameMap(1)
        self.normalisation = _normalisation(config)
        self.device, self.dtype = device, dtype
        self.model = model.to(device, dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
        _save_passes(self.model)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Mean and log-variance of the posterior, unscaled.

        Args:
            pictures: uint8 `(... 3 h w)`.

        Returns:
            float32 `(... 2c h/factor w/factor)` on the VAE's device.

        Raises:
            ValueError: if they are not uint8, or the sides are no multiples of the factor.
        """
        if pictures.dtype != torch.uint8:
            raise ValueError(f"pictures are uint8, 0 to 255; these are {pictures.dtype}: scale, round and cast them")
        *lead, channels, h, w = pictures.shape
        if channels != 3 or h % self.factor or w % self.factor:
            raise ValueError(
                f"pictures of {channels} x {h} x {w} do not suit the VAE {self.name}: it takes 3 channels, and sides "
                f"that are multiples of {self.factor}"
            )
        flat = pictures.reshape(-1, 3, h, w).to(self.device).contiguous(memory_format=torch.channels_last)
        x = flat.to(self.dtype).div_(127.5).sub_(1)
        moments = self.model.encode(x).latent_dist.parameters.float()
        mean, log_variance = moments.chunk(2, dim=1)
        moments = torch.cat([mean, log_variance.clamp(-30, 20)], dim=1)
        return moments.reshape(*lead, *moments.shape[1:])

    def encode_mean(self, pictures: Tensor) -> Tensor:
        """Scaled latents `(... c h/factor w/factor)` of pictures, uint8 `(... 3 h w)`, without noise."""
        return sample_latents(self.encode(pictures), self.normalisation, None)

    @torch.no_grad()
    def decode(self, latents: Tensor, chunk: int = CHUNK) -> Tensor:
        """Pictures of scaled latents.

        Args:
            latents: `(... c h w)`.
            chunk: pictures decoded at once.

        Returns:
            uint8 `(... 3 h*factor w*factor)` on the VAE's device.

        Raises:
            ValueError: if the latents have another number of channels.
        """
        *lead, channels, h, w = latents.shape
        if channels != self.channels:
            raise ValueError(
                f"latents of {channels} channels are not of the VAE {self.name}, which has {self.channels}"
            )
        z = self.normalisation.invert(latents.reshape(-1, channels, h, w).to(self.device).float()).to(self.dtype)
        out = torch.empty((len(z), 3, h * self.factor, w * self.factor), dtype=torch.uint8, device=self.device)
        for begin in range(0, len(z), chunk):
            part = z[begin : begin + chunk].contiguous(memory_format=torch.channels_last)
            x = self.model.decode(part).sample.float()
            out[begin : begin + chunk] = ((x + 1) * 127.5).round().clamp(0, 255).byte()
        return out.reshape(*lead, *out.shape[1:])


def load_vae(name: str = "builtin", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> VAE:
    """Load a VAE.

    Args:
        name: `builtin`; the name of a diffusers AutoencoderKL on the hub, such as `stabilityai/sd-vae-ft-ema`; or a
            folder with `config.json` and safetensors.
        device: where it runs.
        dtype: in which precision.

    Raises:
        ValueError: if there is no such VAE, or it cannot be read.
    """
    from diffusers import AutoencoderKL
    from diffusers.utils import logging

    logging.set_verbosity_error()
    try:
        model = AutoencoderKL.from_pretrained(_source(name), use_safetensors=True, low_cpu_mem_usage=False)
        return VAE(name, model, torch.device(device), dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"cannot load the VAE {name!r}: give builtin, a folder with config.json and safetensors, or a name on "
            f"the hub such as stabilityai/sd-vae-ft-ema ({reason})"
        ) from None


def _source(name: str) -> str:
    """The folder or the hub's name behind a VAE's name; refuses a slip of the pen before the hub is asked.

    Raises:
        ValueError: if it is no folder, and not of the form owner/name.
    """
    if name == "builtin":
        return str(BUILTIN)
    if not (name and Path(name).is_dir()) and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ValueError("there is no such folder")
    return name


def _normalisation(config: Any) -> Normalisation:
    """Per channel where the VAE says so, else the one shift and factor of its configuration.

    Raises:
        ValueError: if there are more or fewer means or deviations than channels.
    """
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean and std:
        if not len(mean) == len(std) == config["latent_channels"]:
            raise ValueError(
                f"config.json has {len(mean)} latents_mean and {len(std)} latents_std for "
                f"{config['latent_channels']} latent_channels: give one each a channel"
            )
        return Normalisation(tuple(mean), tuple(1 / s for s in std))
    return Normalisation((config.get("shift_factor") or 0.0,), (config["scaling_factor"],))


def _save_passes(model: Any) -> None:
    """Let the layers of diffusers take fewer passes over memory, for the same bits."""
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D

    for block in model.modules():
        if isinstance(block, Downsample2D) and block.use_conv and block.padding == 0 and block.norm is None:
            block.forward = functools.partial(_downsample, block)
        if isinstance(block, ResnetBlock2D) and block.output_scale_factor == 1 and type(block.nonlinearity) is nn.SiLU:
            assert block.time_emb_proj is None
            assert block.upsample is None
            assert block.downsample is None
            block.forward = functools.partial(_residual, block)


def _residual(block: Any, x: Tensor, temb: None = None) -> Tensor:
    """Without gradients: activations and sums in place, and no division by 1."""
    hidden = block.conv1(F.silu(block.norm1(x), inplace=True))
    hidden = block.conv2(F.silu(block.norm2(hidden), inplace=True))
    return hidden.add_(x if block.conv_shortcut is None else block.conv_shortcut(x))


def _downsample(block: Any, x: Tensor) -> Tensor:
    """A row and a column of zeros more, then the convolution; without filling all of it with zeros first."""
    n, c, h, w = x.shape
    padded = torch.empty((n, c, h + 1, w + 1), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    padded[..., :h, :w] = x
    padded[..., h, :] = 0
    padded[..., w] = 0
    return block.conv(padded)


def _identity(model: Any) -> str:
    """Hash of what decides the latents: the weights as they were loaded, and the normalisation."""
    digest = hashlib.sha256(repr(_normalisation(model.config)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
