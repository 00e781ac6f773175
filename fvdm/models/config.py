"""Settings that all backbones share."""

from typing import Literal, get_args

Backend = Literal["auto", "flash", "sdpa", "math"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
