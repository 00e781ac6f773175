"""Backbones: the networks that estimate the noise, how they are loaded, saved and compiled."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "latte": ["Latte", "LatteConfig", "preset"],
        "official": ["from_official"],
    },
)
