"""The former name of `fvdm.generation.pipeline`; models that version 0.1 registered import it."""

from fvdm.generation.pipeline import Trained, load

__all__ = ["Trained", "load"]
