"""Names of settings about media; imports no torch."""

from typing import Literal, get_args

LayoutName = Literal["auto", "ffs", "ucf101", "sky", "taichi", "mixed"]
LAYOUTS: tuple[str, ...] = get_args(LayoutName)
