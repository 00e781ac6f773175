"""How the pixel frames of a clip map to its latent frames. Pure arithmetic."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FrameMap:
    """The map of a VAE from pixel frames to latent frames.

    An image VAE is one to one (stride 1). In a causal video VAE with temporal stride s, latent frame 0 is pixel frame
    0, and latent frame i >= 1 covers the pixel frames s (i - 1) + 1 .. s i. A shorter clip is therefore always a
    prefix of a longer one, in pixels and in latents.

    Attributes:
        stride: pixel frames per latent frame after the first, >= 1.
    """

    stride: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError if the stride is below 1."""
        if self.stride < 1:
            raise ValueError(f"the temporal stride of a VAE is at least 1, not {self.stride}")

    def latent_frames(self, pixel_frames: int) -> int:
        """Number of latent frames that `pixel_frames` cover completely; frames that fill no latent are not counted."""
        return (pixel_frames - 1) // self.stride + 1 if pixel_frames > 0 else 0

    def pixel_frames(self, latent_frames: int) -> int:
        """Number of pixel frames that `latent_frames` stand for."""
        return (latent_frames - 1) * self.stride + 1 if latent_frames > 0 else 0

    def span(self, latent: int) -> range:
        """Indices of the pixel frames that latent frame `latent` (from 0) covers."""
        return range(self.pixel_frames(latent), self.pixel_frames(latent + 1))

    def is_valid(self, pixel_frames: int) -> bool:
        """Whether a clip of so many pixel frames (>= 1) can be encoded without a remainder."""
        return pixel_frames > 0 and (pixel_frames - 1) % self.stride == 0
