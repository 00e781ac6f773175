"""The Fréchet video distance and what it is measured with: I3D features, protocols, and sources of clips."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "fvd": ["features", "frechet_distance"],
        "i3d": ["load_i3d"],
    },
)
