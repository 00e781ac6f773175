"""FVDM: video diffusion with one timestep per frame."""

__version__ = "0.1.0"
