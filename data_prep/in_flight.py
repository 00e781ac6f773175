"""The videos that are being decoded and encoded: their clips, the calls of the VAE, and what is done of them.

A whole video is encoded in pieces of a fixed number of frames, a clip from its own first frame; both together with
their flipped copies. What is stored therefore does not depend on what else is in flight. Pixels and moments that wait
are in temporary files, so memory does not grow with the length of a video or of a clip.
"""

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from data_prep.decoding import Rejected
from data_prep.manifest import bucket_of
from data_prep.planning import EncodePlan, ShardPlan
from data_prep.samples import Array, Part, VideoMoments, clip_key
from data_prep.shards import Work
from fvdm.data.format import Clip, Window
from fvdm.media.clips import Piece
from fvdm.media.videos import Info

if TYPE_CHECKING:
    from fvdm.media.text import TextEncoder
    from fvdm.media.vae import VAE

PIXELS = 64 * 2**20  # bytes of a clip's pixels that stay in memory before they go to a file

Moments = Future["np.ndarray | None"]
Embeddings = Future["list[np.ndarray] | None"]


class Encoder:
    """The VAE and the text encoder as threads call them; counts the pixel frames that are encoded.

    Attributes:
        frames: encoded so far.
    """

    def __init__(self, vae: "VAE", text: "TextEncoder | None", plan: EncodePlan) -> None:
        """Takes the models, on their device, and what is made."""
        self.vae, self.text, self.spec = vae, text, plan.spec
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


class _ClipInFlight:
    """A clip, or a whole video: its calls of the VAE, in order, and the moments of those that are done."""

    def __init__(self, piece: Piece, copies: int, folder: Path) -> None:
        self.piece = piece._replace(frames=np.empty(0, np.uint8))
        self.frames, self.complete, self.finite = 0, False, True
        self.calls: deque[Moments] = deque()
        self.moments = VideoMoments(copies, folder)
        self.pixels = Array(folder, PIXELS)

    def collect(self, everything: bool) -> None:
        """Takes in what is encoded; with `everything`, waits for it."""
        while self.calls and (everything or self.calls[0].done()):
            moments = self.calls.popleft().result()
            self.finite = self.finite and moments is not None
            if moments is not None:
                self.moments.append(moments)

    def close(self) -> None:
        wait(self.calls)
        self.moments.close()
        self.pixels.close()


class VideoInFlight:
    """A video: its clips in flight, and the samples of those that are done.

    Attributes:
        number: of the video in the plan.
        end: once it was read to its end: what is known of it, or why it cannot be used.
    """

    def __init__(self, number: int, plan: EncodePlan, encoder: Encoder, pool: ThreadPoolExecutor, folder: Path) -> None:
        """Begins with its captions; `folder` is where temporary files are."""
        self.number, self.source, self.spec = number, plan.sources[number], plan.spec
        self.texts = plan.captions[number] if plan.captions else ()
        self.embeddings: Embeddings | None = None
        if encoder.text is not None and self.texts:
            self.embeddings = pool.submit(encoder.captions, self.texts)
        self.encoder, self.pool, self.folder = encoder, pool, folder
        self.clips: deque[_ClipInFlight] = deque()
        self.end: Info | Rejected | None = None
        self.part = Part(folder)

    def take(self, piece: Piece) -> Moments | None:
        """Takes the next frames of a clip; returns the call that encodes them, if one begins."""
        clip = next((clip for clip in self.clips if clip.piece.clip == piece.clip), None)
        if clip is None:
            clip = _ClipInFlight(piece, 2 if self.spec.flip else 1, self.folder)
            self.clips.append(clip)
        clip.frames, clip.complete = clip.frames + len(piece.frames), piece.last
        if not self.spec.read.frames:
            clip.calls.append(self.pool.submit(self.encoder.piece, piece.frames))
            return clip.calls[-1]
        clip.pixels.append(piece.frames)
        if not piece.last:
            return None
        clip.calls.append(self.pool.submit(self.encoder.clip, clip.pixels, clip.moments))
        return clip.calls[-1]

    def collect(self, everything: bool = False) -> None:
        """Takes in what is encoded, clip after clip; with `everything`, waits for it."""
        for clip in self.clips:
            clip.collect(everything)
        while self.clips and self.clips[0].complete and not self.clips[0].calls:
            self._add(self.clips.popleft())

    @property
    def ended(self) -> bool:
        """It was read to its end, and is encoded."""
        return self.end is not None and not any(clip.calls for clip in self.clips)

    def store(self, work: Work, shard: ShardPlan) -> Info | Rejected:
        """Keeps what the video has become, or the reason why it cannot be used, which it returns."""
        assert self.end is not None
        if isinstance(self.end, Info) and not self.spec.read.frames:
            for clip in self.clips:
                if self.spec.format == 1 and clip.finite:
                    work.keep(shard, self.number, clip.moments.sample(self.number, self.source, self.end.fps))
                    return self.end
                self._add(clip)
        if isinstance(self.end, Info):
            work.keep(shard, self.number, self.part)
        return self.end

    def _add(self, clip: _ClipInFlight) -> None:
        """Makes the sample of a clip that is encoded; what is not finite rejects the video."""
        embeddings = self.embeddings.result() if self.embeddings else []
        if not clip.finite or embeddings is None:
            what = "the VAE's latents" if not clip.finite else "the text embeddings"
            if not isinstance(self.end, Rejected):
                self.end = Rejected(f"{what} are not finite in {self.spec.dtype}")
        elif self.spec.format == 2:
            piece = clip.piece
            still = self.spec.read.images and piece.last and clip.frames == 1
            described = Clip(
                source=self.source.name,
                window=Window(piece.first, clip.frames),
                fps=piece.fps,
                label=self.source.label,
                bucket=bucket_of(self.spec, piece.bucket, still),
                frames=0,
                captions=self.texts,
            )
            self.part.add(clip.moments.clip(clip_key(self.number, piece.clip), described, embeddings))
        clip.close()

    def close(self) -> None:
        """Frees the temporary files; waits for what is being encoded."""
        for clip in self.clips:
            clip.close()
        self.part.close()
