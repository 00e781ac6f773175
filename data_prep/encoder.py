"""The VAE and the text encoder of an encoding: opened, and as its threads call them."""

import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from data_prep.config import EncodeConfig
from data_prep.samples import Array, VideoMoments
from data_prep.spec import EncodeSpec
from fvdm.data.clips import npy
from fvdm.data.format import EMPTY_PROMPT
from fvdm.files import atomic_write

if TYPE_CHECKING:
    from fvdm.media.text import TextEncoder
    from fvdm.media.vae import VAE


@dataclass(frozen=True)
class Models:
    """The VAE and, where captions are embedded, the text encoder."""

    vae: "VAE"
    text: "TextEncoder | None" = None


def open_models(config: EncodeConfig) -> Models:
    """The models of the settings, on their device and in their precision.

    Raises:
        ValueError: there is no such model, or this machine has no such device.
    """
    from fvdm.media.vae import load_vae

    check_device(config)
    device, dtype = str(config.device), getattr(torch, str(config.precision))
    vae = load_vae(config.vae, device=device, dtype=dtype)
    if not config.text_encoder:
        return Models(vae)
    from fvdm.media.text import load_text_encoder

    return Models(vae, load_text_encoder(config.text_encoder, device, dtype, config.max_tokens))


def check_device(config: EncodeConfig) -> None:
    """Refuses a device that this machine does not have.

    Raises:
        ValueError: with the reason.
    """
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--device {config.device}: this machine has no such device, or cannot use it ({reason})."
        ) from None


class Encoder:
    """The VAE and the text encoder as threads call them; counts the pixel frames that are encoded.

    Attributes:
        frames: encoded so far.
    """

    def __init__(self, models: Models, spec: EncodeSpec) -> None:
        """Takes the models, on their device, and what is made."""
        self.vae, self.text, self.spec = models.vae, models.text, spec
        self.frames = 0
        self._lock = threading.Lock()

    def piece(self, frames: np.ndarray) -> np.ndarray | None:
        """Moments as they are stored of frames that are encoded one by one, uint8 (n 3 h w).

        Returns:
            (1 or 2, n, 2c, h, w), the second half of the flipped frames; None where a number is not finite, or too
            large for the stored type.
        """
        pixels = torch.from_numpy(frames)
        if self.spec.flip:
            pixels = torch.cat([pixels, pixels.flip(-1)])
        moments = self.vae.encode(pixels).cpu()
        self._count(len(frames))
        array = self._stored(moments)
        return None if array is None else array.reshape(2 if self.spec.flip else 1, -1, *moments.shape[1:])

    def clip(self, pixels: Array, moments: VideoMoments) -> np.ndarray | None:
        """Encodes a clip from its first frame, and adds its moments to `moments` as they come.

        Returns:
            moments of no frame; None where a number is not finite.
        """
        streams = [self.vae.encode_stream(self._spans(pixels, flip)) for flip in range(2 if self.spec.flip else 1)]
        encoded = None
        for parts in zip(*streams, strict=True):
            stored = self._stored(torch.stack(parts).cpu())
            if stored is None:
                return None
            moments.append(stored)
            encoded = stored[:, :0]
        return encoded

    def _spans(self, pixels: Array, flip: int) -> Iterator[torch.Tensor]:
        total, begin = pixels.shape[0], 0
        while begin < total:
            latent = self.vae.frame_map.latent_frames(begin + 1) if begin else 0
            end = self.vae.frame_map.span(latent).stop if self.vae.is_video else begin + self.spec.read.chunk
            frames = torch.from_numpy(pixels.rows(begin, min(end, total)))
            yield frames.flip(-1) if flip else frames
            if not flip:
                self._count(len(frames))
            begin = end

    def captions(self, captions: tuple[str, ...]) -> list[np.ndarray] | None:
        """Embeddings (n e) as they are stored; None where a number is not finite."""
        assert self.text is not None
        stored = [self._stored(embedding) for embedding in self.text.encode(captions)]
        return None if any(array is None for array in stored) else [array for array in stored if array is not None]

    def _stored(self, values: torch.Tensor) -> np.ndarray | None:
        stored = values.to(getattr(torch, self.spec.dtype))
        if not torch.isfinite(stored).all():
            return None
        return stored.view(torch.uint16).numpy() if self.spec.dtype == "bfloat16" else stored.numpy()

    def _count(self, frames: int) -> None:
        with self._lock:
            self.frames += frames

    def write_empty_prompt(self, out: Path) -> None:
        """Writes the empty prompt's embedding, where captions are embedded, unless it is there.

        Raises:
            ValueError: a number is not finite in the stored type.
        """
        if self.text is not None and not (out / EMPTY_PROMPT).exists():
            stored = self.captions(("",))
            if stored is None:
                raise ValueError(
                    f"The empty prompt's embedding is not finite in {self.spec.dtype}: use another --dtype."
                )
            # Several jobs may write it at once.
            with atomic_write(out / EMPTY_PROMPT, mark=f".{secrets.token_hex(8)}") as temporary:
                temporary.write_bytes(npy(stored[0]))
