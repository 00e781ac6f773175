"""FVDM: video diffusion with one timestep per frame.

from fvdm import load

model = load("example")
video = model.generate(task="image-to-video", given=image, seed=7)
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"generation.pipeline": ["load"]})
