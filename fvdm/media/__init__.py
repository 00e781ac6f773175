"""Pixels: videos and images are read, videos are written, and VAEs turn frames into latents and back."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "frames": ["FrameMap"],
        "vae": ["VAE", "load_vae"],
    },
)
