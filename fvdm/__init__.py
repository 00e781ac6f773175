"""FVDM: video diffusion with one timestep per frame.

`from fvdm import load, generate` is the Python interface; see `fvdm.pipeline`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fvdm.pipeline import generate, load, stream

__version__ = "0.1.0"
__all__ = ["generate", "load", "stream"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import fvdm` stays cheap."""
    if name == "generate":
        # The module of that name becomes an attribute of the package on import; it can be called like the function.
        return import_module("fvdm.generate")
    if name in __all__:
        return getattr(import_module("fvdm.pipeline"), name)
    raise AttributeError(f"module 'fvdm' has no attribute {name!r}")
