"""Backbones: the networks that estimate each frame, and how they are built, loaded, saved and compiled."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "backbone": ["Backbone"],
        "compilation": ["compile_blocks"],
        "config": ["BackboneConfig"],
        "loading": ["build", "config_from", "load_backbone", "preset"],
        "official": ["from_official"],
    },
)
