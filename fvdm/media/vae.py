"""Frozen VAEs: frames to latents and back, and the one place that loads them."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvdm.hub import fetching
from fvdm.media.chunks import decode_chunks, encode_chunks, to_pixels
from fvdm.media.fast_layers import save_passes
from fvdm.media.normalisation import Normalisation, sample_latents
from fvdm.media.vae_kinds import find_kind, normalisation_of

__all__ = ["BUILTIN", "VAE", "Normalisation", "load_vae", "sample_latents"]

BUILTIN = Path(__file__).parents[1] / "weights" / "builtin_vae"
CHUNK = 16  # images that are decoded at once; bounds the memory


class VAE:
    """A frozen VAE of diffusers, for images or for video. Frames are uint8, latents float32; leading axes are kept.

    The axis before the channels is time for a video VAE: `f` pixel frames are `frame_map.latent_frames(f)` latent
    frames. For an image VAE it is one more leading axis.

    Attributes:
        name: what it was loaded by.
        identity: hash of its weights and configuration; shards and checkpoints remember it.
        channels: channels of a latent.
        factor: how many times smaller a latent is than its frame, in height and width.
        frame_map: from pixel frames to latent frames.
        normalisation: of its latents.
    """

    def __init__(self, name: str, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        kind = find_kind(type(model).__name__)
        config = model.config
        self.name = name
        self.identity = _identity(model)
        self.channels = int(config[kind.channels])
        self.factor = kind.factor(config)
        self.frame_map = kind.frame_map(config)
        self.normalisation = normalisation_of(model)
        self.device, self.dtype = device, dtype
        self.cached, self.needs_odd, self.is_video = kind.cached, kind.needs_odd, kind.stride is not None
        layout = torch.preserve_format if self.is_video else torch.channels_last
        self.model = model.to(device, dtype, memory_format=layout).eval().requires_grad_(False)
        if not self.is_video:
            save_passes(self.model)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Mean and log-variance of the posterior, unscaled.

        Args:
            frames: uint8 `(... 3 h w)`; of a video VAE clips `(... f 3 h w)`, each encoded from its own first frame.

        Returns:
            float32 `(... 2c h/factor w/factor)` on the VAE's device; of a video VAE with latent frames in place of `f`.

        Raises:
            ValueError: if they are not uint8, the sides are no multiples of the factor, or the number of frames does
                not fill the last latent frame.
        """
        if frames.dtype != torch.uint8:
            raise ValueError(f"frames are uint8, 0 to 255; these are {frames.dtype}: scale, round and cast them")
        *lead, channels, h, w = frames.shape
        if channels != 3 or h % self.factor or w % self.factor:
            raise ValueError(
                f"frames of {channels} x {h} x {w} do not suit the VAE {self.name}: it takes 3 channels, and sides "
                f"that are multiples of {self.factor}"
            )
        if self.is_video:
            return self._encode_clips(frames)
        flat = frames.reshape(-1, 3, h, w).to(self.device).contiguous(memory_format=torch.channels_last)
        x = flat.to(self.dtype).div_(127.5).sub_(1)
        moments = _bounded(self.model.encode(x).latent_dist.parameters)
        return moments.reshape(*lead, *moments.shape[1:])

    def _encode_clips(self, frames: Tensor) -> Tensor:
        *lead, count, _, h, w = frames.shape if frames.ndim > 3 else (1, *frames.shape)
        if not self.frame_map.is_valid(count):
            s = self.frame_map.stride
            below = max(1, self.frame_map.pixel_frames(self.frame_map.latent_frames(count)))
            raise ValueError(
                f"a clip of {count} frames does not suit the VAE {self.name}, which takes 1 frame and {s} more for "
                f"each further latent: give {below} or {below + s} frames"
            )
        clips = [self._encode_clip(clip) for clip in frames.reshape(-1, count, 3, h, w)]
        moments = torch.stack(clips)
        return moments.reshape(*lead, *moments.shape[1:]) if frames.ndim > 3 else moments[0, 0]

    def _encode_clip(self, clip: Tensor) -> Tensor:
        """uint8 `(f 3 h w)` -> `(f' 2c h' w')`."""
        spans = map(self.frame_map.span, range(self.frame_map.latent_frames(len(clip))))
        return torch.cat(list(self.encode_stream(clip[span.start : span.stop] for span in spans)))

    @torch.no_grad()
    def encode_stream(self, spans: Iterable[Tensor]) -> Iterator[Tensor]:
        """Moments of one clip, as early as the VAE has them; with a cache (Wan), in memory that does not grow with it.

        Args:
            spans: uint8 `(n 3 h w)`, the pixel frames of one latent frame after the other, see `FrameMap.span`; of an
                image VAE any number of frames.

        Yields:
            float32 `(n 2c h/factor w/factor)`, as `encode` gives them: of a span, or of the whole clip at once.
        """

        def pixels(part: Tensor) -> Tensor:
            return part.to(self.device).transpose(0, 1)[None].to(self.dtype).div_(127.5).sub_(1)

        if not self.is_video:
            yield from map(self.encode, spans)
        elif self.cached:
            for part in encode_chunks(self.model, map(pixels, spans)):
                yield _bounded(part)[0].transpose(0, 1)
        else:
            clip = pixels(torch.cat(list(spans)))
            yield _bounded(self.model.encode(clip).latent_dist.parameters)[0].transpose(0, 1)

    def encode_mean(self, frames: Tensor) -> Tensor:
        """Scaled latents `(... c h/factor w/factor)` of frames, uint8 `(... 3 h w)`, without noise; see `encode`."""
        return sample_latents(self.encode(frames), self.normalisation, None)

    @torch.no_grad()
    def decode(self, latents: Tensor, chunk: int = CHUNK) -> Tensor:
        """Frames of scaled latents.

        Args:
            latents: `(... c h w)`; of a video VAE clips `(... f c h w)` from their first latent frame on.
            chunk: images decoded at once.

        Returns:
            uint8 `(... 3 h*factor w*factor)` on the VAE's device; of a video VAE with pixel frames in place of `f`.

        Raises:
            ValueError: if the latents have another number of channels.
        """
        *lead, channels, h, w = latents.shape
        if channels != self.channels:
            raise ValueError(
                f"latents of {channels} channels are not of the VAE {self.name}, which has {self.channels}"
            )
        if self.is_video:
            return self._decode_clips(latents)
        z = self._unscaled(latents.reshape(-1, channels, h, w))
        out = torch.empty((len(z), 3, h * self.factor, w * self.factor), dtype=torch.uint8, device=self.device)
        for begin in range(0, len(z), chunk):
            part = z[begin : begin + chunk].contiguous(memory_format=torch.channels_last)
            out[begin : begin + chunk] = to_pixels(self.model.decode(part).sample)
        return out.reshape(*lead, *out.shape[1:])

    def _unscaled(self, latents: Tensor) -> Tensor:
        return self.normalisation.invert(latents.to(self.device).float()).to(self.dtype)

    def _decode_clips(self, latents: Tensor) -> Tensor:
        *lead, count, c, h, w = latents.shape if latents.ndim > 3 else (1, *latents.shape)
        clips = latents.reshape(-1, count, c, h, w)
        size = (len(clips), self.frame_map.pixel_frames(count), 3, h * self.factor, w * self.factor)
        out = torch.empty(size, dtype=torch.uint8, device=self.device)
        for clip, frames in zip(clips, out, strict=True):
            begin = 0
            for part in self.decode_stream(z[None] for z in clip):
                frames[begin : begin + part.shape[1]] = part[0]
                begin += part.shape[1]
        return out.reshape(*lead, *out.shape[1:]) if latents.ndim > 3 else out[0, 0]

    @torch.no_grad()
    def decode_stream(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """Frames of scaled latent frames, as early as the VAE has them.

        An image VAE gives each frame at once, and so does a video VAE with a cache (Wan); others need the whole clip.

        Args:
            latents: `(b c h w)`, one latent frame after the other from the first on.

        Yields:
            uint8 `(b n 3 h*factor w*factor)`, the pixel frames that the next latent frames stand for.
        """
        unscaled = (self._unscaled(z) for z in latents)
        if not self.is_video:
            for z in unscaled:
                part = z.contiguous(memory_format=torch.channels_last)
                yield to_pixels(self.model.decode(part).sample)[:, None]
        elif self.cached:
            for pixels in decode_chunks(self.model, (z[:, :, None] for z in unscaled)):
                yield to_pixels(pixels).transpose(1, 2)
        else:
            clip = torch.stack(list(unscaled), dim=2)
            count = self.frame_map.pixel_frames(clip.shape[2])
            if self.needs_odd and clip.shape[2] % 2 == 0:
                clip = torch.cat([clip, clip[:, :, -1:]], dim=2)
            # LTX-Video's later decoders take a time: 0 stands for latents without noise.
            times = {"temb": clip.new_zeros(len(clip))} if self.model.config.get("timestep_conditioning") else {}
            yield to_pixels(self.model.decode(clip, **times).sample[:, :, :count]).transpose(1, 2)


def _bounded(moments: Tensor) -> Tensor:
    """float32 moments `(b 2c ...)` with a log-variance from -30 to 20, as diffusers bounds it."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    return torch.cat([mean, log_variance.clamp(-30, 20)], dim=1)


def load_vae(name: str = "builtin", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> VAE:
    """Load a VAE.

    Args:
        name: `builtin`; the name of a VAE on the hub, such as `stabilityai/sd-vae-ft-ema`, or of the folder `vae` in a
            pipeline, such as `Wan-AI/Wan2.1-T2V-1.3B-Diffusers/vae`; or a local folder with `config.json` and
            safetensors. `fvdm.media.vae_kinds.KINDS` lists the classes that can be loaded.
        device: where it runs.
        dtype: in which precision.

    Raises:
        ValueError: if there is no such VAE, it cannot be read, or its class is not in the list.
    """
    import diffusers
    from diffusers.utils import logging

    logging.set_verbosity_error()
    try:
        source, options = _source(name)
        config = diffusers.AutoencoderKL.load_config(source, **options)
        assert isinstance(config, dict)
        kind = find_kind(config.get("_class_name", "AutoencoderKL"))
        loader = getattr(diffusers, kind.name)
        with fetching(name):
            model = loader.from_pretrained(source, use_safetensors=True, low_cpu_mem_usage=False, **options)
        return VAE(name, model, torch.device(device), dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ValueError(
            f"cannot load the VAE {name!r}: give builtin, a folder with config.json and safetensors, or a name on "
            f"the hub such as stabilityai/sd-vae-ft-ema ({reason})"
        ) from None


def _source(name: str) -> tuple[str, dict[str, str]]:
    """The folder or the hub's name behind a VAE's name, and options; refuses a typing error before the hub is asked.

    Raises:
        ValueError: if it is no folder, and not of the form owner/name or owner/name/vae.
    """
    if name == "builtin":
        return str(BUILTIN), {}
    if name and Path(name).is_dir():
        inner = Path(name) / "vae"
        return (str(inner) if not (Path(name) / "config.json").exists() and inner.is_dir() else name), {}
    parts = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/(vae))?", name)
    if not parts:
        raise ValueError("there is no such folder")
    return parts[1], {"subfolder": parts[2]} if parts[2] else {}


def _identity(model: Any) -> str:
    """Hash of what decides the latents: the weights as they were loaded, and the normalisation."""
    digest = hashlib.sha256(repr(normalisation_of(model)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
